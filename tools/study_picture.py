"""Print the table of docs/study.md and draw its picture: what each kind of training gains over plain PGD training.

    python tools/study_picture.py docs/results/study/table.h5 docs/study.png

Reads the table that `hpcguard sweep configs/sweeps/study.yaml` writes. Means over seeds with 95% intervals by Student's
t; differences are from PGD training with the same seed. The picture shows the arms that are trained on attacked images.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcguard.errors import InputError
from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.sweep_plots import forest_figure
from hpcguard.reporting.sweep_tables import Column, Sheet, as_table
from hpcguard.reporting.tables import to_markdown
from hpcguard.runs import publish
from hpcguard.store.tidy import read_tidy
from hpcguard.sweeps.means import Estimate, gains, means

PARTS = ("masking", "sensitivity")
AXES = (*PARTS, "adversarial", "name")
CONTROL = {"masking": "off", "sensitivity": "off", "adversarial": "on", "name": None}
COMPARED = ("clean", "autoattack")
TITLES = {
    "fgsm": "FGSM",
    "trades": "TRADES",
    "pgd-and-clean": "PGD + clean images",
    "random": "PGD + masking + sensitivity, random segments",
    "paper": "PGD + masking + sensitivity, the paper's segments",
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    columns, _, _ = read_tidy(path)
    if missing := [name for name in (*AXES, *COMPARED) if name not in columns]:
        raise InputError(f"{path}: no column {missing[0]}; give the table of configs/sweeps/study.yaml")
    names = list(columns)
    return [
        {name: _value(value) for name, value in zip(names, values, strict=True)}
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


def _value(value: Any) -> Any:
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def title(values: Mapping[str, Any]) -> str:
    """What an arm is called."""
    first = "PGD" if values["adversarial"] == "on" else "standard"
    return TITLES.get(values["name"]) or " + ".join([first, *(part for part in PARTS if values[part] == "on")])


def arms(rows: list[dict[str, Any]], measures: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Estimates and differences from PGD training by arm; the control has no differences."""
    found = {title(line.values): line.estimates for line in means(rows, AXES, measures)}
    return found, {title(line.values): line.estimates for line in gains(rows, AXES, COMPARED, CONTROL) if line.count}


def markdown(found: Mapping[str, Any], differences: Mapping[str, Any], measures: tuple[str, ...]) -> str:
    columns = [Column(attack_title(name)) for name in measures]
    columns += [Column(f"{attack_title(name)}, difference", signed=True) for name in COMPARED]
    none: dict[str, Estimate] = {}
    lines = [
        ([name], [*of.values(), *(differences.get(name, none).get(each, Estimate(())) for each in COMPARED)])
        for name, of in found.items()
    ]
    return to_markdown(as_table(Sheet("study", "", ["training"], columns, lines), str))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table.h5 of the sweep")
    parser.add_argument("picture", type=Path, nargs="?", help="PNG to write")
    arguments = parser.parse_args()
    try:
        rows = read_rows(arguments.table)
    except InputError as error:
        print(f"study_picture: {error}", file=sys.stderr)
        return 2
    measures = tuple(name for name in ("clean", "corrupted", "pgd-20", "autoattack") if rows[0].get(name) is not None)
    found, differences = arms(rows, measures)
    print(markdown(found, differences, measures), end="")
    drawn = {name: of for name, of in differences.items() if not name.startswith("standard")}
    if arguments.picture and drawn:
        figure = forest_figure(list(drawn), {each: [of[each] for of in drawn.values()] for each in COMPARED})
        with publish(arguments.picture) as temporary:
            temporary.write_bytes(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
