"""The report of a sweep's folder, some of whose cells are not measured."""

import csv
import hashlib
import json
import re
import shlex
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import result

from hpcguard.cli import run_stage
from hpcguard.config import Config
from hpcguard.config.sweep import SweepConfig
from hpcguard.store.tidy import read_tidy
from hpcguard.sweeps.folder import SweepFolder, measured_alike, write_plan, write_yaml
from hpcguard.sweeps.grid import expand
from hpcguard.sweeps.jobs import Graph, command, job_config, plan_jobs

BASE: dict[str, Any] = {
    "baseline": {"engine": "torch"}, "refinement": {"engine": "torch"}, "evaluation": {"explained": 0}
}  # fmt: skip
OFF = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}
SWEEP: dict[str, Any] = {
    "axes": {"rule": {"<b>ours</b>": {}, "none": {"refinement": OFF}}},
    "zip": [{"refinement.epochs": [2, 4], "refinement.batch_size": [8, 16]}],
    "seeds": [0, 1, 2], "control": {"rule": "none"},
}  # fmt: skip


def make(path: Path, failed: int = 0, waiting: int = 0, **changes: Any) -> tuple[SweepFolder, Graph]:
    """A sweep's folder as it is when all but some cells are done; nothing is trained."""
    sweep, base = SweepConfig.model_validate({"run": str(path), **SWEEP, **changes}), Config.model_validate(BASE)
    graph = plan_jobs(path, base, expand(sweep))
    folder = SweepFolder(path)
    folder.create()
    write_plan(folder, sweep, base, graph)
    for place, cell in enumerate(graph.cells):
        if place < failed:
            folder.record(cell.refine).write_text(json.dumps({"status": 1, "seconds": 1.0, "why": "it broke"}))
        elif place < len(graph.cells) - waiting:
            for name in graph.before([cell.evaluate]):
                job = graph.jobs[name]
                file = folder.config(name)
                write_yaml(
                    file,
                    job_config(path, base, [job], graph.inputs),
                    f"# hpcguard {shlex.join(command(file, [job]))}\n",
                )
            _measure(folder, graph, place, measured_alike(base))
    return folder, graph


def _measure(folder: SweepFolder, graph: Graph, place: int, alike: dict[str, Any]) -> None:
    job = graph.jobs[graph.cells[place].refine]
    run = folder.run(job)
    run.weights(job.arm).parent.mkdir(parents=True, exist_ok=True)
    run.weights(job.arm).write_bytes(b"")
    training = {"weights_sha256": job.arm, "seconds": 90.0, "world_size": 2, "threads": 2, "device": "cpu"}
    run.training(job.arm).write_text(json.dumps(training))
    found = result(job.arm, (90 - place, 60, 50, 30 + place))
    found["identity"] |= {**alike, "weights_sha256": job.arm}
    run.result(job.arm).parent.mkdir(exist_ok=True)
    run.result(job.arm).write_text(json.dumps(found))


class Page(HTMLParser):
    """Tags with their attributes, and the text of every pre."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.commands: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "pre":
            self.commands.append("")
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "pre":
            self.commands[-1] += data


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[SweepFolder, Graph]:
    made = make(tmp_path_factory.mktemp("reported") / "sweep", failed=1, waiting=1)
    assert run_stage("report", [str(made[0].path)]) == 0
    return made


def test_the_page_needs_nothing_else_and_shows_no_path(reported: tuple[SweepFolder, Graph]) -> None:
    folder, _ = reported
    text = folder.report.read_text()
    for tag, name, value in Page(text).attributes:
        if name in ("src", "href", "srcset", "data", "action", "poster"):
            assert value.startswith("data:image/png;base64,"), (tag, name)
    assert not re.search(r"@import|url\(|<script|<link", text)
    assert str(folder.path.parent) not in text
    assert "&lt;b&gt;ours" in text and "<b>ours" not in text
    assert "10 of 12 cells are measured; 1 failed, 1 waiting." in text


def test_the_page_has_every_cells_commands(reported: tuple[SweepFolder, Graph]) -> None:
    folder, graph = reported
    shown = Page(folder.report.read_text()).commands[2:]  # after how to repeat it, and the settings
    assert len(shown) == len(graph.cells) == 12
    for place, (cell, lines) in enumerate(zip(graph.cells, shown, strict=True)):
        wanted = []
        for name in (name for name in graph.jobs if name in graph.before([cell.evaluate])):
            words = command(Path("sweep/configs") / f"{name}.yaml", [graph.jobs[name]])
            begun = folder.config(name).exists()
            wanted.append(shlex.join(["hpcguard", *words]) if begun else f"# {name}: not begun yet")
        assert lines.splitlines() == wanted
        assert ("not begun" in lines) == (place in (0, 11))
        assert wanted[-1].split()[1].startswith("evaluate")
    guided, unguided = shown[1].splitlines(), shown[-2].splitlines()
    assert [line.split()[1] for line in guided] == ["refine", "attribute", "refine", "evaluate"]
    assert [line.split()[1] for line in unguided] == ["refine", "refine", "evaluate"]  # nothing explained


def test_the_tables_are_one_table(reported: tuple[SweepFolder, Graph]) -> None:
    folder, graph = reported
    text = folder.table.read_bytes()
    read = list(csv.DictReader(text.decode().splitlines()))
    columns, units, digest = read_tidy(folder.path / "table.h5")
    assert digest == hashlib.sha256(text).hexdigest()
    assert list(columns) == list(read[0]) and len(read) == len(graph.cells)
    for name, values in columns.items():
        for cell, value in zip((row[name] for row in read), values.tolist(), strict=True):
            assert cell == str(value) or (cell == "" and value != value) or float(cell) == value, name
    assert [row["state"] for row in read] == ["failed", *["done"] * 10, "waiting"]
    assert units["autoattack"] == "share of images" and units["refine_seconds"] == "s"
    assert "10 of 12 cells" in folder.summary.read_text()
    assert r"\caption{" in (folder.path / "table.tex").read_text()


def test_figures_and_their_numbers(reported: tuple[SweepFolder, Graph]) -> None:
    folder, _ = reported
    names = {path.name for path in folder.report.parent.iterdir()}
    assert names == {"index.html"} | {
        f"{name}.{kind}" for name in ("trade_off", "effects", "differences") for kind in ("png", "csv")
    }
    table = list(csv.DictReader(folder.table.read_text().splitlines()))
    points = list(csv.DictReader((folder.report.parent / "trade_off.csv").read_text().splitlines()))
    assert len(points) == 4
    for point in points:
        group = [
            row
            for row in table
            if (row["rule"], row["refinement.epochs"]) == (point["rule"], point["refinement.epochs"])
        ]
        known = [float(row["autoattack"]) for row in group if row["autoattack"]]
        assert float(point["robust_mean"]) == pytest.approx(sum(known) / len(known))
        assert (float(point["robust_lowest"]), float(point["robust_highest"])) == (min(known), max(known))
    effects = list(csv.DictReader((folder.report.parent / "effects.csv").read_text().splitlines()))
    assert {row["axis"] for row in effects} == {"rule", "epochs, batch_size"}  # these two move together


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path, reported: tuple[SweepFolder, Graph]) -> None:
    folder, _ = reported
    before = {
        path: path.read_bytes() for path in folder.path.rglob("*") if path.suffix in (".png", ".csv", ".html", ".tex")
    }
    assert run_stage("report", [str(folder.path)]) == 0
    assert before == {path: path.read_bytes() for path in before}


def test_cost_counts_shared_jobs_once(tmp_path: Path) -> None:
    folder, graph = make(
        tmp_path / "sweep", axes={"rule": SWEEP["axes"]["rule"], "attribution.num_samples": [16, 32]}, zip=[]
    )
    assert run_stage("report", [str(folder.path)]) == 0
    rows = re.findall(r"<tr><th scope=\"row\">training</th>(.*?)</tr>", folder.report.read_text())
    distinct = len({cell.refine for cell in graph.cells})
    assert (distinct, len(graph.cells)) == (9, 12)  # without guidance the samples do not matter
    # Each 90 s on 2 processes of 2 threads: 0.1 core-hours.
    assert re.findall(r"<td>(.*?)</td>", rows[0]) == ["9", "90.0 s", "14 min", "0.90 core-hours", "1.20 core-hours"]


def test_a_sweep_of_which_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make(tmp_path / "sweep", waiting=12)
    stale = folder.report.with_name("effects.png")
    stale.parent.mkdir()
    stale.write_bytes(b"")
    assert run_stage("report", [str(folder.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "0 of 12 cells are measured; 12 waiting. They count for nothing here.", f"report: {folder.report}"
    ]  # fmt: skip
    text = folder.report.read_text()
    assert "Nothing is measured yet." in text and "0 of 12 cells are measured; 12 waiting." in text
    assert not stale.exists() and "<img" not in text


def test_the_means_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make(tmp_path / "sweep", waiting=1)
    assert run_stage("report", [str(folder.path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Accuracy in %, means over seeds ± 95% interval:" and len(said) == 1 + 1 + 4 + 2
    table = list(csv.DictReader(folder.table.read_text().splitlines()))
    for line in said[2:6]:
        rule, epochs, batch, seeds, clean, *_ = re.split(r"  +", line)
        values = [
            100 * float(row["clean"])
            for row in table
            if (row["rule"], row["refinement.batch_size"], row["refinement.epochs"]) == (rule, batch, epochs)
            and row["clean"]
        ]
        assert (int(seeds), clean.split()[0]) == (len(values), f"{statistics.fmean(values):.1f}")
    assert said[6] == "11 of 12 cells are measured; 1 waiting. They count for nothing here."


def test_many_settings_are_not_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make(tmp_path / "sweep", waiting=100, zip=[], axes={"data.seed": [*range(41)]}, control={})
    assert run_stage("report", [str(folder.path)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "41 settings: their means are in table.md"


def test_one_seed_and_no_control(tmp_path: Path) -> None:
    folder, _ = make(tmp_path / "sweep", seeds=[3], control={})
    assert run_stage("report", [str(folder.path)]) == 0
    text = folder.report.read_text()
    assert "measured with one seed" in text and "Against the control" not in text
    assert not folder.report.with_name("differences.png").exists()


def test_bad_input_is_one_line(
    reported: tuple[SweepFolder, Graph], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = reported
    assert run_stage("report", [str(folder.path), "seeds=[0]"]) == 2
    assert "a sweep's report has no keys" in capsys.readouterr().err
    (tmp_path / "cells.json").write_text(yaml.safe_dump({"schema": 1}))
    assert run_stage("report", [str(tmp_path)]) == 2
    assert "start the sweep again" in capsys.readouterr().err


def test_the_command_that_repeats_the_sweep_plans_the_same_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With labels that YAML reads as truth values, as those of the components' sweep."""
    switch = {True: {}, False: {"refinement.masking.weight": 0}}
    cells = [{"name": "long", "masking": False, "refinement.epochs": 9}]
    folder, _ = make(
        tmp_path / "sweep", waiting=9, axes={"masking": switch}, zip=[], cells=cells, control={"masking": False}
    )
    assert run_stage("report", [str(folder.path)]) == 0
    words = shlex.split(Page(folder.report.read_text()).commands[0])
    assert words[:2] == ["hpcguard", "sweep"]
    monkeypatch.chdir(tmp_path)
    for again in (words[2:], [str(folder.path)]):
        capsys.readouterr()
        assert run_stage("sweep", [*again, "--dry-run"]) == 0
        assert "cells        9\n" in capsys.readouterr().out
