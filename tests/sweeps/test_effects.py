"""Main effects against averages of whole arrays, and what stands in their way."""

import itertools
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from hpcguard.sweeps.effects import factors, main_effects

A, B, SEEDS = ("off", "weak", "strong"), (16, 64), (0, 1, 2, 3)


def grid(values: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"a": a, "b": b, "seed": seed, "state": "done", "clean": float(values[place])}
        for place, (a, b, seed) in zip(np.ndindex(values.shape), itertools.product(A, B, SEEDS), strict=True)
    ]


def interval(per_seed: np.ndarray) -> tuple[float, float]:
    half = t.ppf(0.975, len(per_seed) - 1) * per_seed.std(ddof=1) / np.sqrt(len(per_seed))
    return float(per_seed.mean()), float(half)


VALUES = np.random.default_rng(0).uniform(0.2, 0.8, (len(A), len(B), len(SEEDS)))


def test_a_whole_grid_gives_averages_over_the_other_axis_seed_by_seed() -> None:
    first, second = main_effects(grid(VALUES), ["a", "b"], ["clean"], {"b": 64})
    assert (first.factor, second.factor) == (("a",), ("b",)) and first.balanced and second.balanced
    assert (first.reference, second.reference) == (0, 1)  # the first level; the control's
    for place, level in enumerate(first.levels):
        assert level.cells == len(B) * len(SEEDS)
        assert (level.mean.mean, level.mean.half) == pytest.approx(interval(VALUES[place].mean(0)))
    for place, level in enumerate(first.levels[1:], 1):
        assert (level.gain.mean, level.gain.half) == pytest.approx(interval((VALUES[place] - VALUES[0]).mean(0)))
    assert second.levels[1].gain.count == 0
    difference = (VALUES[:, 0] - VALUES[:, 1]).mean(0)
    assert (second.levels[0].gain.mean, second.levels[0].gain.half) == pytest.approx(interval(difference))


def test_a_missing_cell_does_not_tilt_the_levels() -> None:
    """With an effect of b alone, a has none, whichever of its cells are missing."""
    values = np.broadcast_to(np.array([0.2, 0.6])[None, :, None], VALUES.shape)
    rows = [row for row in grid(values) if (row["a"], row["b"], row["seed"]) != ("weak", 64, 2)]
    (effect, _) = main_effects(rows, ["a", "b"], ["clean"], {})
    means = [level.mean.mean for level in effect.levels]
    assert means == pytest.approx([means[0]] * 3)
    assert [level.cells for level in effect.levels] == [7, 7, 7]
    assert [level.gain.mean for level in effect.levels[1:]] == pytest.approx([0, 0])


def test_levels_without_a_cell_in_common_are_said_to_be_unbalanced() -> None:
    rows = [row for row in grid(VALUES) if not (row["a"] == "off" and row["b"] == 64)]
    rows = [row for row in rows if not (row["a"] == "weak" and row["b"] == 16)]
    effect = main_effects(rows, ["a", "b"], ["clean"], {})[0]
    assert not effect.balanced
    off, weak, strong = effect.levels
    assert off.mean.mean == pytest.approx(VALUES[0, 0].mean())
    assert weak.gain.count == 0  # it shares no cell with the reference
    assert (strong.gain.mean, strong.gain.half) == pytest.approx(interval(VALUES[2, 0] - VALUES[0, 0]))


def test_axes_that_move_together_are_one_factor() -> None:
    rows = [{**row, "c": A.index(row["a"]), "d": row["a"] == "off", "e": 1} for row in grid(VALUES)]
    assert factors(rows, ["a", "b", "c", "d", "e"]) == [("a", "c"), ("b",)]
    effect = main_effects(rows, ["a", "b", "c", "d", "e"], ["clean"], {"c": 2})[0]
    assert effect.levels[effect.reference].values == ("strong", 2) and effect.balanced


def test_named_cells_stand_outside_the_grid() -> None:
    named = [{"a": "off", "name": "fgsm", "x": 1, "seed": seed, "state": "done", "clean": 0.99} for seed in SEEDS]
    rows = [{"name": None, "x": None, **row} for row in grid(VALUES)]
    assert main_effects([*rows, *named], ["a", "b", "name", "x"], ["clean"], {}) == main_effects(
        grid(VALUES), ["a", "b"], ["clean"], {}
    )


def test_nothing_to_compare() -> None:
    one = [row for row in grid(VALUES) if row["a"] == "off" and row["b"] == 16]
    assert main_effects(one, ["a", "b"], ["clean"], {}) == []
    assert main_effects([{"a": a, "seed": 0, "state": "waiting"} for a in A], ["a"], ["clean"], {}) == []


def test_one_seed_has_no_interval() -> None:
    rows = [row for row in grid(VALUES) if row["seed"] == 0]
    level = main_effects(rows, ["a", "b"], ["clean"], {})[0].levels[1]
    assert level.gain.mean == pytest.approx((VALUES[1] - VALUES[0])[:, 0].mean()) and np.isnan(level.gain.half)
