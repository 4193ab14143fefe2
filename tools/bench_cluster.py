#!/usr/bin/env python3
"""Measure hpcguard on Slurm: planning, submitting, status and resuming of large runs; what 64 real shards cost extra.

  python tools/bench_cluster.py [--json] [--parts plan,resume,status,overhead] [--shards 10000] [--rounds 5]

plan       from the configuration to plan.json and the list of arrays, the images' own bytes left out
folder     the same with an image folder of as many files, which making takes minutes (only where --parts names it)
resume     the look at every published shard that a resumed run begins with
status     `hpcguard status RUN`, as a whole process
overhead   64 real shards on 2 nodes of 1 CPU against their computation alone

status and overhead start a Slurm cluster of their own (tools/mini_slurm); where Slurm is not installed they are not
measured. resume writes 1.2 GB to the folder for temporary files. All but folder take about ten minutes.

Beside each wall time stands the CPU time of the same processes (_cpu_s): other work on the machine stretches the one,
and hardly the other.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml
from bench_parts import Figures, hardware, run_parts

from hpcguard import attribute
from hpcguard.cluster import dispatch
from hpcguard.cluster.plan import Plan, agree_on_plan, make_plan, read_plan
from hpcguard.cluster.slurm import Limits
from hpcguard.cluster.submission import ATTRIBUTE, Job, new_submission
from hpcguard.config import Config, ModelConfig, load_config
from hpcguard.data import ImageSet, load_images
from hpcguard.models import build_model, save_weights
from hpcguard.runs import RunFolder, digest_arrays, digest_file, sealed, write_json
from hpcguard.shards import shard_problems
from hpcguard.store import ShardWriter, Unit

PARTS = ("plan", "folder", "resume", "status", "overhead")
DEFAULT_PARTS = "plan,resume,status,overhead"  # overhead last: it is what other work on the machine disturbs most
PER_SHARD = 128  # images of a shard: 1.28 million in 10,000 shards
SIZE, SEGMENTS, LABELS = 32, 20, 2  # of a stored image: 900 bytes
DONE = 0.6  # share of the shards that part status finds published; the others are in the queue
MINI_SLURM = Path(__file__).with_name("mini_slurm")
SLURMS_OWN = Limits(max_array_size=1001, max_jobs=10_000, max_submit=None, queued=0)  # its defaults


# ------------------------------------------------------------------------------------------------------------ plan
@dataclass(frozen=True)
class Unread:
    """Pixels of a set whose bytes need not be read: what reading costs is the disk's."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(int(ids[0]))
        return random.random((len(ids), 3, SIZE, SIZE), np.float32)

    def digest(self, ids: np.ndarray) -> str:
        return "0" * 64


def unread_images(count: int) -> ImageSet:
    ids = np.arange(count, dtype=np.int64)
    return ImageSet("bench", "train", tuple(map(str, range(1000))), ids, ids % 1000, (3, SIZE, SIZE), Unread())


def write_config(folder: Path, **sections: Any) -> Path:
    """A configuration, and weights of the network that it names."""
    model = sections.setdefault("model", {"name": "small-cnn"})
    classes, channels = sections.pop("classes", 1000), sections.pop("channels", 3)
    weights = folder / "model.safetensors"
    torch.manual_seed(0)
    save_weights(build_model(ModelConfig(name=model["name"]), classes, channels), weights, {})
    model["weights"] = str(weights)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"run": str(folder / "run"), "device": "cpu", **sections}), encoding="utf-8")
    return path


def plan_once(path: Path, run: Path, images: int | None, began: float) -> Figures:
    """What `hpcguard attribute` does before it submits, step by step; began: when the process was started.

    images: as many that are not read; None: those that the configuration names.
    """
    moments, cpu = [("python and imports", began, time.time())], time.process_time()

    def step(name: str) -> None:
        moments.append((name, moments[-1][2], time.time()))

    config = load_config(path, [f"run={run}"])
    step("configuration")
    image_set = load_images(config.data, "train") if images is None else unread_images(images)
    step("list of images")
    folder = RunFolder(config.run)
    plan = attribute._agreed_plan(config, image_set, folder)
    step("digests, model tried, plan.json")
    problems = shard_problems(folder, plan, image_set.ids)
    step("what is missing")
    tasks, parts = dispatch.arrange(config, dict.fromkeys(problems), SLURMS_OWN)
    step("arrays")
    assert sum(map(len, tasks)) == plan.num_shards == config.cluster.shards
    assert sum(part.chunk.tasks for part in parts) == len(tasks)
    print(f"  {plan.num_images} images, {len(tasks)} tasks in {len(parts)} arrays", end=": ")
    print(", ".join(f"{name} {end - start:.2f} s" for name, start, end in moments), flush=True)
    return {"plan": moments[-1][2] - moments[0][2], "process": moments[-1][2] - began, "cpu": time.process_time() - cpu}


def in_new_process(path: Path, run: Path, images: int | None) -> Figures:
    """plan_once in a process of its own, as users run it: what is imported only when needed counts each time."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(plan_once, (path, run, images, time.time()))


def part_plan(arguments: argparse.Namespace) -> Figures:
    """Configuration to plan.json and arrays: model and one image tried, shards looked for; no images read, no job."""
    with temporary_folder() as folder:
        path = write_config(folder, cluster={"executor": "slurm", "shards": arguments.shards})
        count = arguments.shards * PER_SHARD
        rounds = [in_new_process(path, folder / f"run{k}", count) for k in range(min(arguments.rounds, 3))]
    return {
        f"plan_{arguments.shards}_s": median(rounds, "plan"),
        f"plan_{arguments.shards}_cpu_s": median(rounds, "cpu"),
        f"plan_{arguments.shards}_process_s": median(rounds, "process"),
    }


def median(rounds: list[Figures], name: str) -> float:
    return statistics.median(figures[name] or 0.0 for figures in rounds)


def part_folder(arguments: argparse.Namespace) -> Figures:
    """The same with an image folder: 1000 classes (at most), empty files but one, names and sizes in a warm cache."""
    count, classes = arguments.shards * PER_SHARD, min(1000, arguments.shards)
    with temporary_folder() as folder:
        started = time.perf_counter()
        make_image_folder(folder / "images", count, classes)
        print(f"  {count} files made in {time.perf_counter() - started:.0f} s", flush=True)
        path = write_config(
            folder, classes=classes, data={"name": "image-folder", "root": str(folder / "images"), "size": SIZE},
            cluster={"executor": "slurm", "shards": arguments.shards},
        )  # fmt: skip
        rounds = [in_new_process(path, folder / f"run{k}", None) for k in range(min(arguments.rounds, 3))]
    return {
        f"plan_image_folder_{arguments.shards}_s": median(rounds, "plan"),
        f"plan_image_folder_{arguments.shards}_cpu_s": median(rounds, "cpu"),
    }


def make_image_folder(root: Path, count: int, classes: int) -> None:
    from PIL import Image

    for name in range(classes):
        own = root / "train" / f"n{name:08d}"
        own.mkdir(parents=True)
        (root / "test" / own.name).mkdir(parents=True)
        for number in range(count * name // classes, count * (name + 1) // classes):
            os.close(os.open(f"{own}/{own.name}_{number}.JPEG", os.O_CREAT | os.O_WRONLY, 0o600))
    first = min((root / "train" / f"n{0:08d}").iterdir())
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(first)


# ---------------------------------------------------------------------------------------------------------- resume
def planned_run(folder: Path, shards: int) -> tuple[RunFolder, Plan, np.ndarray]:
    run, ids = RunFolder(folder / "run"), np.arange(shards * PER_SHARD, dtype=np.int64)
    run.create()
    return run, agree_on_plan(run.plan, make_plan(ids, 16, shards, {"made by": "bench_cluster"})), ids


def stored_rows(ids: np.ndarray) -> dict[str, np.ndarray]:
    """Rows such as LIME's of 32x32 images: segments are the cells of random points, values are random."""
    random = np.random.default_rng(0)
    count = len(ids)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1).reshape(-1, 1, 2)
    maps = [((grid - random.uniform(0, SIZE, (SEGMENTS, 2))) ** 2).sum(-1).argmin(1) for _ in range(count)]
    values = lambda *shape: random.normal(0, 0.01, (count, LABELS, *shape)).astype(np.float32)  # noqa: E731
    labels = random.integers(0, 10, count)
    return {
        "image_id": ids,
        "label": labels,
        "predicted": random.integers(0, 10, count),
        "segments": np.stack(maps).reshape(count, SIZE, SIZE),
        "num_segments": np.full(count, SEGMENTS),
        "target": np.stack([labels, (labels + 1) % 10], 1),
        "probability": abs(values()),
        "coefficients": values(SEGMENTS),
        "standard_error": abs(values(SEGMENTS)),
        "interval": abs(values(SEGMENTS)),
        "sensitivity": abs(values(SEGMENTS)[:, 0]),
        "instability": np.full((count, SEGMENTS), np.nan, np.float32),
        "intercept": values(),
        "score": values(),
        "effective_samples": random.uniform(100, 256, count),
        "num_samples": np.full(count, 256),
    }


def publish_shards(run: RunFolder, plan: Plan, ids: np.ndarray, count: int, own_bytes: bool) -> None:
    """The first `count` shards: one by ShardWriter, the others copies of it with their own ids, digests and manifests.

    own_bytes=False makes them links to the first file, for whoever looks only at names and manifests.
    """
    first = plan.shard_ids(0, ids)
    units = [Unit(stored_rows(first), 300.0)]
    writer = ShardWriter(run.shard(0), run.manifest(0), plan.fingerprint, "u1")
    manifest = writer.publish(first, units, shard=0, attempts=["1_0.r0.n0-000000"])
    now = time.time()
    for index in range(1, count):
        own, path = plan.shard_ids(index, ids), run.shard(index)
        values = {**manifest, "shard": index, "file": path.name, "ids_sha256": digest_arrays(own)}
        values |= {"host": f"n{index % 64}", "published": now - 5 * (count - index), "seconds": 290 + index % 20}
        if own_bytes:
            shutil.copyfile(run.shard(0), path)
            with h5py.File(path, "r+") as file:
                file["image_id"][:] = own
            values["sha256"] = digest_file(path)
        else:
            path.hardlink_to(run.shard(0))
        run.manifest(index).write_text(json.dumps(sealed(values), indent=1) + "\n", encoding="utf-8")


def part_resume(arguments: argparse.Namespace) -> Figures:
    """shard_problems over published shards, all of them sound, in a warm page cache: every byte is hashed."""
    with temporary_folder() as folder:
        run, plan, ids = planned_run(folder, arguments.shards)
        started = time.perf_counter()
        publish_shards(run, plan, ids, plan.num_shards, own_bytes=True)
        total = sum(run.shard(index).stat().st_size for index in range(plan.num_shards))
        print(f"  {total / 1e9:.2f} GB, {total / plan.num_images:.0f} bytes an image; ", end="")
        print(f"published in {time.perf_counter() - started:.0f} s", flush=True)
        seconds, cpu = [], []
        for _ in range(min(arguments.rounds, 3)):
            started, busy = time.perf_counter(), time.process_time()
            problems = shard_problems(run, plan, ids)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - busy)
            assert not problems, problems
        run.shard(plan.num_shards - 1).write_bytes(run.shard(0).read_bytes())  # of other images: the scan does look
        assert list(shard_problems(run, plan, ids)) == [plan.num_shards - 1]
    print(f"  rounds: {', '.join(f'{each:.2f} s' for each in seconds)}")
    return {
        f"resume_scan_{arguments.shards}_s": statistics.median(seconds),
        f"resume_scan_{arguments.shards}_cpu_s": statistics.median(cpu),
        "resume_scan_bytes": float(total),
    }


# ---------------------------------------------------------------------------------------------------------- status
@contextmanager
def temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="hpcguard-bench-")).resolve()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def mini_cluster(*options: object) -> Iterator[bool]:
    """A Slurm cluster that this process and its children talk to; False if there is no Slurm here."""
    if shutil.which("sbatch") is None:
        print("  Slurm is not installed")
        yield False
        return
    folder, before = Path(tempfile.mkdtemp(prefix="bench-slurm-")).resolve(), dict(os.environ)

    def tool(verb: str, *arguments: object) -> None:
        command = [sys.executable, str(MINI_SLURM), verb, "--folder", str(folder), *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    tool("start", *options)
    try:
        for name in list(os.environ):  # of a cluster's job that this may run in
            if name.startswith(("SLURM", "SBATCH_", "SRUN_", "SQUEUE_")):
                del os.environ[name]
        os.environ["SLURM_CONF"] = str(folder / "clients.conf")
        yield True
    finally:
        os.environ.clear()
        os.environ.update(before)
        tool("stop")


def part_status(arguments: argparse.Namespace) -> Figures:
    """`hpcguard status RUN`, whole processes: 60% done by a former submission, the rest in the queue, failures."""
    done = round(DONE * arguments.shards)
    limits = ("--max-array-size", 1001, "--set", "MaxJobCount=20000")
    with temporary_folder() as folder, mini_cluster("--nodes", 2, "--cpus", 1, *limits) as there:
        if not there:
            return {f"status_{arguments.shards}_s": None}
        subprocess.run(["scontrol", "update", "nodename=ALL", "state=drain", "reason=bench"], check=True)
        run, plan, ids = planned_run(folder, arguments.shards)
        publish_shards(run, plan, ids, done, own_bytes=False)
        config = load_config(write_config(folder, cluster={"executor": "slurm", "shards": arguments.shards}))
        run.record_config(config)
        leave_a_submission(run, config, list(range(done)))
        started = time.perf_counter()
        left = range(done, plan.num_shards)
        submission = dispatch.submit(config, run, dict.fromkeys(left), attribute.array_task)
        submitting = time.perf_counter() - started
        tasks = len(submission.tasks)
        arrays = len(submission.jobs) - 1
        print(f"  {done} shards done, {tasks} tasks in {arrays} arrays in the queue; submitted in {submitting:.1f} s")
        fail_some(run, left, submission.jobs[0].job)
        command = [sys.executable, "-m", "hpcguard", "status", str(run.path)]
        state = json.loads(subprocess.run([*command, "--json"], check=True, capture_output=True).stdout)
        assert state["progress"]["done"] == done and state["slurm"]["jobs_in_queue"] == tasks + 1
        print(f"  it says: { {name: state['progress'][name] for name in ('done', 'running', 'pending', 'failed')} }")
        seconds, cpu = zip(*(whole_process(command) for _ in range(arguments.rounds)), strict=True)
    print(f"  rounds: {', '.join(f'{each:.2f} s' for each in seconds)}")
    return {
        f"status_{arguments.shards}_s": statistics.median(seconds),
        f"status_{arguments.shards}_cpu_s": statistics.median(cpu),
        f"submit_{tasks}_tasks_s": submitting,
    }


def whole_process(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command with all that it starts."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def leave_a_submission(run: RunFolder, config: Config, shards: list[int]) -> None:
    """What a submission that has run leaves: its JSON, and per task a log, an error log and two pickles."""
    submission = new_submission(run, config, [[shard] for shard in shards], by_hand=True)
    submission.add(Job(ATTRIBUTE, "900001", 0, len(shards)))  # Slurm has forgotten it
    for task in range(len(shards)):
        for name in ("log.out", "log.err", "result.pkl"):
            (submission.folder / f"900001_{task}_0_{name}").write_text("x")
        (submission.folder / f"900001_{task}_submitted.pkl").write_text("x")
    write_json(submission.settled, {"state": "submitted again", "why": [], "next": 2, "time": time.time()})


def fail_some(run: RunFolder, shards: range, job: str) -> None:
    """Every hundredth shard has failed for good, every twentieth was interrupted and goes on."""
    for place, shard in enumerate(shards):
        if place % 20 and place % 100:
            continue
        final = place % 100 == 0
        tail = "\n".join(f'  File "model.py", line {line}, in forward' for line in range(12)) if final else ""
        record = {
            "shard": shard, "attempt": f"{job}_{place}.r0.n0", "kind": "error" if final else "pre-empted",
            "final": final, "message": f"RuntimeError: of shard {shard}", "signature": None, "tail": tail,
            "host": "n0", "job": f"{job}_{place}", "log": None, "units": 3, "memory_gb": None, "time": time.time(),
        }  # fmt: skip
        path = run.failure(shard, record["attempt"])
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- overhead
IMAGES = 16  # of a shard
PER_TASK = 8  # shards


def part_overhead(arguments: argparse.Namespace) -> Figures:
    """ResNet-20 at 32x32, 16 images a shard, 8 shards a task; 2 nodes of 1 CPU, one worker of 1 thread on each."""
    shards = arguments.overhead_shards
    names = ("submit_overhead_ratio", "compute_of_a_shard_s", "overhead_wall_s", "overhead_command_s",
             "first_shard_begins_s", "between_tasks_s", "between_shards_s")  # fmt: skip
    # The nodes' GPUs are fakes: asked for, they make it one worker a task, where the nodes of a mini cluster, which
    # binds nothing to cores, would else each start a worker for every core of this machine.
    with temporary_folder() as folder, mini_cluster("--nodes", 2, "--cpus", 1, "--gpus", 1) as there:
        if not there:
            return dict.fromkeys(names)
        path = write_config(
            folder, classes=10, channels=1,
            data={"name": "digits", "size": SIZE, "train_images": shards * IMAGES},
            model={"name": "resnet20-cifar"}, attribution={"unit": IMAGES // 2, "num_samples": arguments.samples},
            cluster={
                "shards": shards, "threads": 1,
                "slurm": {"shards_per_task": PER_TASK, "attribute": {"gpus_per_node": 1}},
            },
        )  # fmt: skip
        run = RunFolder(folder / "run")
        started = time.time()
        command = [sys.executable, "-m", "hpcguard.attribute", str(path), "cluster.executor=slurm"]
        subprocess.run(command, check=True)
        returned = time.time() - started
        manifests = wait_for_manifests(run, shards)
    wall = max(each["published"] for each in manifests) - started
    compute = sum(each["seconds"] for each in manifests)
    print(f"  {IMAGES} images of {arguments.samples} rows a shard, {PER_TASK} shards a task, one worker a node")
    print(f"  {shards} shards: wall {wall:.1f} s, sum of their compute {compute:.1f} s")
    begun, tasks, within = gaps(manifests)
    figures = (wall / (compute / 2), compute / shards, wall, returned, begun - started, tasks, within)
    return dict(zip(names, figures, strict=True))


def wait_for_manifests(run: RunFolder, shards: int) -> list[dict[str, Any]]:
    plan = read_plan(run.plan)
    assert plan.num_shards == shards
    paths = [run.manifest(index) for index in range(shards)]
    while not all(path.exists() for path in paths):
        queue = subprocess.run(["squeue", "--noheader"], check=True, capture_output=True, text=True).stdout
        if not queue and not all(path.exists() for path in paths):
            raise SystemExit(f"{run.path}: Slurm has no job left, but shards are missing")
        time.sleep(1)
    return [json.loads(path.read_text()) for path in paths]


def gaps(manifests: list[dict[str, Any]]) -> tuple[float, float, float]:
    """When the first shard began; median seconds between the shards of two tasks on a node, and of one task."""
    tasks, within, begun = [], [], []
    for host in {each["host"] for each in manifests}:
        own = sorted((each for each in manifests if each["host"] == host), key=lambda each: each["published"])
        begun.append(own[0]["published"] - own[0]["seconds"])
        for former, latter in itertools.pairwise(own):
            gap = latter["published"] - latter["seconds"] - former["published"]
            (within if former["shard"] // PER_TASK == latter["shard"] // PER_TASK else tasks).append(gap)
    # Two at once on a core would each take twice as long, and their sum would hide every overhead.
    assert min(within, default=0.0) > -0.1, "a task computed two shards at once"
    return min(begun), statistics.median(tasks) if tasks else 0.0, statistics.median(within) if within else 0.0


# ------------------------------------------------------------------------------------------------------------ main
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--parts", default=DEFAULT_PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--shards", type=int, default=10_000, help=f"of {PER_SHARD} images each; not of overhead")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of status; the other parts have at most 3")
    parser.add_argument("--overhead-shards", type=int, default=64, help=f"of {IMAGES} images each")
    parser.add_argument("--samples", type=int, default=256, help="rows an image in the part overhead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    figures, load = run_parts({name: globals()[f"part_{name}"] for name in PARTS}, parser, arguments)
    if arguments.json:
        print(json.dumps({**figures, "hardware": hardware(), "torch": torch.__version__, "load": load}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
