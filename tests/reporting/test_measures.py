"""What a report shows beside accuracies: tables by hand, damage refused, nothing where nothing was measured."""

import copy
import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from synthetic import result

from hpcguard.errors import InputError
from hpcguard.reporting.arms import Arm, check_result
from hpcguard.reporting.measures import (
    alarm_table,
    bound_table,
    claim_picture,
    claim_table,
    corruption_picture,
    corruption_rows,
    corruption_summary,
    curve_picture,
    paired_table,
    quality_table,
)
from hpcguard.reporting.summary import cautions

NAMES = ("fog", "snow")


def mean(value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"mean": value, "low": low, "high": high, **more}


def sections(red: bool = False) -> dict[str, Any]:
    claim = {
        "eps": 8 / 255, "images": 40, "area": {"flagged": 0.2, "random": 0.2, "rest": 0.8},
        "success": {"flagged": 0.3, "random": 0.2, "rest": 0.6, "difference": mean(0.1, 0.05, 0.15), "p_value": 0.012},
        "growth": {"flagged": 0.2, "random": 0.1, "rest": 0.5, "difference": mean(0.1, 0, 0.2),
                   "ratio": mean(2, 1.5, 2.5)},
        "per_area": {"flagged": 1, "rest": 0.6, "ratio": mean(1.6, 1.2, 2)},
    }  # fmt: skip
    share = {"images": 3.0, "of": 100.0, "share": 0.03, "low": 0.01}
    return {
        "trusted": not red,
        "alarms": [
            {"name": "randomness", "measured": {"largest_change": 0.0}, "limit": 1e-4, "red": False, "meaning": "-"},
            {"name": "FGSM beats PGD", "measured": share, "limit": 0.02, "red": red, "meaning": "Judge by Square."},
            {"name": "transfer", "measured": {}, "limit": 0.02, "red": None, "meaning": "-"},
        ],
        "curve": {
            "attack": "pgd-20-margin", "norm": "linf", "of": 100, "radii": [0.0, 8 / 255], "right": [90, 45],
            "accuracy": [0.9, 0.45], "low": [0.8, 0.4], "high": [0.95, 0.5], "seconds": 1.0,
        },
        "corruptions": {
            "name": "CIFAR-10-C", "images": 4, "clean": 0.75, "mean_accuracy": mean(0.5, 0.4, 0.6),
            "corruptions": {name: mean(0.5, 0.4, 0.6, severities=[0.7, 0.6, 0.5, 0.4, 0.3]) for name in NAMES},
        },
        "explanations": {"stability": mean(0.7, 0.6, 0.8, images=4), "deletion": mean(None, None, None, images=0)},
        "vulnerability": {"images": 50, "rows": [claim]},
        "bound": {
            "norm": "linf", "images": 4,
            "all": {"images": 4.0, "right": 3.0, "certified_median": 0.4 / 255, "estimated_median": 3 / 255,
                    "measured_median": 3.7 / 255, "ratio_q50": 0.109},
            "flagged": {"images": 2.0, "right": 2.0, "not_broken": 2.0, "measured_median": None, "gain": 2.9},
            "flagged_constant_share": 0.28,
        },
    }  # fmt: skip


def arm(name: str, red: bool = False) -> Arm:
    return Arm(name, {**result(name), **sections(red)})


def test_tables_say_what_results_say() -> None:
    arms = [arm("baseline"), arm("guided", red=True)]
    for each in arms:
        check_result(each.result, each.name, "x.json")
    alarms = alarm_table(arms)
    assert alarms is not None and alarms.columns == ["alarm", "baseline", "guided"]
    assert alarms.rows == [
        ["randomness", "ok", "ok"],
        ["FGSM beats PGD", "ok 3.0% of 100", "RED 3.0% of 100"],
        ["transfer", "–", "–"],
    ]
    assert "guided is not to be trusted: FGSM beats PGD. Judge by Square." in cautions(arms, None)
    claims = claim_table(arms)
    assert claims is not None
    assert claims.rows[0] == [
        "baseline", "8/255", "40", "30.0%", "20.0%", "+10.0% [+5.0, +15.0]", "0.012", "60.0%", "2.00 [1.50, 2.50]"
    ]  # fmt: skip
    bound = bound_table(arms)
    assert bound is not None
    assert bound.rows[:2] == [
        ["baseline", "all", "3 of 4", "0.4/255", "–", "3/255", "3.7/255", "0.109", "–", "–"],
        ["baseline", "flagged", "2 of 2", "–", "2.90 times", "–", "not broken", "–", "–", "28%"],
    ]
    curve = curve_picture(arms)
    assert curve is not None
    rows = list(csv.DictReader(io.StringIO(curve.csv)))
    assert [(row["arm"], float(row["eps"]), int(row["right"])) for row in rows][:2] == [
        ("baseline", 0.0, 90), ("baseline", 8 / 255, 45)
    ]  # fmt: skip
    for picture in (curve, corruption_picture(arms), claim_picture(arms)):
        assert picture is not None and picture.png.startswith(b"\x89PNG") and picture.csv.count("\n") > 2


def test_what_needs_images_one_by_one() -> None:
    """mCE by its definition; differences on the same images; McNemar's counts."""
    clean = np.array([True, True, True, False])
    right = {"baseline": np.zeros((4, 2, 5), bool), "guided": np.zeros((4, 2, 5), bool)}
    right["baseline"][:2, 0] = right["baseline"][:1, 1] = True  # errors 10 of 20 with fog, 15 of 20 with snow
    right["guided"][:3, 0] = right["guided"][:1, 1] = True  # 5 and 15
    stability = {"baseline": np.array([0.2, 0.4, 0.6, np.nan]), "guided": np.array([0.3, 0.6, 0.6, 1.0])}
    attacked = {"baseline": np.array([True, False, False, False]), "guided": np.array([True, True, True, False])}
    arms = [
        Arm(name, {**result(name), **sections()}, outcomes={"clean": clean, "fgsm": attacked[name]},
            tables={"corruptions": {"right": right[name]}, "quality": {"stability": stability[name]}})
        for name in ("baseline", "guided")
    ]  # fmt: skip
    summary = corruption_summary(arms, "baseline")
    assert summary is not None and summary.rows[0][3].startswith("100.0%")
    assert summary.rows[1][3].startswith(f"{100 * (5 / 10 + 15 / 15) / 2:.1f}%")
    quality = quality_table(arms)
    assert quality is not None and quality.columns == ["figure", "baseline", "guided", "guided less baseline"]
    assert quality.rows[0][3].startswith("+0.10 [")  # of the three images that both have
    assert quality.rows[1][1:] == ["–", "–", "–"]
    paired = paired_table(arms)
    assert paired is not None
    assert [row[:2] + row[3:5] for row in paired.rows] == [
        ["baseline", "clean", "0", "0"], ["baseline", "FGSM", "0", "2"]
    ]  # fmt: skip


def test_nothing_is_shown_where_nothing_was_measured() -> None:
    arms = [Arm(name, {**result(name), "alarms": []}) for name in ("baseline", "guided")]
    assert "guided has no alarms: whether its attacks worked is not known." in cautions(arms, None)
    for make in (alarm_table, bound_table, claim_picture, claim_table, corruption_picture, corruption_rows,
                 curve_picture, paired_table, quality_table):  # fmt: skip
        assert make(arms) is None, make
    assert corruption_summary(arms, "baseline") is None


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield from places(values[key], (*path, key))


def test_damaged_sections_are_refused_or_shown() -> None:
    """At every place something else: one line that names the file, or a table all the same; never a traceback."""
    whole = {**result("guided"), **sections()}
    refused = tried = 0
    for path in places(sections()):
        for other in ("text", -7, None, [], {}, [None]):
            values = copy.deepcopy(whole)
            inner: Any = values
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = other
            values = json.loads(json.dumps(values))
            tried += 1
            try:
                check_result(values, "guided", "x.json")
            except InputError as error:
                refused += 1
                assert str(error).startswith("x.json: damaged, ") and "\n" not in str(error)
                continue
            arms = [Arm("guided", values)]
            for make in (alarm_table, bound_table, claim_table, corruption_rows, quality_table):
                make(arms)
            corruption_summary(arms, "guided")
    assert tried > 500 and refused > 200


@pytest.mark.parametrize("red", [True, False])
def test_trust_and_alarms_agree(red: bool) -> None:
    with pytest.raises(InputError, match="trusted is"):
        check_result({**result("guided"), **sections(red), "trusted": red}, "guided", "x.json")
