"""A whole sweep, as a command: sharing, a kill in the middle, failures, added cells; sweeps that cannot be."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hpcguard.cli import run_stage
from hpcguard.runs import digest_file, exclusive

MakeConfig = Callable[..., Path]
OFF = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}
ARMS = {"guided": {}, "random": {"refinement.spurious.random": True}, "pgd": {"refinement": OFF}}


def write(folder: Path, make_config: MakeConfig, **values: Any) -> str:
    base = make_config(folder, cluster={"workers": 1, "shards": 1}, evaluation={"explained": 0})
    path = folder / "sweep.yaml"
    given = {"run": str(folder / "sweep"), "base": str(base), "axes": {"arm": ARMS}, "seeds": [0, 1], "pack": 4}
    path.write_text(yaml.safe_dump({**given, **values}, sort_keys=False))
    return str(path)


def sessions_of(owner: int) -> set[int]:
    """Sessions of the processes that end with `owner`: their own children stay in them."""
    found = set()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HPCGUARD_OWNER={owner}".encode() in environment.read_bytes().split(b"\0"):
                found.add(os.getsid(int(environment.parent.name)))
        except (OSError, ProcessLookupError):
            continue
    return found


def processes_in(sessions: set[int]) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) in sessions:
                yield int(process.name)
        except ProcessLookupError:
            continue


def wait_for(true: Callable[[], Any], process: subprocess.Popen[Any] | None = None, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        assert process is None or process.poll() is None
        time.sleep(0.05)


def files(folder: Path) -> dict[str, int]:
    """Published weights, shards and results with the time of their making."""
    kinds = ("*/*/checkpoints/*/model.safetensors", "*/*/shards/*.h5", "*/*/results/*.json")
    return {str(path): path.stat().st_mtime_ns for kind in kinds for path in folder.glob(kind)}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> Path:
    """A finished sweep that was killed in the middle; copy it to change it."""
    folder = tmp_path_factory.mktemp("swept")
    sweep = write(folder, make_config, control={"arm": "pgd"}, max_jobs=2)
    process = subprocess.Popen([sys.executable, "-m", "hpcguard", "sweep", sweep])
    wait_for(lambda: list(folder.glob("sweep/stores/*/plan.json")), process)
    sessions = sessions_of(process.pid)
    assert sessions
    process.kill()
    process.wait()
    wait_for(lambda: not list(processes_in(sessions)))  # none is left that would go on
    before = files(folder / "sweep")
    assert not list(folder.glob("sweep/stores/*/results/*.json"))
    assert run_stage("sweep", [sweep]) == 0
    assert before.items() <= files(folder / "sweep").items()  # nothing was done again
    return folder


def test_stores_and_models_are_shared(swept: Path) -> None:
    plan = json.loads((swept / "sweep/cells.json").read_text())
    kinds = [job["kind"] for job in plan["jobs"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {"refine": 7, "attribute": 1, "evaluate": 6}
    assert len(list(swept.glob("sweep/stores/*"))) == len(list(swept.glob("sweep/models/*"))) == 1
    assert len(list(swept.glob("sweep/stores/*/checkpoints/*"))) == 4  # guided and random, two seeds each
    assert len(list(swept.glob("sweep/models/*/checkpoints/*"))) == 3  # the baseline and pgd
    packed = [path.read_text().count("--arm") for path in swept.glob("sweep/logs/refine-*.log")]
    assert max(packed) > 1  # the guided arms, which the store has let go together


def test_all_arms_are_held_against_the_model_that_was_explained(swept: Path) -> None:
    """However they were packed: alarms transfer attacks from it, and its flags are what explanations are held to."""
    plan = json.loads((swept / "sweep/cells.json").read_text())
    (store,) = (job for job in plan["jobs"] if job["kind"] == "attribute")
    arm = store["needs"][0].removeprefix("refine-")
    (weights,) = swept.glob(f"sweep/models/*/checkpoints/{arm}/model.safetensors")
    results = [json.loads(path.read_text())["identity"] for path in swept.glob("sweep/*/*/results/*.json")]
    assert len(results) == 6
    assert {each[name] for each in results for name in ("baseline_sha256", "sibling_sha256")} == {digest_file(weights)}


def test_the_table_is_of_the_results(swept: Path) -> None:
    table = list(csv.DictReader((swept / "sweep/table.csv").read_text().splitlines()))
    assert [(row["arm"], row["seed"], row["state"]) for row in table] == [
        (arm, str(seed), "done") for arm in ARMS for seed in (0, 1)
    ]
    for row in table:
        arm = (swept / "sweep" / row["weights"]).parent
        result = json.loads((arm.parents[1] / f"results/{arm.name}.json").read_text())
        assert float(row["pgd-4"]) == result["attacks"]["pgd-4"]["accuracy"]
        assert result["identity"]["weights_sha256"] == digest_file(arm / "model.safetensors")
    assert "Differences from the control (arm=pgd)" in (swept / "sweep/table.md").read_text()


def test_a_cell_is_what_the_stages_give_by_hand(
    swept: Path, tmp_path: Path, make_config: MakeConfig, attributed: Path
) -> None:
    shutil.copytree(attributed, tmp_path / "run")
    config = str(make_config(tmp_path))
    table = list(csv.DictReader((swept / "sweep/table.csv").read_text().splitlines()))
    for arm in ("guided", "pgd"):
        assert run_stage("refine", [config, "--arm", arm, "refinement.seed=1"]) == 0
        (row,) = [row for row in table if (row["arm"], row["seed"]) == (arm, "1")]
        here = load_file(swept / "sweep" / row["weights"])
        by_hand = load_file(tmp_path / f"run/checkpoints/{arm}/model.safetensors")
        assert here.keys() == by_hand.keys()
        assert all(torch.equal(here[name], by_hand[name]) for name in here)
    former = load_file(tmp_path / "run/checkpoints/guided/model.safetensors")
    assert any(not torch.equal(former[name], by_hand[name]) for name in former)


def test_a_failed_cell_stops_no_other_and_added_cells_redo_nothing(
    swept: Path, tmp_path: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "sweep").glob("jobs/*.json"):
        path.write_text(path.read_text().replace(str(swept), str(tmp_path)))
    scratch = {"refinement": {**OFF, "start": "scratch", "epochs": 1}}
    arms = {**ARMS, "scratch": scratch, "wrong": {"refinement": {**scratch["refinement"], "batch_size": 4096}}}
    sweep = write(tmp_path, make_config, axes={"arm": arms}, seeds=[0])
    before = files(tmp_path / "sweep")
    assert run_stage("sweep", [sweep, "--dry-run"]) == 0
    planned = capfd.readouterr().out
    assert "trainings       6, 2 to do" in planned and "stores          1, 0 to do" in planned
    assert run_stage("sweep", [sweep]) == 1
    said = capfd.readouterr().out
    assert "batch_size = 4096" in said and "1 jobs were not begun" in said
    assert "sweep: 5 cells: 4 done, 1 failed" in said
    after = files(tmp_path / "sweep")
    assert before.items() <= after.items() and len(after) == len(before) + 2

    assert run_stage("status", [str(tmp_path / "sweep")]) == 0
    shown = capfd.readouterr().out
    assert "cells   5: 4 done, 1 failed" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("arm=wrong")]
    assert line.split() == ["arm=wrong", "FAILED"]
    log = next(line for line in shown.splitlines() if line.startswith("  log: ")).removeprefix("  log: ")
    assert "batch_size = 4096" in Path(log).read_text()
    assert run_stage("status", [str(tmp_path / "sweep"), "--json"]) == 0
    state = json.loads(capfd.readouterr().out)
    assert state["jobs"]["refine"] == {"done": 5, "failed": 1}


def test_damaged_weights_are_found_before_they_are_measured(
    swept: Path, tmp_path: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    sweep = write(tmp_path, make_config, axes={"arm": {"pgd": ARMS["pgd"]}}, seeds=[1])
    (row,) = [
        row
        for row in csv.DictReader((tmp_path / "sweep/table.csv").read_text().splitlines())
        if (row["arm"], row["seed"]) == ("pgd", "1")
    ]
    weights = tmp_path / "sweep" / row["weights"]
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    (weights.parents[2] / f"results/{weights.parent.name}.json").unlink()
    assert run_stage("sweep", [sweep]) == 1
    said = capfd.readouterr().out
    assert "differs from what was trained" in said and f"delete {weights.parent}" in said
    assert "sweep: 1 cells: 1 failed" in said


def test_what_a_damaged_store_is_made_of_is_made_again_too(
    swept: Path, tmp_path: Path, make_config: MakeConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    sweep = write(tmp_path, make_config, axes={"arm": {"guided": {}}}, seeds=[1])
    (store,) = tmp_path.glob("sweep/stores/*/store.h5")
    content = bytearray(store.read_bytes())
    content[-2] ^= 1
    store.write_bytes(content)
    plan = json.loads((tmp_path / "sweep/cells.json").read_text())
    (explained,) = (job["needs"][0] for job in plan["jobs"] if job["kind"] == "attribute")
    (baseline,) = tmp_path.glob(f"sweep/models/*/checkpoints/{explained.removeprefix('refine-')}")
    weights = digest_file(baseline / "model.safetensors")
    shutil.rmtree(baseline)
    (row,) = [
        row
        for row in csv.DictReader((tmp_path / "sweep/table.csv").read_text().splitlines())
        if (row["arm"], row["seed"]) == ("guided", "1")
    ]
    shutil.rmtree((tmp_path / "sweep" / row["weights"]).parent)
    assert run_stage("sweep", [sweep]) == 0
    assert "doing it again" in capfd.readouterr().out
    assert digest_file(baseline / "model.safetensors") == weights
    (again,) = csv.DictReader((tmp_path / "sweep/table.csv").read_text().splitlines())
    times = ("refine_seconds", "evaluate_seconds")
    assert {k: v for k, v in again.items() if k not in times} == {k: v for k, v in row.items() if k not in times}


def test_told_to_stop_it_lets_its_jobs_save(tmp_path: Path, make_config: MakeConfig) -> None:
    cell = {"refinement": {**OFF, "start": "scratch", "epochs": 100_000}}
    sweep = write(tmp_path, make_config, axes={"arm": {"long": cell}}, seeds=[])
    process = subprocess.Popen([sys.executable, "-m", "hpcguard", "sweep", sweep], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: list(tmp_path.glob("sweep/models/*/checkpoints/*/state-*")), process)
    assert [each["state"] for each in status_of(tmp_path / "sweep")["cells"]] == ["running"]
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "the same command goes on from here" in said
    (log,) = tmp_path.glob("sweep/logs/*.log")
    assert "was told to stop and is saved" in log.read_text()
    assert [each["state"] for each in status_of(tmp_path / "sweep")["cells"]] == ["waiting"]  # it has not failed
    with exclusive(next(tmp_path.glob("sweep/models/*/checkpoints/*")), 0):  # nobody is training on
        pass


def status_of(folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "hpcguard", "status", str(folder), "--json"], capture_output=True, check=True
    )
    return json.loads(done.stdout)


WRONG: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("unknown key", {"axis": {}}, [], ["unknown key axis", "did you mean axes"]),
    ("unknown key of a cell", {"axes": {"refinement.epoch": [1]}}, [], ["refinement.epoch", "did you mean epochs"]),
    ("an axis that is no list", {"axes": {"refinement.epochs": 3}}, [], ["axes.refinement.epochs = 3", "write a list"]),
    ("all excluded", {"exclude": [{"arm": arm} for arm in ARMS]}, [], ["no cell is left"]),
    ("a seed twice", {"seeds": [1, 1]}, [], ["seeds: 1 is there twice"]),
    ("evaluation as an axis", {"axes": {"evaluation.eps": [0.1]}}, [], ["evaluation.eps is no axis", "compared"]),
    ("no base", {"base": None}, [], ["base and config are both empty"]),
    ("a base that is not there", {"base": "no/such.yaml"}, [], ["no/such.yaml", "no such file"]),
    ("an unknown key of the base", {"config": {"modl": {}}}, [], ["unknown key modl", "did you mean model"]),
    ("a control that is no cell", {"control": {"arm": "trades"}}, [], ["control", "fits no cell"]),
    ("a list for a section", {"config": {"data": [3]}}, [], ["config.data = [3]", "write the keys"]),
    (
        "a key that is a number",
        {"axes": {"refinement.masking": [{1: 2, "of": "clean"}]}},
        [],
        ["axes.refinement.masking[0]: the key 1 is no text"],
    ),
    (
        "a range without end",
        {"axes": {"refinement.learning_rate": {"range": {"start": 1, "stop": 1e308, "step": 1e-300}}}},
        [],
        ["axes.refinement.learning_rate.range", "write from 1 to"],
    ),
    ("a place as an axis", {"axes": {"data.root": ["a", "b"]}}, [], ["data.root is no axis", "a sweep of each"]),
    ("a seed that is none", {"seeds": [1.5]}, [], ["seeds: 1.5 is no seed"]),
    ("an override without =", {}, ["refinement.epochs"], ["is no override"]),
    ("a wrong override", {}, ["refinement.epochs=many"], ["refinement.epochs = 'many'"]),
    ("a wrong override of the sweep", {}, ["max_jobs=0"], ["max_jobs = 0"]),
    (
        "several tasks in a job of Slurm",
        {},
        ["cluster.executor=slurm", "cluster.slurm.refine.tasks_per_node=4"],
        ["cluster.slurm.refine", "tasks_per_node = 4", "set both to 1"],
    ),
]


@pytest.mark.parametrize(
    ("values", "overrides", "expected"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG]
)
def test_one_line_and_status_two(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str],
    values: dict[str, Any], overrides: list[str], expected: list[str],
) -> None:  # fmt: skip
    sweep = write(tmp_path, make_config, **values)
    assert run_stage("sweep", [sweep, *overrides]) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and line.startswith("hpcguard sweep: ")
    assert all(part in line for part in expected), line
    assert not (tmp_path / "sweep").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write(tmp_path, make_config)
    before = sorted(tmp_path.rglob("*"))
    assert run_stage("sweep", [sweep, "--dry-run", "seeds=[0,1,2]"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "cells        9" in said
    # 9 evaluations, 9 trainings and the baseline, one store; alone 6 cells need 4 jobs each and 3 need 3
    assert "jobs         20 distinct; 33 if every cell did its own" in said
    assert "cost         unknown" in said


def test_a_run_folder_is_no_sweep(
    tmp_path: Path, make_config: MakeConfig, attributed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage("sweep", [write(tmp_path, make_config), f"run={attributed}"]) == 2
    assert "is the folder of a single run" in capsys.readouterr().err
    assert run_stage("sweep", [str(attributed)]) == 2
    assert "holds no sweep.yaml" in capsys.readouterr().err
