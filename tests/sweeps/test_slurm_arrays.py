"""What goes into which task and array, and waits for what; by hand on a small graph."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from hpcguard.cli import run_stage
from hpcguard.cluster import slurm as commands
from hpcguard.cluster.submission import Job as Submitted
from hpcguard.cluster.submit import Array, array_text
from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.sweeps import slurm
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Inputs, Job
from hpcguard.sweeps.slurm import Batch, asks_for, batch, check_asked, report_array, sbatch_array, submit
from hpcguard.sweeps.slurm_arrays import TaskArray, arrange, lanes
from hpcguard.sweeps.slurm_state import Submission, lacks_report, new_submission, read_submissions


def make_graph(*stores: str, arms: str = "abc") -> Graph:
    """base, then a store each with its guided arms; p and q are not guided and wait for nothing. All are evaluated."""
    jobs = [Job("refine-base", "refine", "models/m", "base", ())]
    for store in stores:
        jobs.append(Job(f"attribute-{store}", "attribute", f"stores/{store}", "", ("refine-base",)))
        jobs += [Job(f"refine-{store}{a}", "refine", f"stores/{store}", a, (f"attribute-{store}",)) for a in arms]
    jobs += [Job(f"refine-{arm}", "refine", "models/m", arm, ()) for arm in "pq"]
    jobs += [
        Job(f"evaluate-{job.name.removeprefix('refine-')}", "evaluate", job.folder, job.arm, (job.name,))
        for job in jobs
        if job.kind == "refine"
    ]
    inputs = {job.name: Inputs(None, None, None) for job in jobs}  # type: ignore[arg-type]
    return Graph([], {job.name: job for job in jobs}, inputs)


def arranged(graph: Graph, pack: int = 2, live: frozenset[str] = frozenset(), **more: int) -> list[TaskArray]:
    todo = [name for name in graph.jobs if name not in live]
    return arrange(graph, todo, live, pack, **{"largest": 1000, "at_once": 64, **more})


def test_each_array_waits_for_its_own_store_and_no_other() -> None:
    arrays = arranged(make_graph("s", "t"))
    assert [(array.kind, array.needs, array.tasks) for array in arrays] == [
        ("refine", (), [["refine-base"], ["refine-p", "refine-q", "evaluate-p", "evaluate-q"]]),
        ("attribute", ("refine-base",), [["attribute-s"], ["attribute-t"]]),
        *(
            ("refine", (f"attribute-{s}",),
             [[f"refine-{s}a", f"refine-{s}b", f"evaluate-{s}a", f"evaluate-{s}b"], [f"refine-{s}c", f"evaluate-{s}c"]])
            for s in "st"
        ),
        ("evaluate", ("refine-base",), [["evaluate-base"]]),  # its own task: the stores do not wait for it
    ]  # fmt: skip


def test_a_task_waits_for_what_its_evaluations_need() -> None:
    graph = make_graph("s")
    graph.jobs["evaluate-p"] = Job("evaluate-p", "evaluate", "models/m", "p", ("refine-p", "refine-base"))
    found = {tuple(tasks): array.needs for array in arranged(graph) for tasks in array.tasks}
    assert found["refine-p", "evaluate-p"] == ("refine-base",)
    assert found["refine-q", "evaluate-q"] == ()


def test_what_slurm_has_is_waited_for_and_not_submitted_again() -> None:
    graph = make_graph("s")
    live = frozenset({"refine-base", "attribute-s", "refine-sa", "evaluate-sa"})
    arrays = arranged(graph, live=live)
    assert {(name, array.needs) for array in arrays for task in array.tasks for name in task} == {
        *((name, ("attribute-s",)) for name in ("refine-sb", "refine-sc", "evaluate-sb", "evaluate-sc")),
        *((name, ()) for name in ("refine-p", "refine-q", "evaluate-p", "evaluate-q")),
        ("evaluate-base", ("refine-base",)),
    }


def test_what_is_done_is_not_waited_for() -> None:
    graph = make_graph("s")
    (array,) = arrange(graph, ["evaluate-sa", "evaluate-sb", "evaluate-p"], set(), 4, 1000, 64)
    assert (array.kind, array.needs, array.tasks) == ("evaluate", (), [["evaluate-sa", "evaluate-sb"], ["evaluate-p"]])


@pytest.mark.parametrize(("pack", "largest", "at_once"), itertools.product((1, 3), (1, 4), (1, 3, 64)))
def test_every_job_once_behind_its_needs_and_never_too_many_at_once(pack: int, largest: int, at_once: int) -> None:
    graph = make_graph("s", "t", "u", arms="abcde")
    done = set(random.Random(pack).sample(sorted(graph.jobs), 8))
    todo = [name for name in graph.jobs if name not in done]
    arrays = arrange(graph, todo, set(), pack, largest, at_once)
    assert sorted(name for array in arrays for task in array.tasks for name in task) == sorted(todo)
    seen: set[str] = set()
    for place, array in enumerate(arrays):
        assert len(array.tasks) <= largest and array.parallel >= 1
        assert set(array.needs) <= seen
        assert array.after is None or array.after < place
        for task in array.tasks:
            assert {need for name in task for need in graph.jobs[name].needs} <= {*done, *array.needs, *task}
            assert sum(graph.jobs[name].kind == "refine" for name in task) <= pack
        seen |= {name for task in array.tasks for name in task}
    heads = [array for array in arrays if array.after is None]
    assert sum(array.parallel for array in heads) <= at_once
    assert all(array.parallel <= 1 for array in arrays if array.after is not None)


def test_lanes_share_the_cap() -> None:
    assert lanes([1, 1, 100, 50], 64) == [(1, None), (1, None), (31, None), (31, None)]
    assert lanes([2, 5], 64) == [(2, None), (5, None)]
    assert lanes([9, 9, 9], 2) == [(1, None), (1, None), (1, 0)]
    assert lanes([], 4) == []


def config(**slurm: object) -> Config:
    return Config(cluster={"executor": "slurm", "slurm": slurm})


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit wants to see an srun, even if only text is made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def text(array: TaskArray, needs: tuple[str, ...], after: str | None) -> list[str]:
    asked = config(
        partition="gpu", attribute={"minutes": 5}, refine={"minutes": 90, "gpus_per_node": 1, "cpus_per_task": 6}
    ).cluster.slurm
    submission = Submission(Path("/sweeps/x/slurm/0002"), 2, [])
    given: Array = sbatch_array(SweepFolder(Path("/sweeps/x")), submission, asked, array, 7, needs, after)
    return array_text(given).splitlines()


def test_the_sbatch_script_of_an_array(srun: None) -> None:
    lines = text(TaskArray("refine", [["a"], ["b"], ["c"]], ("s",), 2, None), ("41_3", "50"), "48")
    for line in (
        "--array=0-2%2", "--dependency=afterok:41_3:50,afterany:48", "--kill-on-invalid-dep=yes", "--time=90",
        "--gpus-per-node=1", "--partition=gpu", "--job-name=hpcguard-refine-0002-7", "--comment=/sweeps/x", "--requeue",
    ):  # fmt: skip
        assert f"#SBATCH {line}" in lines, line


def test_without_needs_nothing_is_waited_for(srun: None) -> None:
    lines = text(TaskArray("attribute", [["s"]], (), 1, None), (), None)
    assert "#SBATCH --time=5" in lines
    assert not [line for line in lines if "dependency" in line or "invalid-dep" in line or "gpus" in line]


def test_the_last_job_waits_for_the_end_of_all_however_they_end(srun: None) -> None:
    asked = config(consolidate={"minutes": 4, "cpus_per_task": 1}, refine={"gpus_per_node": 1}).cluster.slurm
    submission = Submission(Path("/sweeps/x/slurm/0002"), 2, [["a"], ["b"]])
    lines = array_text(report_array(SweepFolder(Path("/sweeps/x")), submission, asked, ("41", "50"))).splitlines()
    for line in ("--dependency=afterany:41:50", "--time=4", "--cpus-per-task=1", "--job-name=hpcguard-report-0002",
                 "--comment=/sweeps/x"):  # fmt: skip
        assert f"#SBATCH {line}" in lines, line
    assert not [line for line in lines if "array" in line or "invalid-dep" in line or "gpus" in line]


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    folder.sweep.touch()
    return folder


def queued(folder: SweepFolder, id: str, name: str) -> commands.QueuedJob:
    return commands.QueuedJob(id, id.partition("_")[0], None, "PENDING", "None", name, str(folder.path.resolve()))


def test_the_last_job_counts_where_slurm_takes_so_many(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_graph("s")
    asked, tasks = config().cluster.slurm, sum(len(array.tasks) for array in arranged(graph))
    monkeypatch.setattr(commands, "queue", list)

    def planned(room: int, todo: list[str]) -> Batch:
        monkeypatch.setattr(commands, "limits", lambda *place: commands.Limits(1001, 10_000, room + 3, 3))
        return batch(folder, asked, graph, todo, 2)

    assert len(planned(tasks + 1, list(graph.jobs)).tasks) == tasks
    with pytest.raises(InputError, match=f"{tasks + 1} tasks to submit, and Slurm takes {tasks} more"):
        planned(tasks, list(graph.jobs))
    assert planned(-1, []).arrays == []  # nothing to submit needs no room


def test_it_is_submitted_behind_everything_and_refused_with_everything(
    folder: SweepFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = make_graph("s")
    live = {"refine-base": queued(folder, "7_1", "hpcguard-refine-0001-0")}
    planned = Batch(arranged(graph, live=frozenset(live)), live)
    given: list[Array] = []
    cancelled: list[str] = []

    def sbatch(task: object, array: Array) -> str:
        given.append(array)
        if refuse and array.name.startswith("hpcguard-report"):
            raise InputError("sbatch refused it")
        return str(20 + len(given))

    monkeypatch.setattr(slurm, "submit_array", sbatch)
    refuse = False
    submission = submit(folder, config().cluster.slurm, planned)
    arrays = [str(20 + number) for number in range(1, len(planned.arrays) + 1)]
    assert given[-1].after == ("7", *arrays) and given[-1].needs == ()
    assert submission.submitted[-1] == Submitted("report", str(20 + len(given)))
    assert read_submissions(folder) == [submission]

    refuse = True
    given.clear()
    monkeypatch.setattr(commands, "queue", lambda: [queued(folder, "99", "hpcguard-report-0002")])  # taken all the same
    monkeypatch.setattr(commands, "cancel", cancelled.extend)
    with pytest.raises(InputError, match="refused it"):
        submit(folder, config().cluster.slurm, planned)
    assert cancelled == [*arrays, "99"] and read_submissions(folder) == [submission]


def test_a_last_job_waits_for_its_own_submission_and_older_ones(folder: SweepFolder) -> None:
    old, new = (queued(folder, str(number), f"hpcguard-refine-000{number}-0") for number in (1, 2))
    first, second = (queued(folder, str(10 + number), f"hpcguard-report-000{number}") for number in (1, 2))
    assert lacks_report([old], {"refine-a": old})
    assert not lacks_report([old, first], {"refine-a": old})
    assert lacks_report([old, first, new], {"refine-a": old, "refine-b": new})
    assert not lacks_report([old, new, second], {"refine-a": old, "refine-b": new})
    assert not lacks_report([], {})


def test_a_last_job_alone_needs_room_and_is_told(folder: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = make_graph("s")
    new_submission(folder, [["refine-p"]])
    monkeypatch.setattr(commands, "queue", lambda: [queued(folder, "7", "hpcguard-refine-0001-0")])

    def planned(room: int) -> Batch:
        monkeypatch.setattr(commands, "limits", lambda *place: commands.Limits(1001, 10_000, room, 0))
        return batch(folder, config().cluster.slurm, graph, ["refine-p"], 2)

    assert planned(1).submits and planned(1).arrays == []
    told = slurm.describe_plan(config().cluster.slurm, planned(1))
    assert "0 arrays, 0 tasks" in told[0] and "1 tasks are in its queue" in told[0] and "1 task, which" in told[1]
    with pytest.raises(InputError, match="1 tasks to submit, and Slurm takes 0 more"):
        planned(0)


class Cluster:
    """A Slurm that keeps what it is given in its queue; its user is killed before the last job is given."""

    def __init__(self) -> None:
        self.given: list[Array] = []
        self.kills = True

    def sbatch(self, task: object, array: Array) -> str:
        if self.kills and array.name.startswith("hpcguard-report"):
            raise KeyboardInterrupt
        self.given.append(array)
        return str(len(self.given))

    def queue(self) -> list[commands.QueuedJob]:
        return [
            commands.QueuedJob(
                f"{id}_{index}", str(id), index, "PENDING", "None", array.name, array.comment
            )
            for id, array in enumerate(self.given, 1)
            for index in range(array.chunk.tasks)
        ]  # fmt: skip


def test_a_last_job_that_was_not_submitted_is_so_by_the_next_call(
    tmp_path: Path,
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = make_config(tmp_path, cluster={"executor": "slurm", "workers": 1, "shards": 1})
    sweep = tmp_path / "sweep.yaml"
    arms = {"guided": {}, "pgd": {"refinement": {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}}}
    sweep.write_text(yaml.safe_dump({"run": str(tmp_path / "sweep"), "base": str(base), "axes": {"arm": arms}}))
    cluster = Cluster()
    monkeypatch.setattr(slurm, "submit_array", cluster.sbatch)
    monkeypatch.setattr(commands, "queue", cluster.queue)
    monkeypatch.setattr(commands, "limits", lambda *place: commands.Limits(1001, 10_000, None, 0))
    promise = "its last job writes the table"

    assert run_stage("sweep", [str(sweep)]) == 130
    arrays = len(cluster.given)
    assert arrays > 1 and promise not in capsys.readouterr().out

    cluster.kills = False
    assert run_stage("sweep", [str(sweep)]) == 0
    assert promise in capsys.readouterr().out
    (last,) = cluster.given[arrays:]
    assert last.name == "hpcguard-report-0002" and last.needs == ()
    assert last.after == tuple(str(number) for number in range(1, arrays + 1))
    assert [submission.tasks == [] for submission in read_submissions(SweepFolder(tmp_path / "sweep"))] == [False, True]

    assert run_stage("sweep", [str(sweep)]) == 0
    assert len(cluster.given) == arrays + 1 and promise in capsys.readouterr().out


def test_a_job_of_several_tasks_is_refused() -> None:
    asked = config(refine={"tasks_per_node": 4}).cluster.slurm
    with pytest.raises(InputError, match=r"cluster.slurm.refine: .*tasks_per_node = 4.*set both to 1"):
        check_asked(asked)
    check_asked(config().cluster.slurm)
    assert asks_for(asked, "refine") is asked.refine
