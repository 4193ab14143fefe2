"""Figures of images with bootstrap intervals, alone and paired; an exact test for one choice against random ones."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

DRAWS = 2000
BLOCK = 2**22  # weights held at once


def bootstrap_means(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Means over the last axis in each of `draws` resamples of its N images, float64 [..., draws]; the same images for
    everything before that axis, so that whatever is computed from several of the means is paired."""
    return np.concatenate([values @ weights.T for weights in _weights(values.shape[-1], draws, seed)], axis=-1)


def mean_with_interval(values: np.ndarray, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Mean of an image's values [N], its 95% percentile interval (Efron 1979) and the number of images; NaN, where an
    image has no value, does not count, and with none left all is None."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "images": 0}
    return {"mean": float(known.mean()), **interval(bootstrap_means(known, draws, seed)), "images": len(known)}


def summarise_figures(figures: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, dict[str, Any]]:
    """mean_with_interval of every figure, [N] each."""
    return {name: mean_with_interval(values, seed=seed) for name, values in figures.items()}


def compare_figures(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Mean before, mean after and the paired difference with its interval, over images that have both values.

    Raises ValueError for figures of other images.
    """
    out = {}
    for name in before.keys() & after.keys():
        if before[name].shape != after[name].shape:
            raise ValueError(f"{name}: {len(before[name])} images before, {len(after[name])} after")
        both = ~np.isnan(before[name]) & ~np.isnan(after[name])
        change = mean_with_interval(after[name][both] - before[name][both], seed=seed)
        sides = {
            side: float(values[name][both].mean()) if both.any() else None
            for side, values in (("before", before), ("after", after))
        }
        out[name] = {**sides, "difference": change}
    return {name: out[name] for name in before if name in out}


def interval(resampled: np.ndarray) -> dict[str, float | None]:
    """The middle 95% of resampled figures [draws]; None where one of them is not finite."""
    if not np.isfinite(resampled).all():
        return {"low": None, "high": None}
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"low": float(low), "high": float(high)}


def matched_test(chosen: np.ndarray, random: np.ndarray) -> float:
    """Exact two-sided p-value of one yes or no an image, bool [N], against R random ones, bool [R, N].

    Where the chosen one is like the random ones, it is any of an image's R + 1 outcomes alike: given their k successes,
    a success with probability k / (R + 1). Their sum over images is then Poisson-binomial, and p twice its smaller
    tail. With R = 1 that is McNemar's exact test.
    """
    successes = chosen.astype(int) + random.sum(0)
    distribution = np.ones(1)
    for probability in successes / (len(random) + 1):
        distribution = np.convolve(distribution, [1 - probability, probability])
    seen = int(chosen.sum())
    return float(min(1.0, 2 * min(distribution[: seen + 1].sum(), distribution[seen:].sum())))


def _weights(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, over their number, [some of the draws, count]."""
    generator = np.random.default_rng(seed)
    at_once = max(1, BLOCK // count)
    for start in range(0, draws, at_once):
        drawn = generator.integers(0, count, (min(at_once, draws - start), count))
        rows = drawn + count * np.arange(len(drawn))[:, None]
        yield np.bincount(rows.ravel(), minlength=drawn.size).reshape(drawn.shape) / count
