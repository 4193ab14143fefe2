"""What a task does inside its job, without a cluster."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hpcguard.cluster import slurm, submit
from hpcguard.cluster.submission import Job
from hpcguard.config.sweep import load_sweep
from hpcguard.errors import InputError
from hpcguard.runs import claimed, exclusive, write_json
from hpcguard.sweeps import local, overview, slurm_task
from hpcguard.sweeps.folder import SweepFolder, read_plan, write_plan
from hpcguard.sweeps.grid import expand
from hpcguard.sweeps.jobs import plan_jobs
from hpcguard.sweeps.slurm_state import look, new_submission, read_submissions

OFF = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}


@pytest.fixture
def submitted(
    tmp_path: Path, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., SweepFolder]:
    """A sweep of one cell that needs no store, as if its one task had just been started."""

    def make(**refinement: Any) -> SweepFolder:
        base = make_config(tmp_path, cluster={"executor": "slurm", "workers": 1, "shards": 1})
        cell = {"name": "one", "refinement": {**OFF, "start": "scratch", **refinement}}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({"run": str(tmp_path / "sweep"), "base": str(base), "cells": [cell]}))
        sweep, config = load_sweep(path, [])
        folder, graph = SweepFolder(sweep.run), plan_jobs(sweep.run, config, expand(sweep))
        folder.create()
        write_plan(folder, sweep, config, graph)
        submission = new_submission(folder, [list(graph.jobs)])
        monkeypatch.setattr(submit, "own_submission", lambda: submission.folder)
        return folder

    return make


def test_warned_it_saves_and_asks_to_be_run_again(
    submitted: Callable[..., SweepFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(epochs=100_000)
    states = "models/*/checkpoints/*/state-*"
    warnings = iter([True])  # a signal is taken once
    monkeypatch.setattr(submit, "told_to_stop", lambda: bool(list(folder.path.glob(states))) and next(warnings, False))
    asked: list[float] = []
    monkeypatch.setattr(slurm, "requeue_self", lambda: asked.append(time.monotonic()))
    with pytest.raises(SystemExit) as ended:
        slurm_task.sweep_task(0)
    assert ended.value.code == 1 and len(asked) == 1
    (log,) = folder.path.glob("logs/*.log")
    assert "was told to stop and is saved" in log.read_text()
    assert not list(folder.path.glob("jobs/*.json"))  # it has not failed
    with exclusive(next(folder.path.glob("models/*/checkpoints/*")), 0):  # nobody is training on
        pass
    assert "to be requeued" in capsys.readouterr().out


def test_a_failure_is_recorded_and_is_the_jobs_end(
    submitted: Callable[..., SweepFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = submitted(batch_size=4096)
    monkeypatch.setattr(submit, "told_to_stop", lambda: False)
    monkeypatch.setattr(slurm, "requeue_self", lambda: pytest.fail("it was not warned"))
    with pytest.raises(SystemExit) as ended:
        slurm_task.sweep_task(0)
    assert ended.value.code == 1
    (record,) = folder.path.glob("jobs/*.json")
    assert "batch_size = 4096" in json.loads(record.read_text())["why"]


def test_what_is_cancelled_has_not_failed(
    submitted: Callable[..., SweepFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm tells the task and, at the same moment, the command that it has started."""
    folder = submitted(epochs=100_000)
    monkeypatch.setattr(submit, "told_to_stop", lambda: False)
    monkeypatch.setattr(local, "LOOK_EVERY_S", 1.0)  # the command is gone before the task looks again
    own = Path(f"/proc/self/task/{threading.get_native_id()}/children")

    def cancel() -> None:
        while not list(folder.path.glob("models/*/checkpoints/*/state-*")):
            time.sleep(0.05)
        started = [int(pid) for pid in own.read_text().split()]
        os.kill(os.getpid(), signal.SIGTERM)
        for pid in set(started) - before:
            os.kill(pid, signal.SIGKILL)

    before = {int(pid) for pid in own.read_text().split()}
    canceller = threading.Thread(target=cancel, daemon=True)
    canceller.start()
    with pytest.raises(SystemExit) as ended:
        slurm_task.sweep_task(0)
    canceller.join(10)
    assert ended.value.code == 1
    assert not list(folder.path.glob("jobs/*.json"))


def test_the_last_job_writes_the_table_and_ends_as_the_cells_did(
    submitted: Callable[..., SweepFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted()
    monkeypatch.setattr(slurm, "queue", list)

    def ends() -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            slurm_task.report_task(1)
        (row,) = csv.DictReader(folder.table.read_text().splitlines())
        return ended.value.code, row["state"], capsys.readouterr().out

    code, state, said = ends()
    assert (code, state) == (0, "waiting") and "cells   1: 1 waiting" in said
    failed = next(name for name, job in read_plan(folder)[0].jobs.items() if job.kind == "refine")
    write_json(folder.record(failed), {"status": 1, "seconds": 0.5, "why": "no luck", "log": "x.log"})
    code, state, said = ends()
    assert (code, state) == (1, "failed") and "cells   1: 1 failed" in said and "no luck" in said
    assert f"report: {folder.report}" in said and folder.report.is_file()


SILENT = "Unable to contact slurm controller (connect failure)"
SQUEUE = f"""#!/bin/sh
here=$(dirname "$0")
echo >> "$here/calls"
answer=$here/$(wc -l < "$here/calls")
[ -e "$answer" ] || answer=$here/last
if [ -s "$answer" ]; then cat "$answer"; else echo "slurm_load_jobs error: {SILENT}" >&2; exit 1; fi
"""
Squeue = Callable[..., Path]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Squeue:
    """squeue(answers) puts a squeue into PATH that gives these, the last for ever; None: it cannot tell."""

    def make(*answers: list[str] | None) -> Path:
        here = tmp_path / "squeue"
        here.mkdir()
        for place, names in enumerate(answers, 1):
            rows = [("7", "7", "N/A", "PENDING", "None", name, str(tmp_path / "sweep")) for name in names or ()]
            text = "".join(f"{slurm.UNIT.join(row)}{slurm.RECORD}\n" for row in rows) or "\n"
            (here / ("last" if place == len(answers) else str(place))).write_text("" if names is None else text)
        (here / "squeue").write_text(SQUEUE)
        (here / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(here), prepend=os.pathsep)
        return here / "calls"

    return make


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, by sleeping alone."""
    total = [0.0]

    def sleep(seconds: float) -> None:
        total[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: total[0], sleep=sleep, strftime=time.strftime)
    monkeypatch.setattr(overview, "time", clock)
    return total


QUEUED = ["hpcguard-refine-0001-0"]


def test_who_follows_a_sweep_asks_again_where_slurm_does_not_answer(
    submitted: Callable[..., SweepFolder], squeue: Squeue, passed: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    calls = squeue(QUEUED, None, None, QUEUED, [])
    state = overview.follow(submitted(), 5.0)
    assert len(calls.read_text()) == 5 and state["slurm"] == {"tasks": 0, "problem": ""}
    said = capsys.readouterr().out
    assert said.count(SILENT) == 1 and "asked again, for up to 10 min" in said
    told = [line.split(" ", 1)[1] for line in said.splitlines() if "cells" in line]
    assert told == [
        "cells 1: 1 queued; jobs 2: 2 queued", "cells 1: 1 waiting; jobs 2: 2 waiting; what Slurm has is unknown",
        "cells 1: 1 queued; jobs 2: 2 queued", "cells 1: 1 waiting; jobs 2: 2 waiting",
    ]  # fmt: skip


def test_its_patience_ends_and_begins_again_with_every_answer(
    submitted: Callable[..., SweepFolder], squeue: Squeue, passed: list[float]
) -> None:
    squeue(*[None] * 9, QUEUED, *[None] * 9, QUEUED, None)
    with pytest.raises(InputError, match="Unable to contact"):
        overview.follow(submitted(), 60.0)
    assert passed[0] == (9 + 1 + 9 + 10) * 60.0


def test_what_is_seen_to_run_is_followed_without_slurm(
    submitted: Callable[..., SweepFolder], squeue: Squeue, passed: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may run here by now, where there is no Slurm."""
    squeue(None)
    folder = submitted()
    running, sleep = ExitStack(), overview.time.sleep
    running.enter_context(claimed(folder.lock(next(iter(read_plan(folder)[0].jobs)))))

    def until_an_hour(seconds: float) -> None:
        sleep(seconds)
        if passed[0] >= 3600:
            running.close()

    monkeypatch.setattr(overview.time, "sleep", until_an_hour)
    with pytest.raises(InputError, match="Unable to contact"):
        overview.follow(folder, 60.0)
    assert passed[0] == 3600 - 60 + 600


def test_the_last_job_has_not_ended_well_where_slurm_does_not_tell(
    submitted: Callable[..., SweepFolder], squeue: Squeue, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted()
    squeue(None)
    with pytest.raises(SystemExit) as ended:
        slurm_task.report_task(1)
    assert ended.value.code == 1 and folder.table.is_file()
    assert "slurm   unknown: squeue" in capsys.readouterr().out


def test_a_task_whose_sweep_has_other_jobs_by_now_says_so(submitted: Callable[..., SweepFolder]) -> None:
    folder = submitted()
    (path,) = folder.path.glob("slurm/0001/submission.json")
    path.write_text(path.read_text().replace('"refine-', '"refine-f'))
    with pytest.raises(InputError, match="has changed since it was submitted; start the sweep again"):
        slurm_task.sweep_task(0)


def test_jobs_in_the_queue_are_known_by_the_names_of_their_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    folder.sweep.touch()
    submission = new_submission(folder, [["refine-a", "evaluate-a"], ["refine-b"], ["attribute-s"]])
    submission.add(Job("refine", "7", 0, 2))
    submission.add(Job("report", "11"))
    assert [each.number for each in read_submissions(folder)] == [1]

    def queued(id: str, index: int | None, name: str, of: Path) -> slurm.QueuedJob:
        return slurm.QueuedJob(id, id.partition("_")[0], index, "PENDING", "Dependency", name, str(of))

    monkeypatch.setattr(
        slurm, "queue", lambda: [
            queued("7_1", 1, "hpcguard-refine-0001-0", folder.path),
            queued("8", None, "hpcguard-attribute-0001-2", folder.path),
            queued("9_0", 0, "hpcguard-refine-0001-0", tmp_path / "other"), queued("10", None, "mine", folder.path),
            queued("11", None, "hpcguard-report-0001", folder.path),
        ],
    )  # fmt: skip
    monkeypatch.setattr(slurm, "states", lambda ids: {"7_0": "TIMEOUT", "11": "FAILED"})
    seen = look(folder, ["refine-a", "refine-b", "attribute-s"])
    assert {name: task.id for name, task in seen.live.items()} == {"refine-b": "7_1", "attribute-s": "8"}
    assert (
        seen.ended.keys() == {"refine-a"} and "task 7_0 ended as TIMEOUT" in seen.ended["refine-a"]
    )  # not the last job
    assert seen.problem == ""

    def silent() -> list[slurm.QueuedJob]:
        raise InputError("squeue: no answer")

    monkeypatch.setattr(slurm, "queue", silent)
    assert look(folder, ["refine-a"]).problem == "squeue: no answer"
    assert look(folder, []).problem == ""  # all is done: nobody is asked
