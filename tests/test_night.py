# ruff: noqa: F811 - fixtures are imported, and arguments have their names
"""Attribution on a real Slurm through a bad night: it ends by itself, with the bytes of an undisturbed local run.

Each scene has a run and a cluster of its own, and several are played at once: they mostly wait for Slurm.
"""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
from night import LARGE, Night, Scenes, Shape, assert_same, local, played, scene, settings, write_config  # noqa: F401

SCENES: Scenes = {}
KILLS_FOR_MEMORY = (
    "JobAcctGatherType=jobacct_gather/linux", "JobAcctGatherFrequency=task=1", "JobAcctGatherParams=OverMemoryKill",
)  # fmt: skip


@scene(SCENES, "--nodes", 1, slurm={"signal_seconds": 1}, minutes=1)
def time_out(night: Night) -> None:
    """Told so 29 to 59 s after their start, for Slurm looks every 30 s; ten seconds a unit, and six units a task."""
    night.pause(2.5)
    night.submit()
    night.wait(night.failures, "the time limit")
    night.pause(0)
    night.completes()
    assert night.kinds().keys() == {"time-out"}
    assert night.twice() == {}
    assert night.settled() == ["complete"]


@scene(SCENES, "--nodes", 1)
def killed(night: Night) -> None:
    """kill -9 of a worker, which its task replaces, and of all processes of a task, which is submitted again."""
    worker, task = night.image(5), night.image(29)
    night.hold(worker, task)
    night.submit()
    os.kill(night.reached(worker)["pid"], signal.SIGKILL)
    call = night.reached(task)
    for process in (call["parent"], call["pid"]):
        os.kill(process, signal.SIGKILL)
    night.reached(worker, 2)
    night.release(worker, task)
    night.completes()
    assert night.kinds() == {"killed": 2}
    assert night.twice() == {(0, 1): 2, (3, 1): 2}
    assert night.settled() == ["submitted again", "complete"]
    assert night.submissions()[1].tasks == [[3, 4, 5]]
    assert night.status()["interrupted"] == {"killed": 2}


@scene(SCENES, "--nodes", 1)
def requeued(night: Night) -> None:
    """scontrol requeue of one array task: the other goes on undisturbed."""
    one, other = night.image(5), night.image(29)
    night.hold(one, other)
    night.submit()
    undisturbed = night.reached(other)
    night.cluster.run(f"scontrol requeue {night.task(night.reached(one))}")
    assert night.reached(one, 2)["SLURM_RESTART_COUNT"] == "1"
    assert Path(f"/proc/{undisturbed['pid']}").exists()
    night.release(one, other)
    night.completes()
    assert night.kinds() == {"requeued": 1}
    assert night.twice() == {(0, 1): 2}
    assert {call["pid"] for call in night.calls() if night.units[call["image"]][0] >= 3} == {undisturbed["pid"]}
    assert night.settled() == ["complete"]
    assert night.status()["interrupted"] == {"requeued": 1}


@scene(SCENES, "--nodes", 1)
def pre_empted(night: Night) -> None:
    """Both tasks finish the unit that they are at, and lose nothing."""
    images = (night.image(5), night.image(29))
    night.hold(*images)
    night.submit()
    tasks = [night.task(night.reached(image)) for image in images]
    night.urgent("n0")
    night.wait(lambda: all(map(night.is_preempted, tasks)), "pre-emption")
    night.pause(0.5)
    night.release(*images)
    night.wait(lambda: len(night.failures()) == 2, "two records")
    night.pause(0)
    night.completes()
    assert night.kinds() == {"pre-empted": 2}
    assert night.twice() == {}
    assert night.settled() == ["complete"]
    assert night.status()["interrupted"] == {"pre-empted": 2}


@scene(SCENES, "--nodes", 2)
def node_lost(night: Night) -> None:
    """kill -9 of slurmd, steps and tasks of a node: Slurm starts its tasks again on another."""
    images = (night.image(5), night.image(29))
    night.hold(*images)
    night.submit()
    nodes = {night.node(night.task(night.reached(image))) for image in images}
    assert nodes == {"n0"}
    night.lose_node("n0")
    for image in images:
        night.reached(image, 2)
    night.release(*images)
    night.completes()
    assert night.kinds() == {night.node_failure(): 2}
    assert night.twice() == {(0, 1): 2, (3, 1): 2}
    assert night.settled() == ["complete"]
    assert night.status()["interrupted"] == {night.node_failure(): 2}


@scene(SCENES, "--nodes", 2)
def slurmd_lost(night: Night) -> None:
    """kill -9 of slurmd alone: its tasks go on computing while Slurm runs them again on another node."""
    images = (night.image(5), night.image(29))
    night.hold(*images)
    night.submit()
    first = [night.reached(image) for image in images]
    night.lose_slurmd("n0")
    night.wait(lambda: len(night.failures()) == 2, "the second start of both tasks")
    assert all(Path(f"/proc/{call['pid']}").exists() for call in first)
    night.release(*images)
    night.completes()
    assert night.kinds() == {night.node_failure(): 2}
    assert night.twice() == {}
    assert night.settled() == ["complete"]


@scene(SCENES, "--nodes", 1, *settings(*KILLS_FOR_MEMORY))
def out_of_memory(night: Night) -> None:
    """Slurm kills a task; its shard is tried again with smaller batches."""
    hog = night.image(5)
    night.order(hog, "hog")
    night.submit()
    night.completes()
    assert night.kinds() == {"out-of-memory": 1}
    assert night.twice() == {(0, 1): 2}
    assert night.settled() == ["submitted again", "complete"]
    assert night.status()["interrupted"] == {"out-of-memory": 1}
    batches = {shard: json.loads(night.run.manifest(shard).read_text())["batch_size"] for shard in (0, 3)}
    assert batches[0] == batches[3] // 2


@scene(SCENES, "--nodes", 1)
def truncated(night: Night) -> None:
    """A published shard loses its end: it alone is computed again."""
    other = night.image(29)
    night.hold(other)
    night.submit()
    night.wait(lambda: _is_left_alone(night, 0), "the first shard")
    os.truncate(night.run.shard(0), night.run.shard(0).stat().st_size - 100)
    night.release(other)
    night.completes()
    assert night.twice() == {(0, 0): 2, (0, 1): 2}
    assert night.settled() == ["submitted again", "complete"]
    assert night.submissions()[1].tasks == [[0]]
    assert "bytes differ" in json.dumps(night.status()["slurm"]["submissions"][1]["why"])


@scene(SCENES, "--nodes", 1)
def duplicate(night: Night) -> None:
    """The same task a second time while it runs: what one computes, the other leaves alone."""
    image = night.image(5)
    night.hold(image)
    night.submit()
    call = night.reached(image)
    night.wait(night.run.manifest(5).exists, "the end of the other task")
    output = start_again(night, call)
    night.wait(lambda: _others_that_look_at(night.run.lock(0), call["pid"]), "the second one to ask for the shard")
    night.pause(0.3)
    night.release(image)
    night.wait(lambda: "ended 0" in output.read_text(), "the end of the second")
    night.completes()
    assert night.twice() == {}
    assert night.kinds() == {}


def start_again(night: Night, call: dict[str, str]) -> Path:
    """The very task that made this call a second time, in a job of its own; the file for its output."""
    told = {name: call[name] for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NAME")}
    told |= {"SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": night.environment()["PYTHONPATH"]}
    exports = "\n".join(f"export {name}={shlex.quote(value)}" for name, value in told.items())
    words = [sys.executable, "-u", "-m", "hpcguard.cluster.task", str(night.submissions()[0].folder)]
    job = night.cluster.sbatch(f"{exports}\n{shlex.join(words)}; echo ended $?")
    return night.cluster.work / f"{job}.out"


def _is_left_alone(night: Night, shard: int) -> bool:
    """Published, and its writer is through with it, who looks once more whether what lies there is its own."""
    return night.run.manifest(shard).exists() and not _others_that_look_at(night.run.lock(shard), 0)


def _others_that_look_at(path: Path, holder: int) -> bool:
    for process in Path("/proc").glob("[0-9]*"):
        if process.name == str(holder):
            continue
        try:
            if any(entry.readlink() == path for entry in (process / "fd").iterdir()):
                return True
        except OSError:
            continue
    return False


@scene(SCENES, "--nodes", 3, shape=LARGE)
def quiet(night: Night) -> None:
    """Nothing happens: 40 shards on 3 nodes, with an array at most 3 tasks long."""
    assert "40 shards in 8 tasks" in night.submit()
    night.completes()
    arrays = [job for job in night.submissions()[0].jobs if job.kind == "attribute"]
    assert [job.tasks for job in arrays] == [2, 3, 3]
    assert night.settled() == ["complete"]
    assert night.kinds() == {}
    assert night.twice() == {}
    assert len({call["node"] for call in night.calls()}) == (3 if night.cluster.separate else 1)


@scene(
    SCENES, "--nodes", 3, *settings(*KILLS_FOR_MEMORY), shape=LARGE, slurm={"signal_seconds": 1, "tasks_at_once": 4},
    minutes=1,
)  # fmt: skip
def bad_night(night: Night) -> None:
    """All of that in one run. Task k has shards 5k to 5k + 4: ten units, twenty images."""
    worker, task, again, hog, *_, last = (night.image(20 * k + 7) for k in range(8))
    night.hold(worker, task, again, last)
    night.order(hog, "hog")
    for position in range(80, 100):
        night.order(night.image(position), "linger")  # task 4 takes a minute
    night.submit()
    os.kill(night.reached(worker)["pid"], signal.SIGKILL)
    call = night.reached(task)
    for process in (call["parent"], call["pid"]):
        os.kill(process, signal.SIGKILL)
    night.cluster.run(f"scontrol requeue {night.task(night.reached(again))}")
    night.reached(again, 2)
    night.release(worker, task, again)
    start_again(night, night.reached(night.image(80)))
    night.wait(lambda: _is_left_alone(night, 0), "a shard")
    os.truncate(night.run.shard(0), night.run.shard(0).stat().st_size - 100)
    night.reached(last)
    former, times = night.running_on(last), night.times(last)
    night.lose_slurmd(former)
    night.wait(lambda: night.node(night.holder(last)) not in ("", former), "the last task on another node")
    night.lose_node(former)  # where the task had gone on computing
    night.reached(last, times + 1)
    night.lose_node(night.running_on(last))
    night.reached(last, times + 2)
    night.urgent(night.running_on(last))
    night.wait(lambda: night.is_preempted(night.holder(last)), "pre-emption")
    night.pause(0.5)
    night.release(last)
    night.wait(lambda: "pre-empted" in night.kinds(), "its record")
    night.pause(0)
    night.completes()
    kinds = night.kinds()
    told = {"killed", "requeued", "out-of-memory", "time-out", "pre-empted", night.node_failure()}
    assert kinds.keys() >= told, night.story()
    # Of the truncated shard both units; else one at most for each time that something was interrupted.
    assert sum(count - 1 for count in night.twice().values()) <= len(night.failures()) + 2, night.story()
    assert night.status()["interrupted"] == kinds


@pytest.mark.parametrize("name", SCENES)
def test_a_run_survives(name: str, played: dict[str, Future[Night]], local: Callable[[Shape], Path]) -> None:
    reference = local(SCENES[name].shape)
    night = played[name].result()
    assert_same(night.run.path, reference)
