"""Runs on a real cluster that tests disturb: what was computed how often is told by the user's own segmentation.

That callable (tests/watched_segmentation.py) writes down each image that it is given, and holds at images that a test
names until it is released: interruptions come at a known moment, and nothing that hpcguard writes says how they went.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slurm_cluster import Slurm, clean_environment, need_slurm
from watched_segmentation import image_name

from hpcguard.cluster.failures import Failure, read_failures
from hpcguard.cluster.plan import Plan, read_plan
from hpcguard.cluster.submission import Submission, read_submissions
from hpcguard.config import load_config
from hpcguard.data import load_images
from hpcguard.runs import RunFolder
from hpcguard.store import open_rows

SOURCE = Path(__file__).with_name("watched_segmentation.py")
REPOSITORY = Path(__file__).parents[1]
PATIENCE_S = 240.0  # for anything: the machine may be busy with other things

Unit = tuple[int, int]
"""(shard, unit of it)"""


def prepare(folder: Path) -> None:
    """Put the segmentation beside a configuration."""
    (folder / "orders").mkdir(parents=True)
    shutil.copy(SOURCE, folder)


def environment(folder: Path) -> dict[str, str]:
    """For a command whose configuration lies in `folder`: no Slurm, and this Python first in PATH."""
    known = clean_environment()
    path = [str(folder), *filter(None, [known.get("PYTHONPATH")])]
    first = str(Path(sys.executable).parent)
    return {**known, "PYTHONPATH": os.pathsep.join(path), "PATH": f"{first}{os.pathsep}{known['PATH']}"}


def command(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """python -m hpcguard WORDS."""
    return subprocess.run(
        [sys.executable, "-m", "hpcguard", *words], env=environment(folder) | more, cwd=REPOSITORY,
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def done(folder: Path, *words: str, **more: str) -> str:
    """The same, which must end well; its output."""
    result = command(folder, *words, **more)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@dataclass
class Night:
    """One run folder on one cluster."""

    folder: Path
    cluster: Slurm

    @property
    def config(self) -> str:
        return str(self.folder / "config.yaml")

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    def hpcguard(self, *words: str) -> str:
        return done(self.folder, *words, SLURM_CONF=self.cluster.env["SLURM_CONF"])

    def environment(self) -> dict[str, str]:
        return environment(self.folder) | {"SLURM_CONF": self.cluster.env["SLURM_CONF"]}

    def submit(self, *changes: str) -> str:
        return self.hpcguard("attribute", self.config, "cluster.executor=slurm", *changes)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.hpcguard("status", str(self.run.path), "--json"))
        return found

    # ------------------------------------------------------------------------------------------ what it is made of
    @cached_property
    def names(self) -> list[str]:
        """Of all images, in their order."""
        images = load_images(load_config(Path(self.config), []).data, "train")
        pixels = np.moveaxis(images.images(images.ids), 1, -1).astype(np.float64)
        names = [image_name(each) for each in pixels]
        assert len(set(names)) == len(names), "two images are equal: choose others"
        return names

    @cached_property
    def plan(self) -> Plan:
        return read_plan(self.run.plan)

    def images_of(self, shard: int, unit: int) -> list[str]:
        start = self.plan.bounds[shard] + unit * self.plan.unit
        return self.names[start : min(start + self.plan.unit, self.plan.bounds[shard + 1])]

    @cached_property
    def units(self) -> dict[str, Unit]:
        """By image."""
        every = ((s, u) for s in range(self.plan.num_shards) for u in range(self.plan.num_units(s)))
        return {name: unit for unit in every for name in self.images_of(*unit)}

    # ------------------------------------------------------------------------------------------------------ orders
    def order(self, image: str, word: str) -> None:
        path = self.folder / "orders" / image
        temporary = self.folder / f"order-{image}"
        temporary.write_text(word)
        temporary.rename(path)

    def hold(self, *images: str) -> None:
        for image in images:
            self.order(image, "hold")

    def release(self, *images: str) -> None:
        for image in images:
            (self.folder / "orders" / image).unlink()

    def pause(self, seconds: float) -> None:
        """From now on each image takes so long."""
        temporary = self.folder / "pause.new"
        temporary.write_text(str(seconds))
        temporary.rename(self.folder / "pause")

    def image(self, position: int) -> str:
        """By its position in the plan; to be held in the middle of a unit, name one that is not the unit's first."""
        return self.names[position]

    # --------------------------------------------------------------------------------------------- what became of it
    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def reached(self, image: str, times: int = 1) -> dict[str, Any]:
        """Wait until a task has been given this image so many times; the last of these calls."""
        self.wait(lambda: self.times(image) >= times, f"image {image}")
        return [call for call in self.calls() if call["image"] == image][times - 1]

    def times(self, image: str) -> int:
        return sum(call["image"] == image for call in self.calls())

    def wait(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"not within {PATIENCE_S:g} s: {what}\n{self.story()}"
            time.sleep(0.1)

    def submissions(self) -> list[Submission]:
        return read_submissions(self.run)

    def job(self, kind: str, submission: int = -1) -> str:
        return next(job.job for job in self.submissions()[submission].jobs if job.kind == kind)

    def settled(self) -> list[str]:
        """How each submission ended."""
        paths = [submission.settled for submission in self.submissions()]
        return [json.loads(path.read_text())["state"] if path.exists() else "" for path in paths]

    def in_queue(self) -> list[str]:
        return self.cluster.run(f"squeue -h -o '%i %T %k' | grep -F {self.run.path} || true").splitlines()

    def completes(self) -> None:
        """Wait until the run is complete, by itself."""

        def ended() -> bool:
            return bool(self.settled()) and self.settled()[-1] in ("complete", "gave up") and not self.in_queue()

        self.wait(ended, "the end")
        assert self.settled()[-1] == "complete", self.story()
        assert self.run.store_manifest.exists(), self.story()

    def failures(self) -> list[Failure]:
        return read_failures(self.run)

    def kinds(self) -> Counter[str]:
        return Counter(failure.kind for failure in self.failures())

    def computed(self) -> dict[Unit, int]:
        """How often each unit was begun: the most often that one of its images was asked for."""
        counts = Counter(call["image"] for call in self.calls())
        found: dict[Unit, int] = {}
        for image, unit in self.units.items():
            found[unit] = max(found.get(unit, 0), counts[image])
        return found

    def twice(self) -> dict[Unit, int]:
        """Units that were computed more than once. None was left out."""
        computed = self.computed()
        assert min(computed.values()) >= 1, f"never computed: {computed}"
        return {unit: count for unit, count in computed.items() if count > 1}

    # -------------------------------------------------------------------------------------------- what befalls tasks
    def task(self, call: dict[str, Any]) -> str:
        """Slurm's id of the array task that made a call."""
        return f"{call['SLURM_ARRAY_JOB_ID']}_{call['SLURM_ARRAY_TASK_ID']}"

    def node(self, task: str) -> str:
        return self.cluster.run(f"squeue -h -j {task} -o %N")

    def holder(self, image: str) -> str:
        """The task that was given this image last: after many time-outs it is one of a later submission."""
        return self.task([call for call in self.calls() if call["image"] == image][-1])

    def running_on(self, image: str) -> str:
        """The node of the task that has this image, which may be waiting between two attempts."""
        self.wait(lambda: self.node(self.holder(image)), f"the task with image {image} on a node")
        return self.node(self.holder(image))

    def is_preempted(self, task: str) -> bool:
        return "PreemptTime=None" not in self.cluster.run(f"scontrol show job {task}")

    def urgent(self, node: str) -> None:
        """Take a whole node for a moment, as soon as its jobs have left it."""
        self.cluster.sbatch("sleep 1", "--partition=urgent", f"--nodelist={node}", "--exclusive")

    def lose_slurmd(self, node: str) -> None:
        """kill -9 of slurmd alone: its tasks go on, and Slurm runs them again elsewhere."""
        os.kill(int((self.cluster.folder / "run" / f"slurmd.{node}.pid").read_text()), signal.SIGKILL)
        self.cluster.run(f"scontrol update NodeName={node} State=DOWN Reason=lost")  # which it would find out itself

    def lose_node(self, node: str) -> None:
        lost = self.cluster.tool("kill-node", node)
        assert lost.returncode == 0, lost.stderr

    def node_failure(self) -> str:
        """What the loss of a node is called: its name is needed to look for it, and nodes may have to share one."""
        return "node-failure" if self.cluster.separate else "requeued"

    def story(self) -> str:
        """What a person would look at, for a message."""
        logs = sorted(self.run.slurm.rglob("*.out")) + sorted(self.run.slurm.rglob("*.err"))
        parts = [f"== {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in logs]
        status = command(self.folder, "status", str(self.run.path), SLURM_CONF=self.cluster.env["SLURM_CONF"])
        return "\n".join([status.stdout + status.stderr, *self.in_queue(), *map(str, self.failures()), *parts])


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of every shard."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((run / "shards").glob("*.h5"))}


def assert_same(run: Path, local: Path) -> None:
    """Every shard byte for byte, and every data set of the store."""
    assert digests(run) == digests(local)
    first, second = open_rows(run / "store.h5"), open_rows(local / "store.h5")
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.dtype == second[name].dtype
        assert values.tobytes() == second[name].tobytes(), name


@contextmanager
def cluster_of(*options: object) -> Iterator[Slurm]:
    """A cluster that takes its time before it gives a daemon up: this machine may be busy."""
    patient = ("SlurmdTimeout=30", "MessageTimeout=20", "BatchStartTimeout=60", "KillWait=2")
    cluster = Slurm(*options, *(word for setting in patient for word in ("--set", setting)))
    try:
        yield cluster
    finally:
        cluster.stop()


# ----------------------------------------------------------------------------------------------------------- scenes
MakeConfig = Callable[..., Path]
Play = Callable[[Night], None]
AT_ONCE = 4
CLUSTER = ("--cpus", 2, "--memory", 4000, "--max-array-size", 3, "--grace", 60)


@dataclass(frozen=True)
class Shape:
    """A run: how many images in how many units, shards and tasks."""

    images: int
    unit: int
    shards: int
    per_task: int


SMALL = Shape(images=48, unit=4, shards=6, per_task=3)  # 2 units a shard, 2 tasks
LARGE = Shape(images=160, unit=2, shards=40, per_task=5)  # 2 units a shard, 8 tasks in 3 arrays of at most 3


@dataclass(frozen=True)
class Scene:
    play: Play
    shape: Shape
    cluster: tuple[object, ...]
    job: dict[str, object] = field(default_factory=dict)
    slurm: dict[str, object] = field(default_factory=dict)
    sections: dict[str, dict[str, object]] = field(default_factory=dict)  # of the configuration


Scenes = dict[str, Scene]


def scene(
    scenes: Scenes, *cluster: object, shape: Shape = SMALL, slurm: dict[str, object] | None = None,
    sections: dict[str, dict[str, object]] | None = None, **job: object
) -> Callable[[Play], Play]:  # fmt: skip
    """The decorated function is a scene on such a cluster, with such array jobs."""

    def register(play: Play) -> Play:
        scenes[play.__name__] = Scene(play, shape, cluster, job, slurm or {}, sections or {})
        return play

    return register


def settings(*lines: str) -> tuple[str, ...]:
    return tuple(word for line in lines for word in ("--set", line))


@pytest.fixture(scope="module")
def write_config(make_config: MakeConfig, attributed: Path) -> Callable[..., None]:
    weights = str(attributed / "checkpoints/baseline/model.safetensors")

    def write(folder: Path, shape: Shape, slurm: dict[str, object], **sections: dict[str, object]) -> None:
        prepare(folder)
        cluster = {"shards": shape.shards, "slurm": {"shards_per_task": shape.per_task, **slurm}}
        make_config(
            folder,
            **{
                **sections,
                "baseline": None,
                "model": {"weights": weights},
                "data": {"train_images": shape.images},
                "attribution": {"segmentation": "watched_segmentation:segment", "unit": shape.unit},
                "cluster": {**cluster, **sections.get("cluster", {})},
            },
        )

    return write


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., None]) -> Callable[[Shape], Path]:
    """Run folders of undisturbed local runs."""
    known: dict[Shape, Path] = {}

    def make(shape: Shape) -> Path:
        if shape not in known:
            folder = tmp_path_factory.mktemp("local") / "here"
            write_config(folder, shape, {})
            done(folder, "attribute", "consolidate", str(folder / "config.yaml"))
            known[shape] = folder / "run"
        return known[shape]

    return make


@pytest.fixture(scope="module")
def played(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_config: Callable[..., None]
) -> Iterator[dict[str, Future[Night]]]:
    """The scenes that this session asks for, AT_ONCE at a time."""
    need_slurm()
    base = tmp_path_factory.mktemp("night")

    def play(name: str) -> Night:
        chosen = request.module.SCENES[name]
        began = time.monotonic()
        job = {"cpus_per_task": 1, "memory_gb": 1.5, "minutes": 10}
        slurm = {"attribute": {**job, **chosen.job}, "consolidate": job, **chosen.slurm}
        write_config(base / name, chosen.shape, slurm, **chosen.sections)
        with cluster_of(*CLUSTER, *chosen.cluster) as cluster:
            night = Night(base / name, cluster)
            chosen.play(night)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        return night

    asked = [item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")
             and "name" in item.callspec.params and item.path == request.path]  # fmt: skip
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        yield {name: pool.submit(play, name) for name in asked}
    finally:
        pool.shutdown(cancel_futures=True)
