"""The study's page says what its raw figures say."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

from hpcguard.store.tidy import read_tidy

ROOT = Path(__file__).parents[1]
STUDY, RAW = ROOT / "docs/study.md", ROOT / "docs/results/study"
ON_OFF = {"on": True, "off": False}


def raw_rows() -> list[dict[str, str]]:
    return list(csv.DictReader((RAW / "table.csv").read_text().splitlines()))


def select(masking: bool, sensitivity: bool, adversarial: bool, name: str = "") -> list[dict[str, str]]:
    wanted = (masking, sensitivity, adversarial, name)
    found = [
        row
        for row in raw_rows()
        if (*(ON_OFF[row[part]] for part in ("masking", "sensitivity", "adversarial")), row["name"]) == wanted
    ]
    return sorted(found, key=lambda row: row["seed"])


def shown(values: np.ndarray, sign: str = "") -> str:
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():{sign}.1f} ± {half:.1f}"


def percent(rows: list[dict[str, str]], column: str) -> np.ndarray:
    return np.array([100 * float(row[column]) for row in rows])


def arms() -> Iterator[tuple[str, list[dict[str, str]]]]:
    for first, attacked in (("PGD", True), ("standard", False)):
        yield first, select(False, False, attacked)
        yield f"{first} + masking", select(True, False, attacked)
        yield f"{first} + sensitivity", select(False, True, attacked)
        yield f"{first} + masking + sensitivity", select(True, True, attacked)
    yield "FGSM", select(False, False, True, "fgsm")
    yield "TRADES", select(False, False, True, "trades")
    yield "PGD + clean images", select(False, False, True, "pgd-and-clean")
    yield "PGD + masking + sensitivity, random segments", select(True, True, True, "random")
    yield "PGD + masking + sensitivity, the paper's segments", select(True, True, True, "paper")


def test_the_table_is_of_the_raw_figures() -> None:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in STUDY.read_text().splitlines()]
    told = {line[0]: line[1:] for line in lines if len(line) == 7}
    control = select(False, False, True)
    found = dict(arms())
    assert len(found) == 13 and sum(map(len, found.values())) == len(raw_rows()) == 39
    for name, rows in found.items():
        assert [row["seed"] for row in rows] == ["0", "1", "2"] and {row["state"] for row in rows} == {"done"}
        cells = told[name]
        assert cells[0] == shown(percent(rows, "clean"))
        assert cells[1] == shown(percent(rows, "corrupted"))
        assert cells[3] == shown(percent(rows, "autoattack"))
        for cell, column in ((cells[4], "clean"), (cells[5], "autoattack")):
            expected = shown(percent(rows, column) - percent(control, column), "+")
            assert cell == ("–" if name == "PGD" else re.sub(r"^[+-]0\.0 ", "0.0 ", expected))


def test_the_tool_prints_the_table(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/study_picture.py"), str(RAW / "table.h5"), str(tmp_path / "study.png")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed in STUDY.read_text()
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_the_raw_figures_belong_together() -> None:
    _, _, digest = read_tidy(RAW / "table.h5")
    assert digest == hashlib.sha256((RAW / "table.csv").read_bytes()).hexdigest()
    for row in raw_rows():
        result = json.loads((RAW / "cells" / f"{Path(row['weights']).parent.name}.json").read_text())
        assert result["attacks"]["autoattack"]["accuracy"] == float(row["autoattack"])
        assert result["attacks"]["clean"]["of"] == 500


@pytest.mark.parametrize("name", ["choice_15_epochs.csv", "choice_60_epochs.csv"])
def test_the_settings_were_chosen_by_what_the_page_shows(name: str) -> None:
    """Clean accuracy, and what is right under all attacks, of every form that was tried."""
    place = {"choice_15_epochs.csv": 1, "choice_60_epochs.csv": 3}[name]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in STUDY.read_text().splitlines()]
    told = {line[0]: line[place : place + 2] for line in lines if len(line) == 5}
    for row in csv.DictReader((RAW / name).read_text().splitlines()):
        measured = row["state"] == "done"
        clean, robust = (f"{100 * float(row[each]):.1f}" if measured else "" for each in ("clean", "pgd-20-margin"))
        assert told[row["name"]] == [clean, robust]
