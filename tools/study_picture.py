"""Draw the picture of docs/study.md: what each kind of adversarial training gains over plain PGD training.

    python tools/study_picture.py docs/results/study/table.h5 docs/study.png

Reads the table that `hpcguard sweep configs/sweeps/study.yaml` writes.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from hpcguard.errors import InputError
from hpcguard.reporting.sweep_plots import forest_figure
from hpcguard.runs import publish
from hpcguard.store.tidy import read_tidy
from hpcguard.sweeps.means import gains

PARTS = ("masking", "sensitivity")
AXES = (*PARTS, "adversarial", "name")
CONTROL = {"masking": "off", "sensitivity": "off", "adversarial": "on", "name": None}
MEASURES = ("clean", "autoattack")
TITLES = {
    "fgsm": "FGSM",
    "trades": "TRADES",
    "pgd-and-clean": "PGD + clean images",
    "random": "PGD + masking + sensitivity, random segments",
    "paper": "PGD + masking + sensitivity, the paper's segments",
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    columns, _, _ = read_tidy(path)
    names = list(columns)
    return [
        {name: _value(value) for name, value in zip(names, values, strict=True)}
        for values in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]


def _value(value: Any) -> Any:
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def title(values: dict[str, Any]) -> str:
    """What an adversarially trained arm is called."""
    return TITLES.get(values["name"]) or " + ".join(["PGD", *(part for part in PARTS if values[part] == "on")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="table.h5 of the sweep")
    parser.add_argument("picture", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    try:
        rows = [row for row in read_rows(arguments.table) if row.get("adversarial") == "on"]
    except InputError as error:
        print(f"study_picture: {error}", file=sys.stderr)
        return 2
    lines = [line for line in gains(rows, AXES, MEASURES, CONTROL) if line.count]
    if not lines:
        print(f"study_picture: {arguments.table}: no arm of configs/sweeps/study.yaml and its control are measured")
        return 2
    named = {title(line.values): line.estimates for line in lines}
    for name, found in named.items():
        told = (f"{each} {100 * found[each].mean:+.1f} ± {100 * found[each].half:.1f}" for each in MEASURES)
        print(f"{name}: {', '.join(told)}")
    with publish(arguments.picture) as temporary:
        figure = forest_figure(list(named), {each: [found[each] for found in named.values()] for each in MEASURES})
        temporary.write_bytes(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
