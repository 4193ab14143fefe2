"""Deletion and insertion curves (RISE, Petsiuk et al. 2018), segment by segment. B images, at most S segments."""

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.explain import Predict, hidden_fill

Fill = Tensor | float | str


def order_by_coefficient(coefficients: np.ndarray) -> np.ndarray:
    """Segments by descending coefficient, ties by index: int64 [B, S] with -1 at the end for NaN padding."""
    order = np.argsort(-coefficients, axis=1, kind="stable")  # numpy sorts NaN last
    return np.where(np.isnan(np.take_along_axis(coefficients, order, axis=1)), -1, order)


def deletion_curve(
    predict: Predict,
    images: Tensor,
    segments: np.ndarray | Tensor,
    order: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    fill: Fill = "mean",
    batch_size: int = 256,
) -> np.ndarray:
    """Probability of `target` [B] as segments [B, H, W] are hidden one after another: float64 [B, S + 1].

    order: segments from the first hidden to the last, [B, S]; after the -1 at its end the curve keeps its last value,
    and segments that it leaves out stay as they are. fill: what a hidden pixel shows, broadcast to [B, C, H, W], a
    constant, or "mean" for the segment's mean as in explain_batch. predict: probabilities [n, K] of at most
    batch_size copies, of several images.
    """
    return _curve(predict, images, segments, order, target, fill, batch_size, insert=False)


def insertion_curve(
    predict: Predict,
    images: Tensor,
    segments: np.ndarray | Tensor,
    order: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    fill: Fill = "mean",
    batch_size: int = 256,
) -> np.ndarray:
    """As deletion_curve, but from an image that is all hidden to one whose segments in `order` are all shown."""
    return _curve(predict, images, segments, order, target, fill, batch_size, insert=True)


def area_under_curve(curve: np.ndarray, num_segments: np.ndarray) -> np.ndarray:
    """Area [B] under curves [B, S + 1] by trapezoids, the axis 0..num_segments[i] scaled to [0, 1] for each image."""
    counts, steps = np.asarray(num_segments, np.int64), curve.shape[1] - 1
    if counts.shape != curve.shape[:1] or counts.min() < 1 or counts.max() > steps:
        raise ValueError(f"num_segments: expected {len(curve)} counts from 1 to {steps}, got {num_segments}")
    trapezoids = (curve[:, :-1] + curve[:, 1:]) / 2
    return np.where(np.arange(steps) < counts[:, None], trapezoids, 0).sum(1) / counts


@torch.inference_mode()
def _curve(
    predict: Predict,
    images: Tensor,
    segments: np.ndarray | Tensor,
    order: np.ndarray | Tensor,
    target: np.ndarray | Tensor,
    fill: Fill,
    batch_size: int,
    insert: bool,
) -> np.ndarray:
    maps, ranked, labels = (
        torch.as_tensor(each, device=images.device).to(torch.int64) for each in (segments, order, target)
    )
    _check(images, maps, ranked, labels)
    hidden = (
        fill.expand_as(images) if isinstance(fill, Tensor) else hidden_fill(images, maps, int(maps.max()) + 1, fill)
    )
    before, after = (hidden, images) if insert else (images, hidden)
    step_BHW, counts = _step_of_pixels(maps, ranked), (ranked >= 0).sum(1)

    # The copies of all images in one list: whose each is, and how many of its segments have changed.
    owner = torch.repeat_interleave(counts + 1)
    last = (counts + 1).cumsum(0) - 1
    first = last - counts
    changed = torch.arange(len(owner), device=images.device) - first[owner]
    probability = torch.zeros(len(owner), dtype=torch.float64, device=images.device)
    for start in range(0, len(owner), batch_size):
        rows = slice(start, start + batch_size)
        of, upto = owner[rows], changed[rows, None, None]
        answer = predict(torch.where((step_BHW[of] < upto)[:, None], after[of], before[of]))
        probability[rows] = answer.gather(1, labels[of, None])[:, 0].double()
    if not probability.isfinite().all():
        bad = owner[~probability.isfinite()].unique().tolist()
        raise ValueError(f"predict: NaN or infinite probabilities for images {bad[:5]} of the batch")

    steps = torch.arange(ranked.shape[1] + 1, device=images.device)
    return probability[torch.minimum(first[:, None] + steps, last[:, None])].cpu().numpy()


def _step_of_pixels(maps: Tensor, ranked: Tensor) -> Tensor:
    """Place of each pixel's segment in the order, int64 [B, H, W]; S for segments that the order leaves out."""
    size, most = ranked.shape
    # One column more than there are segments takes what -1 points to.
    width = max(int(maps.max()) + 1, most)
    place = torch.full((size, width + 1), most, device=maps.device)
    column = torch.where(ranked < 0, width, ranked)
    place.scatter_(1, column, torch.arange(most, device=maps.device).expand(size, -1))
    return place.gather(1, maps.flatten(1)).reshape(maps.shape)


def _check(images: Tensor, maps: Tensor, ranked: Tensor, labels: Tensor) -> None:
    size = len(images)
    if maps.shape != (size, *images.shape[2:]) or len(ranked) != size or ranked.ndim != 2 or labels.shape != (size,):
        shapes = [tuple(each.shape) for each in (images, maps, ranked, labels)]
        raise ValueError(f"expected images [B, C, H, W], segments [B, H, W], order [B, S], target [B], got {shapes}")
    count = maps.flatten(1).max(1).values + 1
    ascending = ranked.sort(1).values
    twice = (ascending.diff(dim=1) == 0) & (ascending[:, 1:] >= 0)
    ends_early = (ranked[:, :-1] < 0) & (ranked[:, 1:] >= 0)
    if twice.any() or ends_early.any() or (ranked >= count[:, None]).any() or (ranked < -1).any():
        raise ValueError("order: expected each image's segments at most once, then only -1")
