"""`hpcguard status`: what it says of run folders made by hand, of processes that hold locks, and of a real Slurm."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slurm_cluster import Slurm

from hpcguard.cli import ALIASES, main, run_stage
from hpcguard.cluster import evidence
from hpcguard.cluster.overview import Published, recent_work
from hpcguard.cluster.plan import agree_on_plan, make_plan
from hpcguard.runs import RunFolder, write_json

SHARDS, ROWS = 6, 8
NOW = 1_700_000_000.0


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A planned run of six shards of eight images, nothing done."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    plan = make_plan(np.arange(SHARDS * ROWS), ROWS, SHARDS, {"made": "by hand"})
    agree_on_plan(folder.plan, plan)
    folder.config.write_text("data: {name: digits}\n")
    return folder


def publish(folder: RunFolder, index: int, **changes: Any) -> None:
    fingerprint = json.loads(folder.plan.read_text())["fingerprint"]
    manifest = {
        "fingerprint": fingerprint, "rows": ROWS, "shard": index, "seconds": 10.0 + index, "host": f"n{index}",
        "published": NOW + index, "quarantined": [],
    }  # fmt: skip
    folder.shard(index).touch()
    write_json(folder.manifest(index), {**manifest, **changes})


def fail(folder: RunFolder, index: int, attempt: str, kind: str, final: bool, **changes: Any) -> Path:
    record = {
        "shard": index, "attempt": attempt, "kind": kind, "final": final, "message": f"{kind} of {index}",
        "signature": None, "tail": "", "host": "n0", "job": None, "log": None, "units": 0, "time": NOW,
    }  # fmt: skip
    path = folder.failure(index, attempt)
    write_json(path, {**record, **changes})
    return path


def submission(folder: RunFolder, number: int, tasks: list[list[int]], jobs: list[dict[str, Any]]) -> Path:
    path = folder.submission(number)
    write_json(path / "submission.json", {"number": number, "tasks": tasks, "shards": SHARDS, "time": NOW})
    write_json(path / "jobs.json", {"jobs": jobs})
    return path


@pytest.fixture
def look(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> Any:
    def look() -> dict[str, Any]:
        capsys.readouterr()
        assert main(["status", str(folder.path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return look


def text(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["status", str(folder.path)]) == 0
    return capsys.readouterr().out


def test_a_shard_is_done_only_if_file_and_manifest_fit_the_plan(folder: RunFolder, look: Any) -> None:
    for index in range(SHARDS):
        publish(folder, index)
    assert look()["shards"] == {"state": "done", "planned": 6, "done": 6, "missing": [], "images": 48}
    folder.shard(0).unlink()
    publish(folder, 1, fingerprint="another")
    publish(folder, 2, rows=7)
    publish(folder, 3, rows=7, quarantined=[{"image": 30, "why": "cannot be read"}])  # seven and that one are all
    folder.manifest(4).write_text('{"fingerpr')
    shards, progress = (look()[key] for key in ("shards", "progress"))
    assert (shards["state"], shards["done"], shards["missing"]) == ("incomplete", 2, [0, 1, 2, 4])
    why = {row["shard"]: row["why"] for row in progress["unusable"]["first"]}
    assert [part in why[index] for index, part in ((0, "file"), (1, "plan"), (2, "7 rows"), (4, "JSON"))] == [True] * 4
    assert (progress["waiting"], progress["running"], progress["unknown"]) == (4, 0, 0)


def test_failures_and_interruptions_by_class(folder: RunFolder, look: Any, capsys: pytest.CaptureFixture[str]) -> None:
    publish(folder, 0)
    fail(folder, 0, "a.r0-1", "error", True)  # done since
    fail(folder, 1, "a.r0-2", "pre-empted", False)
    fail(folder, 1, "a.r1-3", "pre-empted", False)
    fail(folder, 2, "a.r0-4", "time-out", False)
    log = folder.path / "some.log"
    log.write_text("\n".join(f"line {k}" for k in range(100)))
    fail(folder, 3, "a.r0-5", "out-of-memory", True, log=str(log))
    fail(folder, 4, "a.r0-6", "error", True, message="ValueError: [red]x[/red]", tail="Traceback\n  [bold]y\x1b[0m")
    fail(folder, 5, "a.r0-7", "error", True).rename(f"{folder.failure(5, 'a.r0-7')}.forgiven")
    folder.failure(5, "torn").write_text("{")
    state = look()
    progress = state["progress"]
    assert progress["failed"] == {"out-of-memory": 1, "error": 1}
    assert (progress["done"], progress["waiting"]) == (1, 3)
    assert progress["unreadable_records"] == ["00005.torn.json: damaged, not JSON"]
    assert state["interrupted"] == {"pre-empted": 2, "time-out": 1}
    examples = {row["kind"]: row for row in state["failing"]}
    assert (examples["error"]["shard"], examples["error"]["shards"]) == (4, 1)
    assert examples["out-of-memory"]["tail"].splitlines()[-1] == "line 99"
    shown = text(folder, capsys)
    for part in ("ValueError: [red]x[/red]", "[bold]y [0m", f"log: {log}", "pre-empted 2, time-out 1", "failed 2"):
        assert part in shown


def test_quarantined_slowest_and_rate(folder: RunFolder, look: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for index, seconds in enumerate((4.0, 9.0, 1.0)):
        publish(folder, index, seconds=seconds, published=NOW + 10 * index)
    publish(folder, 3, rows=6, published=NOW + 30, quarantined=[{"image": k, "why": "all NaN"} for k in (24, 25)])
    state = look()
    assert state["quarantined"]["ids"] == [24, 25]
    assert state["quarantined"]["first"][0] == {"image": 24, "shard": 3, "why": "all NaN"}
    assert [(row["shard"], row["seconds"]) for row in state["slowest"]] == [(3, 13.0), (1, 9.0), (0, 4.0), (2, 1.0)]
    # Computing lasted 4 s, 9 s, 1 s and 13 s, the last of which begins before the third shard: 26.
    assert state["speed"]["images_per_second"] == pytest.approx(30 / 26)
    assert (state["speed"]["images_left"], state["speed"]["seconds_left"]) == (16, None)
    assert "24 (shard 00003): all NaN" in text(folder, capsys)


def shard_at(time: float, seconds: float) -> Published:
    return Published("f", 100, None, seconds, "n0", time, ())


def test_recent_work_of_waves_of_single_tasks_and_after_a_night() -> None:
    wave = [shard_at(3600.0 * hour + late, 3600.0) for hour in (1, 2, 3, 4, 5, 6) for late in range(50)]
    recent, seconds = recent_work(wave)
    assert 100 * len(recent) / seconds == pytest.approx(50 * 100 / 3600, rel=0.02)
    one_by_one = [shard_at(36.0 * k + 3600, 3600.0) for k in range(1000)]
    recent, seconds = recent_work(one_by_one)
    assert 100 * len(recent) / seconds == pytest.approx(100 / 36, rel=0.02)
    night = [shard_at(10.0 * k, 10.0) for k in range(1, 11)] + [shard_at(400 + 10.0 * k, 10.0) for k in range(1, 11)]
    recent, seconds = recent_work(night)
    assert (len(recent), seconds) == (20, 200)  # 300 s in which nothing ran do not count
    assert recent_work([]) == ([], 0.0)


def test_a_held_lock_is_a_running_shard_and_nothing_is_written(folder: RunFolder, look: Any) -> None:
    publish(folder, 0)
    folder.lock(2).touch()  # left by nobody
    with folder.lock(1).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
        state = look()
        assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")} == before
    assert (state["progress"]["running"], state["progress"]["waiting"]) == (1, 4)
    assert state["speed"]["seconds_left"] == pytest.approx(40 / state["speed"]["images_per_second"], abs=0.1)
    assert look()["progress"]["running"] == 0


def test_a_slurm_that_does_not_answer_makes_shards_unknown(
    folder: RunFolder, look: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(folder, 0)
    fail(folder, 1, "a", "error", True)
    path = submission(folder, 1, [[k] for k in range(SHARDS)], [{"kind": "attribute", "job": "7", "tasks": 6}])
    monkeypatch.setenv("PATH", "/nowhere")
    state = look()
    progress = state["progress"]
    assert [progress[key] for key in ("running", "pending", "waiting")] == ["unknown"] * 3
    assert (progress["done"], progress["failed"], progress["unknown"]) == (1, {"error": 1}, 4)
    assert state["slurm"]["jobs_in_queue"] == state["speed"]["seconds_left"] == "unknown"
    assert "squeue" in state["slurm"]["why"]
    assert "attribute 7 (6 tasks): unknown" in text(folder, capsys)
    (path / "jobs.json").write_text('{"jobs": 3}')
    assert "jobs.json: damaged" in text(folder, capsys)


def test_a_second_look_reads_only_what_is_new(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(folder, 0)
    publish(folder, 1)
    read: list[str] = []
    real = evidence.read_manifest
    monkeypatch.setattr(evidence, "read_manifest", lambda path: (read.append(path.name), real(path))[1])
    watcher = evidence.Watcher(folder)
    watcher.look()
    watcher.look()
    assert sorted(read) == ["00000.json", "00001.json"]
    publish(folder, 1, rows=1)
    publish(folder, 2)
    again = watcher.look()
    assert sorted(read[2:]) == ["00001.json", "00002.json"]
    assert again.published[1].rows == 1


def command(folder: RunFolder, *options: str) -> list[str]:
    return [sys.executable, "-m", "hpcguard.status", str(folder.path), *options]


def test_watch_prints_a_line_a_change_until_nothing_runs(folder: RunFolder) -> None:
    publish(folder, 0)
    with folder.lock(1).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(command(folder, "--watch", "0.1"), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert "1 of 6 shards, running 1" in process.stdout.readline()
        publish(folder, 1)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2 of 6 shards, running 0" in rest
    assert "incomplete, 2 of 6" in rest  # at the end, everything


def test_watch_on_a_terminal_until_interrupted(folder: RunFolder) -> None:
    with folder.lock(1).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen(
            command(folder, "--watch"), stdout=theirs, stderr=theirs, env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which the tests' own processes ignore
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while b"report" not in shown:
            shown += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        os.close(ours)
    assert b"running 1" in shown


@pytest.mark.parametrize("options", [["--watch", "0"], ["--watch", "soon"], ["--watch", "1", "--json"]])
def test_bad_options(folder: RunFolder, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_stage("status", [str(folder.path), *options])
    assert caught.value.code == 2
    assert "--watch" in capsys.readouterr().err


def test_retry_is_attribute_retry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    called: list[Any] = []
    monkeypatch.setattr("hpcguard.cli.run_stage", lambda name, given: called.append((name, given)) or 0)
    assert main(["retry", "runs/x", "cluster.workers=1"]) == 0
    assert called == [("attribute", ["runs/x", "cluster.workers=1"])]
    assert main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ALIASES)


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    return slurm


def test_shards_of_tasks_in_a_real_queue(
    folder: RunFolder, look: Any, cluster: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task with two shards runs, another waits, one shard is in no task of the queue, one job is nobody's."""
    publish(folder, 0)
    comment = f"--comment={folder.path}"
    name = "--job-name=hpcguard-attribute-0002-1"  # array index i is task 1 + i
    array = cluster.sbatch("sleep 60", "--array=0-1%1", name, comment)
    after = cluster.sbatch("true", "--job-name=hpcguard-consolidate-0002", comment, f"--dependency=afterany:{array}")
    stranger = cluster.sbatch("sleep 60", "--job-name=hpcguard-attribute-0002-0", "--comment=/another/run")
    jobs = [{"kind": "attribute", "job": array, "first_task": 1, "tasks": 2}, {"kind": "consolidate", "job": after}]
    submission(folder, 2, [[5], [0, 1, 2], [3, 4]], jobs)
    try:
        cluster.wait_for(lambda: cluster.state(f"{array}_0") == "RUNNING")
        state = look()
        progress = {key: state["progress"][key] for key in ("done", "running", "pending", "waiting", "unknown")}
        assert progress == {"done": 1, "running": 1, "pending": 3, "waiting": 1, "unknown": 0}
        shown = {row["kind"]: row for row in state["slurm"]["submissions"][0]["jobs"]}
        assert shown["attribute"]["states"] == {"RUNNING": 1, "PENDING": 1}
        assert (shown["consolidate"]["states"], shown["consolidate"]["reasons"]) == ({"PENDING": 1}, {"Dependency": 1})
        # Two workers of one task: each has begun its journal.
        for index in (1, 2):
            folder.journal(index, f"{array}_0.r0-abcdef").touch()
        write_json(folder.submission(2) / "jobs.json", {"jobs": jobs[:1]})  # ended between sbatch and the record
        state = look()
        assert (state["progress"]["running"], state["progress"]["pending"]) == (2, 2)
        assert [row["job"] for row in state["slurm"]["submissions"][0]["jobs"]] == [array, after]
        write_json(folder.submission(2) / "submission.json", {"tasks": []})
        assert look()["progress"]["unknown"] == 5  # which shards these tasks have is not known
    finally:
        cluster.run(f"scancel {array} {after} {stranger}")
    cluster.wait_for(lambda: not cluster.run("squeue -h"))


def test_a_cancelled_dependant_is_shown_with_why(
    folder: RunFolder, cluster: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    refine = cluster.sbatch("true", "--hold", "--job-name=hpcguard-refine-0001", f"--comment={folder.path}")
    path = submission(folder, 1, [[k] for k in range(SHARDS)], [{"kind": "refine", "job": refine}])
    write_json(
        path / "settled.json", {"state": "gave up", "why": ["2 shards failed: error"], "next": None, "time": NOW}
    )
    write_json(path / "stopped.json", {"why": "3 equal errors", "time": NOW})
    cluster.run(f"scancel {refine}")
    cluster.wait_for(lambda: cluster.state(refine) == "CANCELLED")
    shown = text(folder, capsys)
    assert f"refine {refine}: 1 CANCELLED: stopped early: 3 equal errors" in shown
    assert "submission 0001: gave up" in shown
    assert "2 shards failed: error" in shown
    (path / "stopped.json").unlink()
    write_json(path / "settled.json", {"state": "gave up", "why": [f"shard {k}" for k in range(99)], "next": None})
    shown = text(folder, capsys)
    assert f"refine {refine}: 1 CANCELLED: shard 0\n" in shown
    assert "... and 91 more" in shown


def test_a_finished_run_of_the_real_writers(tmp_path: Path, attributed: Path, folder: RunFolder, look: Any) -> None:
    shutil.rmtree(folder.path)
    shutil.copytree(attributed, folder.path)
    folder.path.chmod(0o700)
    state = look()
    assert (state["shards"]["state"], state["store"]["state"]) == ("done", "done")
    assert state["speed"]["images_per_second"] > 0
    assert state["speed"]["last_published"] < time.time()
    assert len(state["slowest"]) == 4
