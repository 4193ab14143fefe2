"""The tidy table as CSV."""

import csv

import pytest

from hpcguard.errors import InputError
from hpcguard.sweeps.axes import options_of
from hpcguard.sweeps.table import attacks_in, columns, to_csv, units

ROWS = [
    {"rule": "paper", "width": [4], "seed": 0, "state": "waiting"},
    {"rule": "none", "width": None, "seed": 0, "state": "done", "refine_seconds": 3.5, "weights": "models/a",
     "validation_clean": 0.7, "left_out": 0, "clean": 1 / 3, "pgd-4": 0.1},
]  # fmt: skip


def test_columns_and_what_is_measured() -> None:
    assert columns(ROWS)[:4] == ["rule", "width", "seed", "state"]
    assert columns(ROWS)[-2:] == ["refine_seconds", "weights"]  # last, though the first row had them before the rest
    assert attacks_in(ROWS, ["rule", "width"]) == ["clean", "pgd-4"]
    assert units(ROWS, ["rule", "width"])["pgd-4"] == "share of images"


def test_csv_has_every_figure_unrounded_and_nothing_where_there_is_nothing() -> None:
    waiting, done = csv.DictReader(to_csv(ROWS).splitlines())
    assert (waiting["width"], waiting["clean"], done["width"]) == ("[4]", "", "")
    assert [float(done[name]) for name in ("clean", "pgd-4")] == [1 / 3, 0.1]


@pytest.mark.parametrize("name", ["weights", "state", "clean", "seed"])
def test_an_axis_is_not_called_as_a_column_is(name: str) -> None:
    with pytest.raises(InputError, match=f"axes.{name}: the table has a column {name}; rename the axis"):
        options_of(name, {"a": {}, "b": {"refinement.epochs": 1}}, f"axes.{name}")
