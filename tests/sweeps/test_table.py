"""Means, intervals and paired differences, against scipy and by hand."""

import csv
import math

import pytest
from scipy.stats import ttest_1samp

from hpcguard.sweeps.table import attacks_in, control_of, interval, to_csv, to_markdown

ROWS = [
    {"rule": rule, "width": width, "seed": seed, "state": "done", "clean": clean, "pgd-4": robust, "left_out": 0}
    for rule, width, seed, clean, robust in [
        ("paper", 4, 0, 0.50, 0.30), ("paper", 4, 1, 0.60, 0.20), ("paper", 4, 2, 0.55, 0.28),
        ("none", 4, 0, 0.40, 0.10), ("none", 4, 1, 0.40, 0.14), ("none", 4, 2, 0.40, 0.12),
        ("paper", 8, 0, 0.70, 0.33), ("none", 8, 0, 0.75, 0.31),
    ]
]  # fmt: skip


def test_intervals_are_students() -> None:
    values = [0.3, 0.2, 0.28]
    mean, half = interval(values)
    known = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((known.low, known.high))
    assert math.isnan(interval([0.5])[1])


def test_the_control_has_the_same_seed_and_the_same_other_axes() -> None:
    axes = ("rule", "width")
    assert control_of(ROWS[1], {"rule": "none"}, ROWS, axes) is ROWS[4]
    assert control_of(ROWS[6], {"rule": "none"}, ROWS, axes) is ROWS[7]
    assert control_of(ROWS[1], {"rule": "none"}, ROWS[:4] + ROWS[6:], axes) is None  # seed 1 has none
    assert control_of(ROWS[1], {"rule": "none", "width": 8}, ROWS, axes) is None


def test_the_tables() -> None:
    text = to_markdown(ROWS, ["rule", "width"], {"rule": "none"})
    assert "8 of 8 cells are measured" in text
    assert attacks_in(ROWS, ["rule", "width"]) == ["clean", "pgd-4"]
    means, gains = text.split("Differences from the control (rule=none)")
    assert "| none | 8 | 1 | 75.0 | 31.0 |" in means
    assert "| paper | 4 | 3 | 55.0 ± 12.4 | 26.0 ± 13.1 |" in means
    # pairs: 20, 6 and 16 points: mean 14, standard deviation 7.21, t 4.303, root of 3
    assert "| +14.0 ± 17.9 |" in gains
    assert "| paper | 8 | 1 | -5.0 | +2.0 |" in gains
    assert "| none |" not in gains
    read = list(csv.DictReader(to_csv(ROWS).splitlines()))
    assert [float(row["pgd-4"]) for row in read] == [row["pgd-4"] for row in ROWS]


def test_cells_that_are_not_measured_are_counted_not_averaged() -> None:
    waiting = {"rule": "paper", "width": 4, "seed": 3, "state": "waiting"}
    text = to_markdown([*ROWS, waiting], ["rule", "width"], {"rule": "none"})
    assert "8 of 9 cells are measured" in text
    assert "| paper | 4 | 3 | 55.0 ± 12.4 |" in text
    assert "left_out" in to_markdown([{**ROWS[0], "left_out": 2}], ["rule"], {})
