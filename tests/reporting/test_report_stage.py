"""python -m hpcguard.report on run folders that the test writes itself."""

import csv
import html
import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image
from synthetic import epoch, explanations, result, store, training

from hpcguard.cli import run_stage
from hpcguard.config import DataConfig
from hpcguard.data import load_images
from hpcguard.store import write_rows

EVALUATION = {"images": 100, "eps": 0.1, "explained": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of a baseline trained elsewhere, a control and the guided arm."""
    run = tmp_path / "myrun"
    control = {"pgd": {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}}
    write(run / "config.yaml", yaml.safe_dump({
        "run": str(run), "data": {"name": "digits", "size": 16, "root": str(tmp_path / "secret")},
        "controls": control, "evaluation": EVALUATION,
    }))  # fmt: skip
    test = load_images(DataConfig(name="digits", size=16), "test")
    for name in ("baseline", "pgd", "guided"):
        write(run / "results" / f"{name}.json", json.dumps(result(name)))
        write_rows(run / "results" / f"{name}.explanations.h5", explanations(test.ids[:2], test.labels[:2]), "made up")
    for name in ("pgd", "guided"):
        write(run / "checkpoints" / name / "training.json", json.dumps(training(name, name == "guided")))
        write(run / "checkpoints" / name / "log.jsonl", "".join(json.dumps(epoch(k)) + "\n" for k in (1, 2)))
    write(run / "store.json", json.dumps(store()))
    run.chmod(0o700)
    return run


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run_stage("report", [str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not (folder / "report" / "index.html").exists()
    return error


def test_report_of_a_whole_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("report", [str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:4]] == ["arm", "baseline", "pgd", "guided"]
    assert "45.0% [35.6, 54.8]" in out
    assert out.splitlines()[-1] == f"report: {folder}/report/index.html"

    report = folder / "report"
    test = load_images(DataConfig(name="digits", size=16), "test")
    pictures = {"accuracy.png", "training.png", *(f"explanation_{number}.png" for number in test.ids[:2])}
    numbers = {name.replace(".png", ".csv") for name in pictures}
    assert {path.name for path in report.iterdir()} == {"index.html", "results.md", *pictures, *numbers}
    for name in pictures:
        Image.open(report / name).verify()
    with (report / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    recorded = json.loads((folder / "results" / "guided.json").read_text())["attacks"]["autoattack"]
    assert float(rows[-1]["low"]) == recorded["low"] and rows[-1]["arm"] == "guided"
    assert "45.0% [35.6, 54.8]" in (report / "results.md").read_text()


def test_every_figures_numbers_lie_beside_it(folder: Path) -> None:
    assert run_stage("report", [str(folder)]) == 0

    def rows(name: str) -> list[dict[str, str]]:
        with (folder / "report" / name).open() as file:
            return list(csv.DictReader(file))

    assert [(row["arm"], row["epoch"], row["loss"]) for row in rows("training.csv")] == [
        ("pgd", "1", "0.5"), ("pgd", "2", "0.5"), ("guided", "1", "0.5"), ("guided", "2", "0.5"),
    ]  # fmt: skip
    test = load_images(DataConfig(name="digits", size=16), "test")
    shown = rows(f"explanation_{test.ids[0]}.csv")
    assert [row["panel"] for row in shown] == ["baseline", "baseline", "pgd", "pgd", "guided", "guided"]
    assert [(row["segment"], row["pixels"], float(row["coefficient"])) for row in shown[:2]] == [
        ("0", "128", pytest.approx(0.2)), ("1", "128", pytest.approx(-0.1)),
    ]  # fmt: skip


def test_a_round_of_a_loop_shows_all_rounds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [
        {
            "number": 1,
            "spurious": {"flagged": 0.2},
            "jaccard": None,
            "validation_clean": 0.9,
            "validation_robust": 0.41,
        },
        {"number": 2, "spurious": {"flagged": 0.3}, "jaccard": 0.7, "validation_clean": 0.8, "validation_robust": 0.52},
    ]
    own = folder.rename(folder.with_name("round-2"))
    write(own.parent / "loop.json", json.dumps({"rounds": rounds, "stopped": None}))
    assert run_stage("report", [str(own), f"run={own}"]) == 0
    text = (own / "report" / "index.html").read_text()
    assert "Rounds of the loop" in text and "52.0%" in text and "0.700" in text
    assert (own / "report/rounds.csv").read_text().splitlines()[1] == "1,0.9,0.41,0.2,"
    del rounds[1]["jaccard"]
    write(own.parent / "loop.json", json.dumps({"rounds": rounds, "stopped": None}))
    assert run_stage("report", [str(own), f"run={own}"]) == 2
    assert "loop.json: damaged, jaccard is missing" in capsys.readouterr().err


def test_page_is_self_contained_and_names_no_machine_path(folder: Path) -> None:
    assert run_stage("report", [str(folder)]) == 0
    text = (folder / "report" / "index.html").read_text()
    assert "http://" not in text and "https://" not in text and "<script" not in text and "url(" not in text
    assert set(re.findall(r'src="([^"]{22})', text)) == {"data:image/png;base64,"}
    assert not re.search(r"href=|@import|<link", text)
    assert str(folder.parent) not in text and "root: secret" in text
    assert "python -m hpcguard.evaluate myrun run=myrun-repeat" in text and "--arm baseline" not in text
    assert text.count("<img") == text.count('alt="') == 4
    for sentence in (
        "the intervals overlap, so this run alone does not tell them apart",
        "0.75",
        "1213",
        "abc123",
        "48.3 s",
    ):
        assert sentence in html.unescape(text)


def test_a_run_without_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (folder / "results").glob("*.json"):
        path.unlink()
    assert "no results yet; run `python -m hpcguard.evaluate" in refused(folder, capsys)


def test_results_alone_are_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pgd", "guided"):
        (folder / "checkpoints" / name / "training.json").unlink()
        (folder / "checkpoints" / name / "log.jsonl").unlink()
    (folder / "store.json").unlink()
    (folder / "results" / "pgd.json").unlink()
    assert run_stage("report", [str(folder)]) == 0
    assert "report: pgd is not measured yet" in capsys.readouterr().out
    text = (folder / "report" / "index.html").read_text()
    assert "<h2>Training" not in text and "No control is measured" in text


def test_arms_not_in_the_configuration_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "results" / "old.json", "{}")
    assert run_stage("report", [str(folder)]) == 0
    out = capsys.readouterr().out
    assert "old.json is left out: old is no arm of this configuration" in out and "\nold " not in out


@pytest.mark.parametrize("text", ["", '{"arm": "pgd"', "[]", '{"arm": "pgd"}'])
def test_damaged_result(folder: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    write(folder / "results" / "pgd.json", text)
    error = refused(folder, capsys)
    assert "pgd.json: damaged" in error and "evaluate" in error


def test_mismatching_settings(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "results" / "pgd.json", json.dumps(result("pgd", eps=0.2)))
    error = refused(folder, capsys)
    assert "arm pgd" in error and "evaluation.eps was 0.1 (now 0.2)" in error and "evaluate" in error


def test_damaged_explanations(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "results" / "pgd.explanations.h5"
    with h5py.File(path, "a") as file:
        file["segments"][0, 0, 0] = 2
    assert "segments has labels past num_segments" in refused(folder, capsys)
    path.write_bytes(path.read_bytes()[:300])
    assert "pgd.explanations.h5" in refused(folder, capsys)
    path.unlink()
    assert "pgd.explanations.h5: not there" in refused(folder, capsys)


def test_explanations_of_other_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with h5py.File(folder / "results" / "guided.explanations.h5", "a") as file:
        file["image_id"][:] = file["image_id"][:] + 1
    assert "arm guided are of other images" in refused(folder, capsys)


def test_other_data_than_was_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("report", [str(folder), "data.size=32"]) == 2
    assert "do not fit this configuration's data" in capsys.readouterr().err


def test_damaged_log_and_store(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = folder / "checkpoints" / "pgd" / "log.jsonl"
    log.write_text(log.read_text() + '{"epoch"')
    assert "log.jsonl: line 3 is damaged" in refused(folder, capsys)
    log.unlink()
    write(folder / "store.json", "{}")
    assert "store.json: damaged, images is missing" in refused(folder, capsys)


def test_retrained_arm(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder / "checkpoints" / "guided" / "training.json", weights_sha256="newer")
    assert "guided was trained again after it was measured" in refused(folder, capsys)


def test_other_settings_than_the_page_shows_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("report", [str(folder), "evaluation.eps=0.3"]) == 0
    assert "measured with other settings than this configuration: eps was 0.1 (now 0.3)" in capsys.readouterr().out


def test_a_second_report_removes_pictures_of_the_first(folder: Path) -> None:
    assert run_stage("report", [str(folder)]) == 0
    before = (folder / "report" / "index.html").read_bytes()
    stale = folder / "report" / "explanation_1.png"
    stale.write_bytes(b"")
    assert run_stage("report", [str(folder)]) == 0
    assert not stale.exists() and (folder / "report" / "index.html").read_bytes() == before


def test_an_unexplained_run(folder: Path) -> None:
    for name in ("baseline", "pgd", "guided"):
        (folder / "results" / f"{name}.explanations.h5").unlink()
        changed = result(name, explained=0)
        write(folder / "results" / f"{name}.json", json.dumps({**changed, "explanation_jaccard5": None}))
    assert run_stage("report", [str(folder)]) == 0
    assert "Explanations before" not in (folder / "report" / "index.html").read_text()


def test_odd_run_names_are_escaped(folder: Path) -> None:
    odd = folder.rename(folder.with_name("a <b> run"))
    assert run_stage("report", [str(odd)]) == 0
    text = (odd / "report" / "index.html").read_text()
    assert "<h1>a &lt;b&gt; run</h1>" in text and "<b>" not in text
    assert "'a <b> run' 'run=a <b> run-repeat'" in html.unescape(text)


def test_images_in_the_pictures_are_those_of_the_ids(folder: Path) -> None:
    assert run_stage("report", [str(folder)]) == 0
    test = load_images(DataConfig(name="digits", size=16), "test")
    shown = np.asarray(Image.open(folder / "report" / f"explanation_{test.ids[0]}.png").convert("L")) / 255
    inch = shown.shape[0] / 2.45
    centres = (np.arange(16) + 0.5) * 1.9 / 16
    rows = np.round((2.45 - 0.26 - 1.9 + centres) * inch).astype(int)
    columns = np.round((0.1 + centres) * inch).astype(int)
    assert np.abs(shown[np.ix_(rows, columns)] - test.images(test.ids[:1])[0, 0]).max() < 0.02
