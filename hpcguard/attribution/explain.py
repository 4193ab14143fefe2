"""explain_batch: LIME explanations of a batch of images whose perturbations share model batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.adaptive import fit_adaptively, fit_all
from hpcguard.attribution.forward import Perturber, Predict
from hpcguard.attribution.sampling import Drawn, draw_samples
from hpcguard.attribution.segments import MOST_SEGMENTS, relabel, segment_batch
from hpcguard.config import LimeConfig

if TYPE_CHECKING:
    from lime.lime_image import ImageExplanation


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
    interval: np.ndarray  # float64 [B, L, S], half the width of the 95% interval
    intercept: np.ndarray  # float64 [B, L]
    score: np.ndarray  # float64 [B, L], weighted R^2
    local_prediction: np.ndarray  # float64 [B, L], the surrogate at the unperturbed image
    effective_samples: np.ndarray  # float64 [B], (sum w)^2 / sum w^2, the same for every label
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

    predict: float32 [n, C, H, W] to probabilities [n, K]; called with at most config.batch_size images, in memory that
    is used again after the call.
    targets: labels to explain, int [B, L]; None: the most probable one and the runner-up.
    segments: your own superpixels, int [B, H, W]; samples: your own 0/1 rows [B, N, S], row 0 all ones.
    Raises ValueError for wrong shapes and for probabilities that are not finite, naming the image id; InputError or
    RuntimeError where the segmentation fails.
    """
    batch = _float_images(images, ids)
    host = batch.cpu().numpy()
    maps = segment_batch(batch, config, ids) if segments is None else _own_segments(segments, host)
    counts = maps.reshape(len(maps), -1).max(1) + 1
    drawn = _draw(ids, counts, config) if samples is None else _own_samples(samples, counts)
    map_tensor = torch.as_tensor(maps, device=batch.device)
    hidden = hidden_fill(batch, map_tensor, int(counts.max()), config.fill)
    perturber = Perturber(predict, batch, hidden, map_tensor, np.asarray(ids), config.batch_size)
    original = perturber.originals()
    perturber = replace(perturber, classes=original.shape[1])
    labels = _targets(original, targets)
    explained = original.gather(1, labels)
    fit_rows = fit_adaptively if samples is None and config.num_samples == "auto" else fit_all
    fitted = fit_rows(perturber, drawn, explained.cpu(), labels, config)
    return Attribution(
        image_ids=np.asarray(ids, np.int64),
        targets=labels.cpu().numpy().astype(np.int32),
        predicted=original.argmax(1).cpu().numpy().astype(np.int32),
        probability=explained.float().cpu().numpy(),
        segments=maps.astype(np.uint16),
        num_segments=counts.astype(np.uint16),
        coefficients=_padded([fit.surrogate.coefficients for fit in fitted]),
        standard_error=_padded([fit.surrogate.standard_error for fit in fitted]),
        interval=_padded([fit.surrogate.interval for fit in fitted]),
        intercept=_stacked([fit.surrogate.intercept for fit in fitted]),
        score=_stacked([fit.surrogate.score for fit in fitted]),
        local_prediction=_stacked([fit.surrogate.local_prediction for fit in fitted]),
        effective_samples=np.array([fit.surrogate.effective_samples for fit in fitted]),
        num_samples=np.array([fit.num_samples for fit in fitted], np.uint32),
        images=host,
    )


def true_and_runner_up(probability: Tensor, labels: Tensor) -> Tensor:
    """Targets for training: the true label and the most probable wrong one; [B, K] and [B] to int64 [B, 2]."""
    others = probability.scatter(1, labels[:, None], -torch.inf)
    return torch.stack([labels, others.argmax(1)], dim=1)


def _float_images(images: np.ndarray | Tensor, ids: np.ndarray) -> Tensor:
    batch = torch.as_tensor(images)
    if not batch.is_floating_point():
        raise ValueError(f"images: expected floats in [0, 1], got {batch.dtype}; divide pixels from 0 to 255 by 255")
    if batch.ndim != 4 or len(batch) != len(ids) or len(ids) == 0:
        raise ValueError(f"expected images [B, C, H, W] and B ids, got {tuple(batch.shape)} and {len(ids)} ids")
    if np.min(ids) < 0:
        raise ValueError(f"ids: expected numbers from 0 on, got {np.min(ids)}")
    if batch.min() < 0 or batch.max() > 1:
        seen = f"{batch.min():g} to {batch.max():g}"
        warnings.warn(f"images: expected floats in [0, 1], got {seen}; do not normalise them yourself", stacklevel=3)
    return batch.detach().float()


def _own_segments(segments: np.ndarray, images: np.ndarray) -> np.ndarray:
    maps = np.asarray(segments)
    expected = (len(images), *images.shape[2:])
    if maps.shape != expected:
        raise ValueError(f"segments: expected the shape {expected}, got {maps.shape}")
    dense = np.stack([relabel(each) for each in maps])
    if dense.max() >= MOST_SEGMENTS:
        raise ValueError(f"segments: {dense.max() + 1} in one image, at most {MOST_SEGMENTS} are possible")
    if not np.array_equal(dense, maps):
        warnings.warn("segments: labels were not 0..d-1 without gaps and have been renumbered", stacklevel=3)
    return dense


def _draw(ids: np.ndarray, counts: np.ndarray, config: LimeConfig) -> list[Drawn]:
    return [
        draw_samples(config.design, config.seed, int(image_id), config.most_samples, int(count))
        for image_id, count in zip(ids, counts, strict=True)
    ]


def _own_samples(samples: np.ndarray, counts: np.ndarray) -> list[Drawn]:
    rows = np.array(samples, bool)
    if rows.ndim != 3 or len(rows) != len(counts) or rows.shape[1] == 0 or rows.shape[2] < counts.max():
        raise ValueError(f"samples: expected [{len(counts)}, N, S >= {counts.max()}], got {rows.shape}")
    if not np.array_equal(rows, samples):
        raise ValueError("samples: expected nothing but 0 and 1")
    own = [row[:, :count] for row, count in zip(rows, counts, strict=True)]
    if not all(row[0].all() for row in own):
        raise ValueError("samples: row 0 must be all ones, the image itself")
    return [Drawn(row) for row in own]


def _padded(parts: list[Tensor]) -> np.ndarray:
    """[L, S_i] each to [B, L, S], NaN past an image's own segments."""
    widest = max(part.shape[1] for part in parts)
    return np.stack(
        [np.pad(part.cpu().numpy(), ((0, 0), (0, widest - part.shape[1])), constant_values=np.nan) for part in parts]
    )


def _stacked(parts: list[Tensor]) -> np.ndarray:
    return torch.stack(parts).cpu().numpy()


def hidden_fill(batch: Tensor, maps: Tensor, count: int, fill: str | float) -> Tensor:
    """What each pixel shows when its segment is hidden, float32 [B, C, H, W]."""
    if fill != "mean":
        return torch.full_like(batch, float(fill))
    size, channels = batch.shape[:2]
    # On the host, for a GPU adds in an order of its own, and the same unit is to have the same bytes.
    flat = maps.cpu().reshape(size, 1, -1).expand(-1, channels, -1)
    pixels = batch.cpu().reshape(size, channels, -1).double()
    sums = pixels.new_zeros(size, channels, count).scatter_add_(2, flat, pixels)
    sizes = pixels.new_zeros(size, channels, count).scatter_add_(2, flat, torch.ones_like(pixels))
    return (sums / sizes.clamp_min(1)).gather(2, flat).reshape(batch.shape).float().to(batch.device)


def _targets(original: Tensor, targets: np.ndarray | None) -> Tensor:
    if targets is None:
        return original.topk(min(2, original.shape[1]), dim=1).indices
    labels = torch.as_tensor(np.asarray(targets), dtype=torch.int64, device=original.device)
    fits = labels.ndim == 2 and len(labels) == len(original) and labels.shape[1] > 0
    if not fits or labels.min() < 0 or labels.max() >= original.shape[1]:
        shape, classes = tuple(labels.shape), original.shape[1]
        raise ValueError(f"targets: expected [{len(original)}, L] with labels below {classes}, got shape {shape}")
    return labels
