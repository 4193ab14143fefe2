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


def raw_rows(table: str = "table") -> list[dict[str, str]]:
    return list(csv.DictReader((RAW / f"{table}.csv").read_text().splitlines()))


def select(
    masking: bool, sensitivity: bool, adversarial: bool, name: str = "", table: str = "table"
) -> list[dict[str, str]]:
    wanted = (masking, sensitivity, adversarial, name)
    found = [
        row
        for row in raw_rows(table)
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
    text = STUDY.read_text().split("### The smallest table")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
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


ARMS = {
    "full": (True, True, True), "masking": (True, False, True), "sensitivity": (False, True, True),
    "pgd": (False, False, True), "clean loss": (False, False, True, "pgd-and-clean"),
    "random": (True, True, True, "random"), "paper": (True, True, True, "paper"), "fgsm": (False, False, True, "fgsm"),
    "full alone": (True, True, False), "masking alone": (True, False, False),
    "sensitivity alone": (False, True, False), "standard": (False, False, False),
}  # fmt: skip


@pytest.mark.parametrize(
    ("begin", "said", "arm", "other", "measure", "table"),
    [
        ("- **Masking**", "5.4 ± 2.8 points on clean", "full", "sensitivity", "clean", "table"),
        ("- **Masking**", "3.8 ± 1.8 under corruptions", "full", "sensitivity", "corrupted", "table"),
        ("- **Masking**", "alone 3.5 ± 5.8", "masking", "pgd", "clean", "table"),
        ("- **Masking**", "and 1.8 ± 3.1", "masking", "pgd", "corrupted", "table"),
        ("- **Masking**", "+0.9 ± 3.7 clean", "full", "clean loss", "clean", "table"),
        ("- **Masking**", "+0.5 ± 3.0 under AutoAttack", "full", "clean loss", "autoattack", "table"),
        ("- **Which", "+2.3 ± 1.4 clean", "full", "random", "clean", "table"),
        ("- **Which", "+0.2, one image", "full", "random", "autoattack", "table"),
        ("- **Which", "+1.8 ± 3.0", "full", "paper", "clean", "table"),
        ("- **Which", "-0.3 ± 2.8", "full", "paper", "autoattack", "table"),
        ("- **The sensitivity", "(+0.3 ± 1.3", "sensitivity", "pgd", "autoattack", "table"),
        ("- **The sensitivity", "-0.1 ± 0.8", "full", "masking", "autoattack", "table"),
        ("- **The sensitivity", "2.0 ± 1.0", "sensitivity alone", "standard", "autoattack", "table"),
        ("- **The sensitivity", "3.4 ± 3.3", "full alone", "masking alone", "autoattack", "table"),
        ("- **Guidance without", "0.7 ± 1.0 points below", "fgsm", "pgd", "autoattack", "table"),
        ("Where attacks are weak", "2.1 ± 1.5", "clean loss", "pgd", "autoattack", "table_2"),
        ("Where attacks are weak", "+0.9 ± 3.2", "full", "pgd", "autoattack", "table_2"),
        ("Where attacks are weak", "-1.2 ± 1.7", "full", "clean loss", "autoattack", "table_2"),
    ],
)
def test_what_the_text_says_is_in_the_raw_figures(
    begin: str, said: str, arm: str, other: str, measure: str, table: str
) -> None:
    text = STUDY.read_text()
    paragraph = re.split(r"\n- |\n\n", text[text.index(begin) + 2 :])[0]
    assert said in " ".join(paragraph.split())
    rows, others = (select(*ARMS[each], table=table) for each in (arm, other))  # type: ignore[arg-type]
    expected = shown(percent(rows, measure) - percent(others, measure), "+")
    told = re.search(r"[+-]?[\d.]+( ± [\d.]+)?", said)
    assert told is not None
    assert expected.lstrip("+-").startswith(told[0].lstrip("+-"))
    assert not told[0].startswith(("+", "-")) or told[0][0] == expected[0]
    assert expected.startswith("-") == (told[0].startswith("-") or "below" in said)


@pytest.mark.parametrize(
    ("table", "page"), [("table", "README.md"), ("table_2", "README.md"), ("table_2", "docs/study.md")]
)
def test_the_sentence_that_is_shown_first_is_of_the_raw_figures(table: str, page: str) -> None:
    first = " ".join((ROOT / page).read_text().split("\n## ")[0].split())
    for arm in ("full", "clean loss"):
        rows, control = (select(*ARMS[each], table=table) for each in (arm, "pgd"))  # type: ignore[arg-type]
        for measure in ("clean", "autoattack") if table == "table" else ("autoattack",):
            assert shown(percent(rows, measure) - percent(control, measure), "+").lstrip("+-") in first


@pytest.mark.parametrize("table", ["table", "table_2", "table_small"])
def test_the_tool_prints_the_table(table: str, tmp_path: Path) -> None:
    picture = tmp_path / "study.png"
    command = [sys.executable, str(ROOT / "tools/study_picture.py"), str(RAW / f"{table}.h5"), str(picture)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed in STUDY.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("table", "cells", "images"), [("table", "cells", 500), ("table_2", "cells_2", 250)])
def test_the_raw_figures_belong_together(table: str, cells: str, images: int) -> None:
    _, _, digest = read_tidy(RAW / f"{table}.h5")
    assert digest == hashlib.sha256((RAW / f"{table}.csv").read_bytes()).hexdigest()
    for row in raw_rows(table):
        result = json.loads((RAW / cells / f"{Path(row['weights']).parent.name}.json").read_text())
        assert result["attacks"]["autoattack"]["accuracy"] == float(row["autoattack"])
        assert result["attacks"]["clean"]["of"] == images


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
