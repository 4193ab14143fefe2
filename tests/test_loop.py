"""The closed loop, as a command: rounds that follow from each other, reasons to stop, a kill in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from hpcguard.cli import run_stage
from hpcguard.cluster.plan import read_plan
from hpcguard.config import LoopConfig
from hpcguard.loop import Round, best, stop_reason
from hpcguard.metrics.attribution import mean_set_jaccard
from hpcguard.runs import LoopFolder, digest_file, exclusive

MakeConfig = Callable[..., Path]


def rounds(*robust: float | None, jaccard: float | None = None) -> list[Round]:
    found = [Round(k, f"weights {k}", 0.9, value, {}, None) for k, value in enumerate(robust, 1)]
    if jaccard is not None:
        found[-1] = Round(len(found), found[-1].weights, 0.9, robust[-1], {}, jaccard)
    return found


def test_reasons_to_stop() -> None:
    settings = LoopConfig(rounds=3, min_gain=0.01, max_jaccard=0.9)
    assert stop_reason([], settings) is None
    assert stop_reason(rounds(0.5), settings) is None
    assert stop_reason(rounds(0.5, 0.52), settings) is None
    assert "round 2 gains +0.005" in (stop_reason(rounds(0.5, 0.505), settings) or "")
    assert "round 3 gains -0.010" in (stop_reason(rounds(0.4, 0.5, 0.49), settings) or "")  # than the best before
    assert "all 3 rounds" in (stop_reason(rounds(0.4, 0.5, 0.6), settings) or "")
    assert "Jaccard 0.900" in (stop_reason(rounds(0.4, 0.5, jaccard=0.9), settings) or "")
    assert stop_reason(rounds(0.4, 0.5, jaccard=0.89), settings) is None
    never = LoopConfig(rounds=3, min_gain=None, max_jaccard=None)
    assert stop_reason(rounds(0.5, 0.1, jaccard=1.0), never) is None
    assert stop_reason(rounds(None, None), settings) is None


def test_the_best_round_is_that_of_the_validation_split() -> None:
    assert best(rounds(0.4, 0.6, 0.6)).number == 2
    assert best(rounds(None, None)).number == 2


def test_the_jaccard_index_of_sets_of_segments() -> None:
    one = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    other = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]], bool)
    assert mean_set_jaccard(one, other) == pytest.approx((1 / 3 + 1 + 0) / 3)


def small(folder: Path, make_config: MakeConfig, attributed: Path, **loop: object) -> str:
    return str(
        make_config(
            folder, baseline=None, model={"weights": str(attributed / "checkpoints/baseline/model.safetensors")},
            data={"train_images": 96}, cluster={"shards": 2, "workers": 1}, controls={},
            refinement={"engine": "torch", "processes": 1, "epochs": 1, "batch_size": 32},
            evaluation={"images": 16, "autoattack": "none", "workers": 1, "explained": 0},
            loop={"rounds": 2, "min_gain": None, "max_jaccard": None, **loop},
        )
    )  # fmt: skip


def test_rounds_follow_from_each_other_and_survive_a_kill(
    tmp_path: Path, make_config: MakeConfig, attributed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, make_config, attributed)
    folder = LoopFolder(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-m", "hpcguard", "loop", config], start_new_session=True)
    end = time.monotonic() + 120
    while not (folder.round(2) / "plan.json").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = digest_file(folder.round(1) / "checkpoints/guided/model.safetensors")
    assert run_stage("loop", [config]) == 0
    assert digest_file(folder.round(1) / "checkpoints/guided/model.safetensors") == first  # not trained again
    assert read_plan(folder.round(2) / "plan.json").identity["model"]["weights_sha256"] == first
    record = json.loads(folder.record.read_text())
    assert record["stopped"] == "all 2 rounds are done"
    assert [each["number"] for each in record["rounds"]] == [1, 2]
    assert record["rounds"][0]["jaccard"] is None
    assert 0 < record["rounds"][1]["jaccard"] < 1
    one, two = (load_file(folder.round(k) / "checkpoints/guided/model.safetensors") for k in (1, 2))
    assert any(not np.array_equal(one[name], two[name]) for name in one)
    assert 0 < record["rounds"][0]["spurious"]["flagged"] < 1
    said = capfd.readouterr().out
    assert "refine: guided is trained already" in said
    assert (folder.round(2) / "report/index.html").exists()
    for executor in ("local", "slurm"):  # finished rounds of other settings are not taken for these
        before = folder.round_config(1).read_bytes()
        assert run_stage("loop", [config, "refinement.learning_rate=0.3", f"cluster.executor={executor}"]) == 2
        assert "round-1.yaml: that round was done with other settings: refinement." in capfd.readouterr().err
        assert folder.round_config(1).read_bytes() == before


def test_told_to_stop_it_tells_its_stage(tmp_path: Path, make_config: MakeConfig, attributed: Path) -> None:
    config = small(tmp_path, make_config, attributed)
    command = [sys.executable, "-m", "hpcguard", "loop", config, "refinement.epochs=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    guided = LoopFolder(tmp_path / "run").round(1) / "checkpoints/guided"
    end = time.monotonic() + 120
    while not list(guided.glob("state-*")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.terminate()  # the loop alone
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "was told to stop and is saved" in said
    assert "the same command goes on from there" in said
    with exclusive(guided, 0):  # nobody is training on
        pass


def test_killed_alone_it_takes_its_stage_along(tmp_path: Path, make_config: MakeConfig, attributed: Path) -> None:
    config = small(tmp_path, make_config, attributed)
    process = subprocess.Popen([sys.executable, "-m", "hpcguard", "loop", config, "refinement.epochs=100000"])
    guided = LoopFolder(tmp_path / "run").round(1) / "checkpoints/guided"
    try:
        end = time.monotonic() + 120
        while not list(guided.glob("state-*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    with exclusive(guided, 60):  # nobody is training on
        pass


def test_what_cannot_be_a_loop(
    tmp_path: Path, make_config: MakeConfig, attributed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, make_config, attributed)

    def refused(*changes: str) -> str:
        assert run_stage("loop", [config, *changes]) == 2
        return capsys.readouterr().err

    assert "set data.validation" in refused("loop.min_gain=0", "data.validation=0")
    assert "uses no explanations" in refused("refinement.masking.weight=0", "refinement.sensitivity.weight=0")
    assert "is the folder of a single run" in refused(f"run={attributed}")
    assert run_stage("loop", [config, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "round 2: " in said and "round-1/checkpoints/guided/model.safetensors" in said
    assert not (tmp_path / "run").exists()


def test_a_stage_that_fails_stops_the_loop(
    tmp_path: Path, make_config: MakeConfig, attributed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = small(tmp_path, make_config, attributed)
    assert run_stage("loop", [config, "refinement.batch_size=4096"]) == 2
    captured = capfd.readouterr()
    assert "batch_size = 4096" in captured.err
    assert "round 1 stopped with exit status 2; the same command goes on" in captured.out
    assert not LoopFolder(tmp_path / "run").round_config(2).exists()
