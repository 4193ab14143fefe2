"""The tidy table as CSV."""

import csv

import pytest

from hpcguard.errors import InputError
from hpcguard.sweeps.axes import options_of
from hpcguard.sweeps.table import accuracies_in, columns, figures_of, qualities_in, to_csv, units

ROWS = [
    {"rule": "paper", "width": [4], "seed": 0, "state": "waiting"},
    {"rule": "none", "width": None, "seed": 0, "state": "done", "refine_seconds": 3.5, "weights": "models/a",
     "validation_clean": 0.7, "left_out": 0, "clean": 1 / 3, "pgd-4": 0.1},
]  # fmt: skip


def test_columns_and_what_is_measured() -> None:
    assert columns(ROWS)[:4] == ["rule", "width", "seed", "state"]
    assert columns(ROWS)[-2:] == ["refine_seconds", "weights"]  # last, though the first row had them before the rest
    assert accuracies_in(ROWS, ["rule", "width"]) == ["clean", "pgd-4"]
    assert units(ROWS, ["rule", "width"])["pgd-4"] == "share of images"


RESULT = {
    "attacks": {name: {"accuracy": share} for name, share in (("clean", 0.9), ("fgsm", 0.5), ("pgd-4", 0.4))},
    "worst": {"accuracy": 0.3}, "corruptions": {"mean_accuracy": {"mean": 0.7}}, "explanation_jaccard5": None,
    "explanations": {"stability": {"mean": 0.25}, "deletion": {"mean": None}}, "alarms": [{"red": True}, {"red": None}],
    "seconds": 4.0,
}  # fmt: skip


def test_figures_of_a_result() -> None:
    found = figures_of(RESULT)
    row = {"rule": "paper", "seed": 0, "state": "done", **found}
    accuracies = {"clean": 0.9, "corrupted": 0.7, "fgsm": 0.5, "pgd-4": 0.4, "all-attacks": 0.3}
    assert list(accuracies) == accuracies_in([row], ["rule"])  # the one to judge by last
    assert {name: row[name] for name in accuracies} == accuracies
    assert qualities_in([row], ["rule"]) == ["explanation_stability"]  # nothing is known of the others
    assert (row["explanation_stability"], row["red_alarms"], row["evaluate_seconds"]) == (0.25, 1, 4.0)


def test_with_one_attack_there_is_no_column_of_all() -> None:
    attacks = {name: RESULT["attacks"][name] for name in ("clean", "fgsm")}
    assert list(figures_of({**RESULT, "attacks": attacks, "corruptions": None}))[:3] == ["clean", "fgsm", "red_alarms"]


def test_csv_has_every_figure_unrounded_and_nothing_where_there_is_nothing() -> None:
    waiting, done = csv.DictReader(to_csv(ROWS).splitlines())
    assert (waiting["width"], waiting["clean"], done["width"]) == ("[4]", "", "")
    assert [float(done[name]) for name in ("clean", "pgd-4")] == [1 / 3, 0.1]


@pytest.mark.parametrize(
    "name", ["weights", "state", "clean", "seed", "fgsm", "pgd-20", "apgd-ce-square", "all-attacks"]
)
def test_an_axis_is_not_called_as_a_column_is(name: str) -> None:
    with pytest.raises(InputError, match=f"axes.{name}: the table has columns of such names; rename the axis"):
        options_of(name, {"a": {}, "b": {"refinement.epochs": 1}}, f"axes.{name}")
