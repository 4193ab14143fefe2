"""Means, intervals and paired differences, against scipy and by hand."""

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from hpcguard.sweeps.means import Estimate, as_held, gains, means, pairing

AXES, MEASURES = ("rule", "width"), ("clean", "pgd-4")
ROWS = [
    {"rule": rule, "width": width, "seed": seed, "state": "done", "clean": clean, "pgd-4": robust}
    for rule, width, seed, clean, robust in [
        ("paper", 4, 0, 0.50, 0.30), ("paper", 4, 1, 0.60, 0.20), ("paper", 4, 2, 0.55, 0.28),
        ("none", 4, 0, 0.40, 0.10), ("none", 4, 1, 0.40, 0.14), ("none", 4, 2, 0.40, 0.12),
        ("paper", 8, 0, 0.70, 0.33), ("none", 8, 0, 0.75, 0.31),
    ]
]  # fmt: skip


def test_intervals_are_students() -> None:
    values = (0.3, 0.2, 0.28)
    known = ttest_1samp(values, 0).confidence_interval(0.95)
    found = Estimate(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((known.low, known.high))
    assert math.isnan(Estimate((0.5,)).half) and math.isnan(Estimate(()).mean)


def test_means_are_over_what_is_measured() -> None:
    waiting = {"rule": "paper", "width": 4, "seed": 3, "state": "waiting"}
    lines = means([*ROWS, waiting], AXES, MEASURES)
    assert [(line.values["rule"], line.values["width"], line.count) for line in lines] == [
        ("paper", 4, 3), ("none", 4, 3), ("paper", 8, 1), ("none", 8, 1),
    ]  # fmt: skip
    assert lines[0].estimates["pgd-4"].mean == pytest.approx(0.26)


def test_the_control_has_the_same_seed_and_the_same_other_axes() -> None:
    assert pairing(ROWS, AXES, {"rule": "none"})(ROWS[1]) is ROWS[4]
    assert pairing(ROWS, AXES, {"rule": "none"})(ROWS[6]) is ROWS[7]
    assert pairing(ROWS[:4] + ROWS[6:], AXES, {"rule": "none"})(ROWS[1]) is None  # seed 1 has none
    assert pairing(ROWS, AXES, {"rule": "none", "width": 8})(ROWS[1]) is None
    assert pairing(ROWS[:6], AXES, {"rule": "none"})({"rule": "long", "seed": 2}) is ROWS[5]  # the only one there is


def test_differences_are_paired_by_seed() -> None:
    narrow, wide = gains(ROWS, AXES, MEASURES, {"rule": "none"})
    paper, none = ([row["pgd-4"] for row in ROWS[part]] for part in (slice(3), slice(3, 6)))
    known = ttest_rel(paper, none).confidence_interval(0.95)
    found = narrow.estimates["pgd-4"]
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((known.low, known.high))
    assert wide.count == 1 and wide.estimates["clean"].mean == pytest.approx(-0.05)


def test_the_control_is_told_as_the_table_has_it() -> None:
    rows = [{"masking": "off", "seed": 0, "state": "done", "clean": 0.5}]
    assert as_held({"masking": False}, rows) == {"masking": "off"}  # YAML reads off as a truth value
