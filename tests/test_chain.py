"""The stages together, as commands: whole, killed, repeated, in other numbers of processes and shards."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from hpcguard.cli import main, run_stage
from hpcguard.cluster.plan import read_plan
from hpcguard.store import open_rows

MakeConfig = Callable[..., Path]


def baseline_weights(attributed: Path) -> str:
    return str(attributed / "checkpoints/baseline/model.safetensors")


def config_with_weights(folder: Path, make_config: MakeConfig, attributed: Path, **changes: object) -> str:
    """A configuration that explains the trained baseline of the shared run as a given model."""
    model = {"weights": baseline_weights(attributed)}
    return str(make_config(folder, baseline=None, model=model, **changes))


def assert_same_store(one: Path, other: Path) -> None:
    first, second = open_rows(one / "store.h5"), open_rows(other / "store.h5")
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        assert values.tobytes() == second[name].tobytes(), name


def command(stage: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"hpcguard.{stage}", *arguments]


@pytest.mark.parametrize(("workers", "shards"), [(1, 7), (2, 1), (3, 15)])
def test_stores_do_not_depend_on_workers_or_shards(
    tmp_path: Path, make_config: MakeConfig, attributed: Path, workers: int, shards: int
) -> None:
    """The shared run has 4 shards by 2 workers."""
    cluster = {"workers": workers, "shards": shards}
    config = config_with_weights(tmp_path, make_config, attributed, cluster=cluster)
    assert run_stage("attribute", [config]) == 0
    assert run_stage("consolidate", [config]) == 0
    assert read_plan(tmp_path / "run/plan.json").num_shards == shards
    assert_same_store(tmp_path / "run", attributed)


def test_consolidation_with_two_mpi_ranks_gives_the_same(
    tmp_path: Path, attributed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    (run / "store.h5").unlink()
    single = json.loads((run / "store.json").read_text())
    assert run_stage("consolidate", [str(run), "cluster.mpi_ranks=2"]) == 0
    assert "2 rank(s)" in capfd.readouterr().out
    assert json.loads((run / "store.json").read_text()) == single  # and so the digest of store.h5
    assert_same_store(run, attributed)
    # A shard that a rank finds damaged: one line, status 2, and no store.
    (run / "store.h5").unlink()
    shard = run / "shards/00001.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run_stage("consolidate", [str(run), "cluster.mpi_ranks=2"]) == 2
    error = capfd.readouterr().err.strip()
    assert error.startswith("hpcguard consolidate: 1 of 4 shards")
    assert "00001 (its bytes differ" in error
    assert error.count("\n") == 0
    assert not (run / "store.h5").exists()


def manifests(run: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run / "shards").glob("0*.json")}


def test_a_killed_attribution_goes_on_with_what_is_missing(
    tmp_path: Path, make_config: MakeConfig, attributed: Path
) -> None:
    """kill -9 of the stage, or of its whole group, as soon as 1, 4 and 9 of 15 shards are there; then compare."""
    heavy = {"attribution": {"num_samples": 1500}, "cluster": {"workers": 1, "shards": 15}}
    folders = [tmp_path / "killed", tmp_path / "whole"]
    for folder in folders:
        folder.mkdir()
    killed, whole = (config_with_weights(folder, make_config, attributed, **heavy) for folder in folders)
    run = tmp_path / "killed/run"
    kept: dict[str, int] = {}
    for turn, goal in enumerate((1, 4, 9)):
        process = subprocess.Popen(command("attribute", killed), stdout=subprocess.DEVNULL, start_new_session=True)
        while process.poll() is None and len(manifests(run)) < goal:
            time.sleep(0.002)
        if turn % 2:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)  # orphaned workers notice within half a second
        published = manifests(run)
        assert goal <= len(published) < 15
        assert kept.items() <= published.items()  # nothing is done twice
        kept = published
    done = subprocess.run(command("attribute", killed), capture_output=True, text=True, check=True)
    assert f"{len(kept)} done, {15 - len(kept)} to do" in done.stdout
    assert kept.items() <= manifests(run).items()
    assert run_stage("consolidate", [killed]) == 0
    assert run_stage("attribute", [whole]) == 0
    assert run_stage("consolidate", [whole]) == 0
    assert_same_store(run, tmp_path / "whole/run")


def test_a_damaged_or_deleted_shard_is_redone_alone(
    tmp_path: Path, attributed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    stamps = {path.name: path.stat().st_mtime_ns for path in (run / "shards").glob("*.h5")}
    (run / "shards/00002.h5").unlink()
    damaged = run / "shards/00000.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert run_stage("consolidate", [str(run)]) == 2
    assert "00000 (its bytes differ" in capsys.readouterr().err
    assert run_stage("attribute", [str(run)]) == 0
    output = capsys.readouterr().out
    assert "2 done, 2 to do" in output
    assert "shard 00000: its bytes differ from the manifest's digest; doing it again" in output
    for name in ("00001.h5", "00003.h5"):
        assert (run / "shards" / name).stat().st_mtime_ns == stamps[name]
    assert run_stage("consolidate", [str(run)]) == 0
    assert_same_store(run, attributed)


def test_a_dry_run_starts_and_writes_nothing(
    tmp_path: Path, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage("attribute", [str(make_config(tmp_path)), "--dry-run"]) == 0
    output = capsys.readouterr().out
    for part in ("120 of digits", "4 shards", "shard 00003", "3,840 model rows", "s with one worker"):
        assert part in output
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, attributed: Path) -> Path:
    """The shared run taken to its report, with DeepSpeed in two processes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(attributed, run)
    assert run_stage("refine", [str(run), "refinement.engine=deepspeed", "refinement.processes=2"]) == 0
    for stage in ("evaluate", "report"):
        assert run_stage(stage, [str(run), "evaluation.autoattack=fast"]) == 0
    return run


def test_the_chain_ends_in_results_and_a_report(finished: Path) -> None:
    start = load_file(baseline_weights(finished))
    for arm in ("pgd", "guided"):
        training = json.loads((finished / f"checkpoints/{arm}/training.json").read_text())
        assert training["world_size"] == 2
        assert training["steps"] == 6
        weights = load_file(str(finished / f"checkpoints/{arm}/model.safetensors"))
        assert weights.keys() == start.keys()
        assert any(not np.array_equal(weights[key], start[key]) for key in start)
        assert sorted(path.name for path in (finished / f"checkpoints/{arm}").iterdir()) == [
            ".lock", "best.safetensors", "events", "log.jsonl", "model.safetensors", "steps.jsonl", "training.json",
        ]  # fmt: skip
    assert training["spurious"]["flagged"] > 0
    for arm in ("baseline", "pgd", "guided"):
        attacks = json.loads((finished / f"results/{arm}.json").read_text())["attacks"]
        assert list(attacks) == ["clean", "fgsm", "pgd-4", "pgd-4-margin", "autoattack-fast"]
        right = [row["right"] for row in attacks.values()]
        assert right[0] >= right[1]
        assert right[0] >= right[4]
        assert all(row["of"] == 24 and row["low"] <= row["accuracy"] <= row["high"] for row in attacks.values())
    assert (finished / "report/index.html").stat().st_size > 10_000


def test_everything_done_is_found_and_kept(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stamps() -> dict[str, int]:
        kept = ("shards", "checkpoints", "results", "store.h5", "plan.json")
        return {str(p): p.stat().st_mtime_ns for name in kept for p in [finished / name, *(finished / name).rglob("*")]}

    before = stamps()
    for stage, changes in (
        ("attribute", []),
        ("consolidate", []),
        ("refine", ["refinement.engine=deepspeed", "refinement.processes=2"]),
        ("evaluate", ["evaluation.autoattack=fast"]),
    ):
        assert run_stage(stage, [str(finished), *changes]) == 0
    assert stamps() == before
    output = capsys.readouterr().out
    for part in ("all 4 shards", "store.h5 is there", "guided is trained already", "baseline is measured already"):
        assert part in output


def test_status_tells_what_is_there(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert state["shards"] == {"state": "done", "planned": 4, "done": 4, "missing": [], "images": 120}
    assert state["store"]["state"] == "done"
    assert {arm: row["trained"] for arm, row in state["arms"].items()} == dict.fromkeys(
        ("baseline", "pgd", "guided"), True
    )
    assert state["arms"]["guided"]["accuracy"].keys() == {"clean", "fgsm", "pgd-4", "pgd-4-margin", "autoattack-fast"}
    assert main(["status", str(finished)]) == 0
    assert "4 of 4" in capsys.readouterr().out


def test_status_never_calls_unknown_done(tmp_path: Path, attributed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    (run / "shards/00001.json").unlink()
    (run / "store.json").write_text("{")
    assert run_stage("status", [str(run), "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert (state["shards"]["state"], state["shards"]["missing"]) == ("incomplete", [1])
    assert state["store"]["state"] == "unknown"
    (run / "plan.json").write_text("{}")
    assert run_stage("status", [str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"]["state"] == "unknown"


def test_the_plan_holds_for_every_stage(tmp_path: Path, attributed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline that was trained again, or other settings or data: refused wherever the explanations are used."""
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    for stage in ("attribute", "consolidate", "refine"):
        for change in ("attribution.num_samples=99", "data.size=16", "data.seed=9"):
            assert run_stage(stage, [str(run), change]) == 2
            assert f"{change.split('=')[0]} was" in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints/baseline")
    assert run_stage("refine", [str(run), "--arm", "baseline", "baseline.seed=7"]) == 0
    for stage in ("attribute", "consolidate", "refine"):
        assert run_stage(stage, [str(run)]) == 2
        assert "model.weights_sha256 was" in capsys.readouterr().err


def test_workers_use_the_settings_of_their_command(tmp_path: Path, make_config: MakeConfig, attributed: Path) -> None:
    """Another stage may rewrite config.yaml while shards are computed."""
    config = config_with_weights(tmp_path, make_config, attributed, cluster={"workers": 1, "shards": 15})
    process = subprocess.Popen(command("attribute", config), stdout=subprocess.DEVNULL)
    recorded = tmp_path / "run/config.yaml"
    while process.poll() is None and not recorded.exists():
        time.sleep(0.002)
    recorded.write_text(recorded.read_text().replace("num_samples: 32", "num_samples: 8"))
    assert process.wait() == 0
    recorded.unlink()
    assert run_stage("consolidate", [config]) == 0
    assert_same_store(tmp_path / "run", attributed)


def test_late_stages_record_only_their_own_settings(tmp_path: Path, attributed: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    before = yaml.safe_load((run / "config.yaml").read_text())
    assert before["recorded"].keys() >= {"data_sha256", "weights_sha256", "revision"}
    changes = ["evaluation.images=5", "evaluation.explained=0", "attribution.seed=4"]
    assert run_stage("evaluate", [str(run), *changes]) == 0
    after = yaml.safe_load((run / "config.yaml").read_text())
    assert after["evaluation"]["images"] == 5
    assert after["attribution"] == before["attribution"]
    assert after["recorded"] == before["recorded"]
    assert run_stage("attribute", [str(run)]) == 0


def test_a_log_torn_by_a_kill_does_no_harm(tmp_path: Path, attributed: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(attributed, run)
    folder = run / "checkpoints/guided"
    folder.mkdir()
    (folder / "log.jsonl").write_text('{"epoch": 7, "loss": 1}\n{"epo')
    assert run_stage("refine", [str(run), "--arm", "guided"]) == 0
    assert [json.loads(line)["epoch"] for line in (folder / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((folder / "training.json").read_text())["last_epoch"]["epoch"] == 2
