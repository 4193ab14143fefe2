"""explain_batch: LIME explanations of a batch of images whose perturbations share model batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.sampling import draw_samples, sample_clusters
from hpcguard.attribution.segments import relabel, segment_image
from hpcguard.attribution.surrogate import fit_surrogate, lime_weights
from hpcguard.config import LimeConfig

if TYPE_CHECKING:
    from lime.lime_image import ImageExplanation

Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attribution:
    """Explanations of B images: L labels each, at most S segments; NaN past an image's own segments."""

    image_ids: np.ndarray  # int64 [B]
    targets: np.ndarray  # int32 [B, L]
    predicted: np.ndarray  # int32 [B]
    probability: np.ndarray  # float32 [B, L], of the unperturbed image
    segments: np.ndarray  # uint16 [B, H, W]
    num_segments: np.ndarray  # uint16 [B]
    coefficients: np.ndarray  # float64 [B, L, S]
    standard_error: np.ndarray  # float64 [B, L, S]
    intercept: np.ndarray  # float64 [B, L]
    score: np.ndarray  # float64 [B, L], weighted R^2
    local_prediction: np.ndarray  # float64 [B, L]
    num_samples: np.ndarray  # uint32 [B]
    images: np.ndarray  # float32 [B, C, H, W]

    def to_lime(self, i: int) -> ImageExplanation:
        """Explanation of the i-th image as the `lime` package gives it; score and local_pred are the first label's."""
        from lime.lime_image import ImageExplanation

        pixels = np.moveaxis(self.images[i], 0, -1)
        shown = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels
        explanation = ImageExplanation(shown, self.segments[i].astype(np.int64))
        count = int(self.num_segments[i])
        for label, beta, intercept in zip(self.targets[i], self.coefficients[i], self.intercept[i], strict=True):
            order = sorted(range(count), key=lambda segment: -abs(beta[segment]))
            explanation.local_exp[int(label)] = [(segment, float(beta[segment])) for segment in order]
            explanation.intercept[int(label)] = float(intercept)
        explanation.top_labels = [int(label) for label in self.targets[i]]
        explanation.score = float(self.score[i, 0])
        explanation.local_pred = self.local_prediction[i, :1]
        return explanation


def explain_batch(
    predict: Predict,
    images: np.ndarray | Tensor,
    ids: np.ndarray,
    config: LimeConfig,
    targets: np.ndarray | None = None,
    segments: np.ndarray | None = None,
    samples: np.ndarray | None = None,
) -> Attribution:
    """Explain B images of float32 [B, C, H, W] in [0, 1] on the device where `images` lies.

    predict: float32 [n, C, H, W] to probabilities [n, K]; called with at most config.batch_size images.
    targets: labels to explain, int [B, L]; None: the most probable one and the runner-up.
    segments: your own superpixels, int [B, H, W]; samples: your own 0/1 rows [B, N, S], row 0 all ones.
    Raises ValueError for wrong shapes and for probabilities that are not finite, naming the image id.
    """
    batch = torch.as_tensor(images, dtype=torch.float32)
    if batch.ndim != 4 or len(batch) != len(ids) or len(ids) == 0:
        raise ValueError(f"expected images [B, C, H, W] and B ids, got {tuple(batch.shape)} and {len(ids)} ids")
    host = batch.cpu().numpy()
    maps = _segment_maps(host, config) if segments is None else _own_segments(segments, host)
    counts = maps.reshape(len(maps), -1).max(1) + 1
    rows = _sample_rows(ids, counts, config) if samples is None else _own_samples(samples, counts)
    clusters = sample_clusters(config.design if samples is None else "iid", rows.shape[1])

    map_tensor, row_tensor = torch.as_tensor(maps, device=batch.device), torch.as_tensor(rows, device=batch.device)
    hidden = _hidden_fill(batch, map_tensor, int(counts.max()), config.fill)
    original = _predict_originals(predict, batch, ids, config.batch_size)
    labels = _targets(original, targets)
    probability = _predict_perturbed(predict, batch, hidden, map_tensor, row_tensor, original, labels, ids, config)

    count_tensor = torch.as_tensor(counts, device=batch.device)
    weights = lime_weights(row_tensor, count_tensor, config.kernel_width)
    surrogate = fit_surrogate(
        row_tensor, probability, weights, config.ridge, torch.as_tensor(clusters, device=batch.device)
    )
    past_end = (torch.arange(rows.shape[2], device=batch.device) >= count_tensor[:, None])[:, None]
    return Attribution(
        image_ids=np.asarray(ids, np.int64),
        targets=labels.cpu().numpy().astype(np.int32),
        predicted=original.argmax(1).cpu().numpy().astype(np.int32),
        probability=probability[:, 0].float().cpu().numpy(),
        segments=maps.astype(np.uint16),
        num_segments=counts.astype(np.uint16),
        coefficients=surrogate.coefficients.masked_fill(past_end, torch.nan).cpu().numpy(),
        standard_error=surrogate.standard_error.masked_fill(past_end, torch.nan).cpu().numpy(),
        intercept=surrogate.intercept.cpu().numpy(),
        score=surrogate.score.cpu().numpy(),
        local_prediction=surrogate.local_prediction.cpu().numpy(),
        num_samples=np.full(len(ids), rows.shape[1], np.uint32),
        images=host,
    )


def true_and_runner_up(probability: Tensor, labels: Tensor) -> Tensor:
    """Targets for training: the true label and the most probable wrong one; [B, K] and [B] to int64 [B, 2]."""
    others = probability.scatter(1, labels[:, None], -torch.inf)
    return torch.stack([labels, others.argmax(1)], dim=1)


def _segment_maps(images: np.ndarray, config: LimeConfig) -> np.ndarray:
    return np.stack([segment_image(image, config) for image in images])


def _own_segments(segments: np.ndarray, images: np.ndarray) -> np.ndarray:
    maps = np.asarray(segments)
    expected = (len(images), *images.shape[2:])
    if maps.shape != expected:
        raise ValueError(f"segments: expected the shape {expected}, got {maps.shape}")
    dense = np.stack([relabel(each) for each in maps])
    if not np.array_equal(dense, maps):
        warnings.warn("segments: labels were not 0..d-1 without gaps and have been renumbered", stacklevel=3)
    return dense


def _sample_rows(ids: np.ndarray, counts: np.ndarray, config: LimeConfig) -> np.ndarray:
    rows = np.zeros((len(ids), config.num_samples, counts.max()), bool)
    for row, image_id, count in zip(rows, ids, counts, strict=True):
        row[:, :count] = draw_samples(config.design, config.seed, int(image_id), config.num_samples, int(count))
    return rows


def _own_samples(samples: np.ndarray, counts: np.ndarray) -> np.ndarray:
    rows = np.array(samples, bool)
    if rows.ndim != 3 or len(rows) != len(counts) or rows.shape[2] < counts.max():
        raise ValueError(f"samples: expected [{len(counts)}, N, S >= {counts.max()}], got {rows.shape}")
    rows = rows[:, :, : counts.max()]
    for row, count in zip(rows, counts, strict=True):
        row[:, count:] = False
        if not row[0, :count].all():
            raise ValueError("samples: row 0 must be all ones, the image itself")
    return rows


def _hidden_fill(batch: Tensor, maps: Tensor, count: int, fill: str | float) -> Tensor:
    """What each pixel shows when its segment is hidden, float32 [B, C, H, W]."""
    if fill != "mean":
        return torch.full_like(batch, float(fill))
    size, channels = batch.shape[:2]
    flat = maps.reshape(size, 1, -1).expand(-1, channels, -1)
    pixels = batch.reshape(size, channels, -1).double()
    sums = pixels.new_zeros(size, channels, count).scatter_add_(2, flat, pixels)
    sizes = pixels.new_zeros(size, channels, count).scatter_add_(2, flat, torch.ones_like(pixels))
    return (sums / sizes.clamp_min(1)).gather(2, flat).reshape(batch.shape).float()


def _targets(original: Tensor, targets: np.ndarray | None) -> Tensor:
    if targets is None:
        return original.topk(min(2, original.shape[1]), dim=1).indices
    labels = torch.as_tensor(np.asarray(targets), dtype=torch.int64, device=original.device)
    if labels.ndim != 2 or len(labels) != len(original) or labels.min() < 0 or labels.max() >= original.shape[1]:
        shape, classes = tuple(labels.shape), original.shape[1]
        raise ValueError(f"targets: expected [{len(original)}, L] with labels below {classes}, got shape {shape}")
    return labels


def _checked(probability: Tensor, rows: int, owners: np.ndarray) -> Tensor:
    """The model's answer, if it is [rows, K] and finite; `owners` are the image ids of the rows."""
    if probability.ndim != 2 or len(probability) != rows:
        raise ValueError(f"predict: expected probabilities [{rows}, K], got {tuple(probability.shape)}")
    finite = torch.isfinite(probability).all(1)
    if not finite.all():
        bad = np.unique(owners[~finite.cpu().numpy()])
        raise ValueError(f"predict: NaN or infinite probabilities for image ids {bad[:5].tolist()}")
    return probability


@torch.inference_mode()
def _predict_originals(predict: Predict, batch: Tensor, ids: np.ndarray, batch_size: int) -> Tensor:
    parts = [
        _checked(predict(batch[start : start + batch_size]), len(owners), owners)
        for start in range(0, len(batch), batch_size)
        for owners in (ids[start : start + batch_size],)
    ]
    return torch.cat(parts)


@torch.inference_mode()
def _predict_perturbed(
    predict: Predict,
    batch: Tensor,
    hidden: Tensor,
    maps: Tensor,
    rows: Tensor,
    original: Tensor,
    labels: Tensor,
    ids: np.ndarray,
    config: LimeConfig,
) -> Tensor:
    """Probabilities [B, N, L] of the explained labels; config.batch_size images are all that is in flight."""
    size, num_samples = rows.shape[:2]
    probability = original.new_empty(size, num_samples, labels.shape[1])
    probability[:, 0] = original.gather(1, labels)
    buffer = batch.new_empty(min(config.batch_size, size * (num_samples - 1)), *batch.shape[1:])
    for spans in _model_batches(size, num_samples, config.batch_size):
        filled = 0
        for image, first, last in spans:
            shown = rows[image, first:last].index_select(1, maps[image].flatten())
            shown = shown.reshape(-1, 1, *maps.shape[1:])
            torch.where(shown, batch[image], hidden[image], out=buffer[filled : filled + last - first])
            filled += last - first
        owners = np.concatenate([np.full(last - first, ids[image]) for image, first, last in spans])
        answer = _checked(predict(buffer[:filled]), filled, owners)
        start = 0
        for image, first, last in spans:
            probability[image, first:last] = answer[start : start + last - first][:, labels[image]]
            start += last - first
    return probability


def _model_batches(size: int, num_samples: int, batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Rows 1..N-1 of every image, packed into model batches of (image, first row, last row + 1)."""
    spans: list[tuple[int, int, int]] = []
    room = batch_size
    for image in range(size):
        first = 1
        while first < num_samples:
            last = min(num_samples, first + room)
            spans.append((image, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield spans
                spans, room = [], batch_size
    if spans:
        yield spans
