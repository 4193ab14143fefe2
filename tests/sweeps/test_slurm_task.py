"""What a task does inside its job, without a cluster."""

import csv
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpcguard.cluster import slurm, submit
from hpcguard.cluster.submission import Job
from hpcguard.config.sweep import load_sweep
from hpcguard.errors import InputError
from hpcguard.runs import exclusive, write_json
from hpcguard.sweeps import local, overview, slurm_task
from hpcguard.sweeps.evidence import cell_states, states_with
from hpcguard.sweeps.folder import SweepFolder, read_plan, write_plan
from hpcguard.sweeps.grid import expand
from hpcguard.sweeps.jobs import plan_jobs
from hpcguard.sweeps.overview import follow
from hpcguard.sweeps.slurm_state import Seen, has_last_job, look, new_submission, read_submissions

OFF = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}


def silent() -> list[slurm.QueuedJob]:
    raise InputError("squeue: no answer")


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
    folder.record(failed).unlink()
    monkeypatch.setattr(slurm, "queue", silent)
    code, state, said = ends()
    assert (code, state) == (1, "waiting") and "unknown: squeue: no answer" in said


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

    assert has_last_job(folder)
    monkeypatch.setattr(slurm, "queue", lambda: [queued("8", None, "hpcguard-attribute-0001-2", folder.path)])
    assert not has_last_job(folder)
    monkeypatch.setattr(slurm, "queue", silent)
    assert look(folder, ["refine-a"]).problem == "squeue: no answer"


def test_who_waits_goes_on_asking_a_slurm_that_is_silent(
    submitted: Callable[..., SweepFolder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted()
    answers = iter([silent, silent, list])
    monkeypatch.setattr(slurm, "queue", lambda: next(answers)())
    assert follow(folder, 0.0)["cells"][0]["state"] == "waiting"
    assert list(answers) == []
    assert capsys.readouterr().out.count("slurm unknown: squeue: no answer") == 1
    monkeypatch.setattr(slurm, "queue", silent)
    monkeypatch.setattr(overview, "PATIENCE_S", -1.0)
    with pytest.raises(InputError, match=r"squeue: no answer; .*hpcguard status"):
        follow(folder, 0.0)


def test_what_never_began_is_held_up_by_what_failed_in_its_task(submitted: Callable[..., SweepFolder]) -> None:
    folder = submitted()
    graph, _, _ = read_plan(folder)
    (cell,) = graph.cells
    seen = Seen(ended=dict.fromkeys(graph.jobs, "its task 7_0 ended as FAILED"))
    write_json(folder.record(cell.refine), {"status": 1, "seconds": 0.5, "why": "no luck", "log": "x.log"})
    states = states_with(folder, graph, set(graph.jobs) - {cell.refine, cell.evaluate}, seen)
    assert (states[cell.refine], states[cell.evaluate]) == ("failed", "held up")
    assert cell_states(graph, states) == [("failed", cell.refine)]
    assert look(folder, []).problem == ""  # all is done: nobody is asked
