"""McNemar's test and the bootstrap against published tables, enumeration and scipy's own bootstrap."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from hpcguard.metrics.paired import bootstrap_interval, compare_paired, mcnemar


@pytest.mark.parametrize(
    ("only_first", "only_second", "exact", "mid_p"),
    [
        (1, 7, 18 / 256, 10 / 256),  # Bentur et al. 2009, table 1 of Fagerland et al. 2013: 0.0703 and 0.0391
        (25, 2, 5.65e-06, 3.03e-06),  # Ezra et al. 2010: P(X <= 2) of 27 doubled, and less P(X = 2)
        (3, 3, 1.0, 1 - 0.5 * 20 / 64),
        (0, 1, 1.0, 0.5),
        (0, 0, 1.0, 1.0),
    ],
)
def test_mcnemar_on_published_tables(only_first: int, only_second: int, exact: float, mid_p: float) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx((exact, mid_p), rel=2e-3)
    assert mcnemar(only_second, only_first) == pytest.approx((exact, mid_p), rel=2e-3)


@pytest.mark.parametrize("discordant", range(1, 9))
def test_exact_p_by_enumerating_all_signs(discordant: int) -> None:
    """Under the null hypothesis every image on which they disagree is a fair coin."""
    heads = [sum(coins) for coins in product((0, 1), repeat=discordant)]
    for found in range(discordant + 1):
        distance = abs(found - discordant / 2)
        expected = np.mean([abs(one - discordant / 2) >= distance for one in heads])
        assert mcnemar(found, discordant - found)[0] == pytest.approx(expected)


def test_bootstrap_is_scipys() -> None:
    generator = np.random.default_rng(1)
    first = generator.random(400) < 0.55
    second = np.where(generator.random(400) < 0.15, ~first, first)
    found = compare_paired(first, second)
    change = second.astype(float) - first
    theirs = stats.bootstrap((change,), np.mean, method="percentile", rng=2, n_resamples=9999, batch=1000)
    assert found.difference == pytest.approx(change.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.004)
    assert found.first == int(((first == 1) & (second == 0)).sum())


def test_bootstrap_covers_the_truth() -> None:
    """95% intervals of a known difference, 0.25 - 0.15, hold it in about 95 of 100 samples."""
    generator = np.random.default_rng(3)
    held = 0
    for seed in range(300):
        only_first, only_second, _ = generator.multinomial(200, (0.15, 0.25, 0.6))
        low, high = bootstrap_interval(only_first, only_second, 200, seed, 999)
        held += low <= 0.1 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_equal_models_and_one_image() -> None:
    same = compare_paired(np.array([True, False]), np.array([True, False]))
    assert (same.difference, same.low, same.high, same.exact, same.mid_p) == (0, 0, 0, 1, 1)
    one = compare_paired(np.array([False]), np.array([True]))
    assert (one.difference, one.low, one.high, one.exact) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (np.ones(3, bool), np.ones(4, bool)),
        (np.ones(0, bool), np.ones(0, bool)),
        (np.ones(3), np.ones(3, bool)),
        (np.ones((2, 2), bool), np.ones((2, 2), bool)),
    ],
)
def test_outcomes_of_other_images_are_refused(first: np.ndarray, second: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two bool"):
        compare_paired(first, second)
