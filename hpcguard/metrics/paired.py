"""Two models on the same images: McNemar's test and the interval of the difference of their accuracies."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

RESAMPLES = 9999


@dataclass(frozen=True)
class Paired:
    """first, second: images that only this model gets right; difference: accuracy of the second less the first's, with
    a 95% interval from low to high; exact and mid_p: two-sided p values of McNemar's test."""

    first: int
    second: int
    of: int
    difference: float
    low: float
    high: float
    exact: float
    mid_p: float


def compare_paired(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Paired:
    """Compare outcomes of the same images, bool [N], in the same order. Raises ValueError for other arrays."""
    if first.shape != second.shape or first.ndim != 1 or not len(first) or first.dtype != bool or second.dtype != bool:
        raise ValueError(
            f"outcomes: expected two bool [N] of the same images, got {first.dtype} {list(first.shape)} and "
            f"{second.dtype} {list(second.shape)}"
        )
    only_first, only_second, of = int((first & ~second).sum()), int((second & ~first).sum()), len(first)
    low, high = bootstrap_interval(only_first, only_second, of, seed)
    exact, mid_p = mcnemar(only_first, only_second)
    return Paired(only_first, only_second, of, (only_second - only_first) / of, low, high, exact, mid_p)


def mcnemar(only_first: int, only_second: int) -> tuple[float, float]:
    """Exact conditional and mid-p value, two-sided (McNemar 1947; Fagerland et al. 2013, doi 10.1186/1471-2288-13-91).

    The exact test never rejects too often; the mid-p test is nearer to its level, and what Fagerland et al. recommend.
    """
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0, 1.0
    exact = float(binomtest(only_first, discordant, 0.5).pvalue)
    point = float(binom.pmf(only_first, discordant, 0.5))
    return exact, exact - (point / 2 if only_first == only_second else point)


def bootstrap_interval(
    only_first: int, only_second: int, of: int, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95% percentile bootstrap interval of (only_second - only_first) / of, images drawn again with replacement.

    Where the models disagree on no image it is 0 to 0, which says nothing of other images.
    """
    # Resampling N outcomes of -1, 0 and 1 is one multinomial draw of their counts: the same distribution, without
    # the N x resamples indices of scipy.stats.bootstrap.
    shares = np.array([only_first, only_second, of - only_first - only_second]) / of
    counts = np.random.default_rng(seed).multinomial(of, shares, size=resamples)
    low, high = np.quantile((counts[:, 1] - counts[:, 0]) / of, (0.025, 0.975))
    return float(low), float(high)
