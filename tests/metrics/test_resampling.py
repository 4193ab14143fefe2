"""The bootstrap against scipy's and its closed-form variance; the exact test against McNemar's and enumeration."""

import subprocess
import sys
from itertools import product

import numpy as np
import pytest
from scipy import stats

from hpcguard.metrics.resampling import (
    bootstrap_means,
    compare_figures,
    interval,
    matched_test,
    mean_with_interval,
    summarise_figures,
)


def test_the_interval_is_scipys() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    own = mean_with_interval(values, draws=20000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="percentile", vectorized=True)
    assert own["mean"] == pytest.approx(values.mean()) and own["images"] == 80
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert own["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert own["high"] == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


def test_resampled_means_have_the_variance_of_a_mean_and_are_paired() -> None:
    values = np.random.default_rng(1).normal(size=(2, 50))
    means = bootstrap_means(np.stack([*values, values[0] - values[1]]), draws=20000)
    assert means.shape == (3, 20000)
    assert means.var(axis=1)[:2] == pytest.approx(values.var(axis=1) / 50, rel=0.05)
    assert means[2] == pytest.approx(means[0] - means[1])


def test_many_images_are_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(30.0)
    whole = bootstrap_means(values, draws=100, seed=4)
    monkeypatch.setattr("hpcguard.metrics.resampling.BLOCK", 70)
    assert bootstrap_means(values, draws=100, seed=4) == pytest.approx(whole)


def test_images_without_a_value_do_not_count() -> None:
    values = np.array([1.0, np.nan, 3.0, 1.0, np.nan])
    assert mean_with_interval(values) == mean_with_interval(values[[0, 2, 3]])
    assert mean_with_interval(np.array([np.nan])) == {"mean": None, "low": None, "high": None, "images": 0}
    assert interval(np.array([0.0, np.nan])) == {"low": None, "high": None}


def test_summary_and_paired_comparison() -> None:
    generator = np.random.default_rng(1)
    base = generator.normal(size=100)
    before = {"stability": base, "attacked_spearman": base.copy(), "flagged_share": np.full(100, np.nan)}
    after = {"stability": base + 0.1 + 0.01 * generator.normal(size=100), "attacked_spearman": base.copy()}
    after["attacked_spearman"][:60] = np.nan
    summary = summarise_figures(before)
    assert summary["stability"]["mean"] == pytest.approx(base.mean()) and summary["flagged_share"]["images"] == 0
    found = compare_figures(before, after)
    assert list(found) == ["stability", "attacked_spearman"]
    # Paired: far narrower than the spread of either side.
    change = found["stability"]["difference"]
    assert change["mean"] == pytest.approx(0.1, abs=0.005) and change["high"] - change["low"] < 0.01
    assert found["attacked_spearman"]["difference"] == {"mean": 0, "low": 0, "high": 0, "images": 40}
    assert found["attacked_spearman"]["before"] == pytest.approx(base[60:].mean())
    with pytest.raises(ValueError, match="stability: 100 images before, 99 after"):
        compare_figures(before, {"stability": base[1:]})


def test_one_random_draw_is_mcnemars_exact_test() -> None:
    generator = np.random.default_rng(2)
    for share in (0.3, 0.5, 0.7):
        chosen, random = generator.random(40) < share, generator.random(40) < 0.5
        only_chosen, only_random = int((chosen & ~random).sum()), int((~chosen & random).sum())
        expected = stats.binomtest(only_chosen, only_chosen + only_random).pvalue
        assert matched_test(chosen, random[None]) == pytest.approx(expected)


def test_several_draws_are_all_ways_to_choose_one_of_each_image() -> None:
    outcomes = np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1]], bool)  # the chosen one first
    sums = np.array(
        [sum(outcomes[row, image] for image, row in enumerate(rows)) for rows in product(range(3), repeat=5)]
    )
    seen = outcomes[0].sum()
    expected = min(1, 2 * min((sums >= seen).mean(), (sums <= seen).mean()))
    assert expected < 1
    assert matched_test(outcomes[0], outcomes[1:]) == pytest.approx(expected)


def test_what_is_like_the_random_ones_is_seldom_found_to_differ() -> None:
    generator = np.random.default_rng(3)
    hardness = generator.random(60)
    p_values = []
    for _ in range(400):
        outcomes = generator.random((4, 60)) < hardness
        p_values.append(matched_test(outcomes[0], outcomes[1:]))
    assert np.mean(np.array(p_values) < 0.05) <= 0.07
    assert np.mean(np.array(p_values) < 0.5) > 0.25  # and not because it never finds anything


def test_figures_of_a_report_import_no_torch() -> None:
    modules = ", ".join(f"hpcguard.metrics.{name}" for name in ("resampling", "corruption", "vulnerability_summary"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
