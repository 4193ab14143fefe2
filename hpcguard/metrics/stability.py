"""How stable an explanation is: between R repeats with other samples, of d segments, and under noise on the image."""

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.explain import Predict, explain_batch
from hpcguard.config import LimeConfig
from hpcguard.metrics.attribution import topk_jaccard
from hpcguard.randomness import keyed_generator

Z_95 = 1.96


def mean_pairwise_jaccard(coefficients: np.ndarray, k: int) -> float:
    """Mean top-k Jaccard index over all pairs of R repeats [R, d] of one image's explanation."""
    _check_repeats(coefficients, k)
    return float(np.mean([topk_jaccard(first, second, k) for first, second in combinations(coefficients, 2)]))


def variable_stability_index(coefficients: np.ndarray, k: int) -> float:
    """VSI of repeats [R, d] of one image (Visani et al. 2020, arXiv 2001.11757); 0 to 1 where theirs is a percentage.

    A repeat selects its k segments of largest |coefficient|, or all of them if it has fewer. The index is the mean,
    over all pairs of repeats, of the number of segments that both select divided by the number that one selects.
    """
    _check_repeats(coefficients, k)
    selected = _selected(coefficients, k)
    first, second = np.triu_indices(len(selected), 1)
    return float((selected[first] & selected[second]).sum(1).mean() / selected[0].sum())


def coefficient_stability_index(coefficients: np.ndarray, standard_errors: np.ndarray, k: int) -> float:
    """CSI of repeats [R, d] of one image (Visani et al. 2020, arXiv 2001.11757); 0 to 1 where theirs is a percentage.

    Of each segment, the share of overlapping 95% intervals (coefficient -+ 1.96 standard errors, ends included) among
    the pairs of repeats that both select it as in the VSI; the index is the mean over segments with at least one such
    pair, and NaN if there is none. As in the paper it does not see coefficients that are unstable but not selected.
    """
    _check_repeats(coefficients, k)
    if standard_errors.shape != coefficients.shape:
        raise ValueError(f"standard_errors: expected the shape {coefficients.shape}, got {standard_errors.shape}")
    selected = _selected(coefficients, k)
    low, high = coefficients - Z_95 * standard_errors, coefficients + Z_95 * standard_errors
    first, second = np.triu_indices(len(selected), 1)
    both = selected[first] & selected[second]
    overlap = (low[first] <= high[second]) & (low[second] <= high[first])
    pairs = both.sum(0)
    if not pairs.any():
        return float("nan")
    return float(np.mean((overlap & both).sum(0)[pairs > 0] / pairs[pairs > 0]))


def noise_instability(
    predict: Predict,
    images: np.ndarray | Tensor,
    ids: np.ndarray,
    config: LimeConfig,
    targets: np.ndarray,
    segments: np.ndarray,
    copies: int = 5,
    sigma: float = 10 / 255,
    seed: int = 0,
) -> np.ndarray:
    """Var_k a_j(x + noise_k) of arXiv 2601.00968: float64 [B, L, S], NaN past an image's own segments.

    The unbiased variance of the coefficients over noisy copies of each image, clipped to [0, 1], that share targets
    [B, L], segments [B, H, W] and sampling rows. One explain_batch call for all B * copies, so B is a unit of images.
    """
    batch = torch.as_tensor(images, dtype=torch.float32)
    if copies < 2:
        raise ValueError(f"copies: a variance needs at least 2, got {copies}")
    lengths = [len(each) for each in (batch, ids, targets, segments)]
    if len(set(lengths)) != 1:
        raise ValueError(f"expected as many ids, targets and segments as images, got {lengths}")
    # Drawn on the host and an image at a time: the noise of an id is the same in any batch and on any device.
    noise = np.stack([_noise(seed, int(image_id), (copies, *batch.shape[1:])) for image_id in ids])
    noisy = (batch[:, None] + sigma * torch.from_numpy(noise).to(batch.device)).clamp(0, 1).flatten(0, 1)
    if not batch.is_contiguous() and batch.is_contiguous(memory_format=torch.channels_last):
        noisy = noisy.contiguous(memory_format=torch.channels_last)  # the layout that the caller's model is quick with
    # Sampling rows are keyed by the image id, so that copies of an image get the same ones.
    coefficients = explain_batch(
        predict,
        noisy,
        np.repeat(ids, copies),
        config,
        targets=np.repeat(targets, copies, axis=0),
        segments=np.repeat(segments, copies, axis=0),
    ).coefficients
    return coefficients.reshape(len(batch), copies, *coefficients.shape[1:]).var(axis=1, ddof=1)


def _noise(seed: int, image_id: int, shape: tuple[int, ...]) -> np.ndarray:
    return keyed_generator("attack", seed, image_id).standard_normal(shape, dtype=np.float32)


def _selected(coefficients: np.ndarray, k: int) -> np.ndarray:
    """The k largest |coefficient| of each repeat, bool [R, d]; never NaN padding, the lower index where equal."""
    magnitude = np.nan_to_num(np.abs(coefficients), nan=-1.0)
    rank = np.argsort(np.argsort(-magnitude, axis=1, kind="stable"), axis=1)
    return (rank < k) & ~np.isnan(coefficients)


def _check_repeats(coefficients: np.ndarray, k: int) -> None:
    padding = np.isnan(coefficients)
    if coefficients.ndim != 2 or len(coefficients) < 2 or k < 1:
        raise ValueError(f"expected at least 2 repeats [R, d] and k >= 1, got {coefficients.shape} and k = {k}")
    if (padding != padding[0]).any() or padding[0].all():
        raise ValueError("repeats of one image must have the same segments, at least one: their NaN padding differs")
