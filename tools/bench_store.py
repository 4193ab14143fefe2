#!/usr/bin/env python3
"""Measure hpcguard's store: bytes an image, what writing and verifying cost, how long a
consolidation takes, and how fast one trains from it.

  python tools/bench_store.py [--json] [--check] [--parts size,write,read,loader,consolidate]
      [--cifar10 DIR] [--weights FILE]

size         bytes of an explanation in a shard, and against float32 maps at 224x224
write        writing, verifying and publishing a shard against computing it (ResNet-20, 256 samples)
read         batches through AttributionDataset against the same rows from an uncompressed np.memmap
loader       share of a refinement step of ResNet-18 (CPU, batch 64, PGD-10) spent waiting for data
consolidate  1,000 shards of 1,000 rows, written by the real writer: verified and joined by 1 rank and by 2
view         a view over 10,000 shards, of which none is there: made, and opened (only where --parts names it)
compression  sizes and speeds of filters, for docs/store_compression.md; hdf5plugin's own where it is installed
             (only where --parts names it)

size, write and compression explain real images: CIFAR-10 in DIR (data/cifar10) by the published ResNet-20 in FILE
(data/weights/resnet20-12fca82f.th), slic of 50, 2 labels, 256 samples, half a second each on one core. consolidate
writes 1 GB to the folder for temporary files and takes ten minutes, most of them for the shards.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from bench_parts import Figures, hardware, run_parts
from torch.utils.data import DataLoader

from hpcguard import consolidate
from hpcguard.attribution.segments import segment_image
from hpcguard.cluster.plan import agree_on_plan, make_plan, read_plan
from hpcguard.cluster.ranks import communicator, mpi_command
from hpcguard.config import Config, DataConfig, ModelConfig, SpuriousConfig, TrainingConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.data.image_set import ArrayPixels
from hpcguard.models import build_model
from hpcguard.refinement.batches import Batches
from hpcguard.refinement.checkpoint import Checkpoints, Progress
from hpcguard.refinement.engine import make_engine
from hpcguard.refinement.spurious import flag_segments
from hpcguard.refinement.step import GuidedStep
from hpcguard.refinement.train import Watch, train
from hpcguard.runs import RunFolder
from hpcguard.shards import Explainer, classifier
from hpcguard.store import AttributionDataset, BlockShuffled, ShardWriter, Unit, build_view, shard_problem
from hpcguard.store.pack import group_shards, pack_shards
from hpcguard.store.reading import StoreReader
from hpcguard.store.schema import BETWEEN, COLUMN, COLUMNS, PACKED_CHUNK, SHARD_CHUNK, chunk_rows
from hpcguard.store.shard import LIBVER, read_manifest
from hpcguard.store.view import store_shapes

PARTS = ("size", "write", "read", "loader", "consolidate", "view", "compression")
DEFAULT_PARTS = "size,write,read,loader,consolidate"
SLIC = {"segmentation": "slic", "num_segments": 50, "num_samples": 256, "unit": 16}
NORM = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
GOALS = {  # what --check asks of the figures that were measured
    "bytes_per_image": ("at most", 900),
    "ratio_to_dense_maps_224": ("at most", 0.1),
    "write_overhead": ("at most", 0.02),
    "read_vs_memmap": ("at least", 0.2),
    "read_packed_vs_memmap": ("at least", 0.2),
    "read_in_memory_vs_memmap": ("at least", 0.9),
    "loader_share": ("at most", 0.02),
    "consolidate_1m_s": ("at most", 120),
    "mpi_speedup": ("at least", 1.6),
    "peak_memory_ratio": ("at most", 1.1),  # of ten times the rows
}


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-store-") as name:
        yield Path(name)


def bench_config(cifar10: Path, weights: Path) -> Config:
    return Config.model_validate(
        {
            "run": "bench", "device": "cpu", "data": {"name": "cifar10", "root": cifar10},
            "model": {"name": "resnet20-cifar", "weights": weights, **NORM}, "attribution": SLIC,
        }
    )  # fmt: skip


@cache
def explained(cifar10: Path, weights: Path, count: int) -> tuple[Unit, ...]:
    """The first training images of CIFAR-10, explained as `attribute` does."""
    config = bench_config(cifar10, weights)
    images, device = load_images(config.data, "train"), torch.device("cpu")
    model = classifier(config, images, weights, device)
    explainer = Explainer(config, images, model, device, 1, config.attribution.batch_size)
    unit = config.attribution.unit
    return tuple(explainer.explain([images.ids[k : k + unit] for k in range(0, count, unit)]))


def real_units(arguments: argparse.Namespace) -> tuple[Unit, ...]:
    return explained(arguments.cifar10, arguments.weights, arguments.images)


def ids_of(units: tuple[Unit, ...]) -> np.ndarray:
    return np.concatenate([unit.rows["image_id"] for unit in units])


# ------------------------------------------------------------------------------------------------------------ size
def part_size(arguments: argparse.Namespace) -> Figures:
    """CIFAR-10, slic of 50, 2 labels: coefficients, standard errors, intervals, segments and all else of a shard."""
    units = real_units(arguments)
    with temporary_folder() as folder:
        manifest = publish(folder, units)
        size = (folder / "0.h5").stat().st_size
        by_column = stored_bytes(folder / "0.h5")
        maps, segment_rows = rows_at_224(units)
        shard = publish(folder, (Unit(segment_rows, 1.0),)) and (folder / "0.h5").stat().st_size
        dense = dense_bytes(folder / "dense.h5", maps)
    count = manifest["rows"]
    for name, stored in sorted(by_column.items(), key=lambda item: -item[1]):
        print(f"  {name:<20} {stored / count:8.1f} bytes an image")
    return {
        "bytes_per_image": size / count,
        "segments_per_image": float(np.mean(np.concatenate([unit.rows["num_segments"] for unit in units]))),
        "bytes_per_image_224": shard / len(maps),
        "dense_bytes_per_image_224": dense / len(maps),
        "ratio_to_dense_maps_224": shard / dense,
    }


def publish(folder: Path, units: tuple[Unit, ...]) -> dict[str, Any]:
    writer = ShardWriter(folder / "0.h5", folder / "0.json", "bench", "u1", {"attribution": SLIC})
    return writer.publish(ids_of(units), units)


def stored_bytes(path: Path) -> dict[str, int]:
    with h5py.File(path) as file:
        return {name: file[name].id.get_storage_size() for name in COLUMN}


def rows_at_224(units: tuple[Unit, ...], count: int = 32) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Crops of a photograph at 224x224, slic of 50, with CIFAR's coefficients; as float32 maps [B, 4, 224, 224], rows.

    A map shows each pixel the value of its segment: coefficients and standard errors of two labels.
    """
    from skimage import data, transform

    config = Config.model_validate({"run": "bench", "attribution": SLIC}).attribution
    picture = data.astronaut() / 255
    crops = [picture[6 * k : 6 * k + 300, 5 * k : 5 * k + 300] for k in range(count)]
    images = [transform.resize(crop, (224, 224)).transpose(2, 0, 1).astype(np.float32) for crop in crops]
    segments = np.stack([segment_image(image, config, k) for k, image in enumerate(images)])
    counts = segments.reshape(count, -1).max(1) + 1
    random = np.random.default_rng(0)
    taken = random.integers(0, min(len(unit.rows["image_id"]) for unit in units), count)
    rows = {name: np.stack([units[k % len(units)].rows[name][taken[k]] for k in range(count)]) for name in COLUMN
            if "S" not in COLUMN[name].axes}  # fmt: skip
    rows |= {"segments": segments, "num_segments": counts, "image_id": np.arange(count)}
    present = np.arange(counts.max()) < counts[:, None, None]
    for name in ("coefficients", "standard_error", "interval"):
        pool = np.concatenate([unit.rows[name][np.isfinite(unit.rows[name])] for unit in units])
        drawn = random.choice(pool, (count, 2, counts.max())).astype(np.float32)
        rows[name] = np.where(present, drawn, np.nan)
    for name in ("sensitivity", "instability"):
        pool = np.concatenate([unit.rows[name].ravel() for unit in units])
        drawn = random.choice(pool[np.isfinite(pool)] if np.isfinite(pool).any() else pool, present[:, 0].shape)
        rows[name] = np.where(present[:, 0], drawn, np.nan).astype(np.float32)
    both = np.concatenate([rows["coefficients"], rows["standard_error"]], 1)
    return np.stack([values[:, own] for values, own in zip(both, segments, strict=True)]), rows


def dense_bytes(path: Path, maps: np.ndarray) -> int:
    """float32 maps as others store them: a chunk an image, gzip-4 with shuffle."""
    with h5py.File(path, "w") as file:
        made = file.create_dataset(
            "maps", data=maps, chunks=(1, *maps.shape[1:]), compression="gzip", compression_opts=4, shuffle=True
        )
        return int(made.id.get_storage_size())


# ----------------------------------------------------------------------------------------------------------- write
def part_write(arguments: argparse.Namespace) -> Figures:
    """One shard of these images: write, read back, publish, manifest; against the seconds of its explanations."""
    units = real_units(arguments)
    compute = sum(unit.seconds for unit in units)
    writes, verifies = [], []
    with temporary_folder() as folder:
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            publish(folder, units)
            writes.append(time.perf_counter() - started)
            started = time.perf_counter()
            assert shard_problem(folder / "0.h5", folder / "0.json", ids_of(units), "bench") is None
            verifies.append(time.perf_counter() - started)
    count = len(ids_of(units))
    return {
        "compute_ms_per_image": 1000 * compute / count,
        "write_ms_per_image": 1000 * statistics.median(writes) / count,
        "verify_ms_per_image": 1000 * statistics.median(verifies) / count,
        "write_overhead": statistics.median(writes) / compute,
    }


# ----------------------------------------------------------------------------------------------------- consolidate
SIZE, SEGMENTS, LABELS = 32, 28, 2
FINGERPRINTED = {"made by": "bench_store"}


def part_consolidate(arguments: argparse.Namespace) -> Figures:
    """1 rank and 2 ranks in turns over the same shards: digests, every row, statistics, view; medians of the rounds.

    mpi_speedup is of wall times; _cpu of the CPU times of the slowest rank, which other work leaves nearly alone.
    """
    shards, rounds = arguments.shards, min(arguments.rounds, 3)
    with temporary_folder() as folder:
        started = time.perf_counter()
        run = write_shards(folder / "run", shards, arguments.rows)
        total = sum(run.shard(index).stat().st_size for index in range(shards))
        print(f"  {shards} shards, {total / 1e9:.2f} GB, written in {time.perf_counter() - started:.0f} s", flush=True)
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for _ in range(rounds):
            for ranks in found:
                found[ranks].append(consolidated(run, ranks))
                print(f"  {ranks} rank(s): {found[ranks][-1]}", flush=True)
        packed = consolidated(run, 2, "--repack")
        small = consolidated(write_shards(folder / "small", shards, max(1, arguments.rows // 10)), 2)
    middle = {ranks: statistics.median(each["seconds"] for each in found[ranks]) for ranks in found}
    turns = list(zip(found[1], found[2], strict=True))
    return {
        "consolidate_1m_s": middle[2],
        "consolidate_1m_one_rank_s": middle[1],
        "consolidate_1m_command_s": statistics.median(each["command_seconds"] for each in found[2]),
        "mpi_speedup": statistics.median(one["seconds"] / two["seconds"] for one, two in turns),
        "mpi_speedup_cpu": statistics.median(one["cpu_seconds"] / two["cpu_seconds"] for one, two in turns),
        "repack_1m_s": packed["seconds"],
        "peak_memory_mb": max(each["memory_mb"] for each in found[2]),
        "peak_memory_of_a_tenth_of_the_rows_mb": small["memory_mb"],
        "peak_memory_ratio": max(each["memory_mb"] for each in found[2]) / small["memory_mb"],
    }


def write_shards(folder: Path, shards: int, per_shard: int) -> RunFolder:
    """Shards by the real writer; segments are cells of random points, values are random."""
    run, ids = RunFolder(folder), np.arange(shards * per_shard)
    run.create()
    plan = agree_on_plan(run.plan, make_plan(ids, per_shard, shards, FINGERPRINTED))
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1).reshape(-1, 1, 2)
    cells = [((grid - random.uniform(0, SIZE, (SEGMENTS, 2))) ** 2).sum(-1).argmin(1) for _ in range(per_shard)]
    maps = np.stack(cells).reshape(per_shard, SIZE, SIZE)
    for index in range(shards):
        own = plan.shard_ids(index, ids)
        rows = random_rows(own, np.roll(maps, index, 0), random)
        writer = ShardWriter(run.shard(index), run.manifest(index), plan.fingerprint, "u1", plan.identity)
        writer.publish(own, [Unit(rows, 300.0)], shard=index)
    return run


def random_rows(ids: np.ndarray, maps: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    count = len(ids)
    rows: dict[str, np.ndarray] = {"image_id": ids, "segments": maps, "num_segments": np.full(count, SEGMENTS)}
    for column in COLUMNS:
        if column.name in rows:
            continue
        shape = (count, *({"L": LABELS, "S": SEGMENTS}[axis] for axis in column.axes[1:]))
        floats = column.dtype == "f4"
        rows[column.name] = random.normal(0, 0.01, shape) if floats else random.integers(1, 10, shape)
        if column.name in BETWEEN:
            rows[column.name] = abs(rows[column.name])
    rows["target"][:, 0] = rows["label"]
    return rows


def consolidated(run: RunFolder, ranks: int, *options: str) -> dict[str, Any]:
    """consolidate's own work in so many ranks: seconds, of the whole command too, and a rank's largest memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--as-rank", str(run.path), *options]
    environment = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    started = time.perf_counter()
    done = subprocess.run(
        mpi_command(ranks, command) or command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert figures["ranks"] == ranks
    return {**figures, "command_seconds": round(time.perf_counter() - started, 2)}


def as_rank(folder: Path, repack: bool) -> None:
    """One rank of a consolidation; rank 0 prints what it took."""
    run, world = RunFolder(folder), communicator()
    plan = read_plan(run.plan)
    ids, classes = np.arange(plan.num_images), [str(k) for k in range(10)]
    cpu: dict[str, float] = {"_verify": 0.0, "_publish": 0.0}  # not of MPI, which waits busily
    for name in cpu:
        setattr(consolidate, name, counted(getattr(consolidate, name), cpu, name))
    world.gather(None)
    started = time.perf_counter()
    consolidate.consolidate(run, plan, ids, classes, SpuriousConfig(), world, repack, 0.01)
    seconds = time.perf_counter() - started
    every = world.gather((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, cpu))
    if every is not None:
        slowest = max(each["_verify"] for _, each in every) + cpu["_publish"]
        memory = round(max(each for each, _ in every), 1)
        figures = {"seconds": round(seconds, 2), "cpu_seconds": round(slowest, 2), "memory_mb": memory}
        print(json.dumps({"ranks": world.size, **figures}))


def counted(function: Callable[..., Any], cpu: dict[str, float], name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        started = time.process_time()
        try:
            return function(*arguments)
        finally:
            cpu[name] += time.process_time() - started

    return call


# ------------------------------------------------------------------------------------------------------------ view
def part_view(arguments: argparse.Namespace) -> Figures:
    """A view over 10,000 shards is made, and opened by another process: seconds of CPU, memory beside the imports'."""
    count, sizes = 10_000, {"L": LABELS, "S": SEGMENTS, "H": SIZE, "W": SIZE}
    shapes = {column.name: [100, *(sizes[axis] for axis in column.axes[1:])] for column in COLUMNS}
    dtypes = {column.name: "|u1" if column.name == "segments" else column.dtype for column in COLUMNS}
    manifest = {"columns": {name: [dtypes[name], shapes[name]] for name in shapes}}
    with temporary_folder() as folder:
        shards = [folder / f"shards/{index:05d}.h5" for index in range(count)]
        making = measured(lambda: build_view(folder / "store.h5", shards, [manifest] * count, "bench"))
        opening = measured(lambda: StoreReader(folder / "store.h5"))
    return {
        "view_of_10000_s": making[0], "view_of_10000_mb": making[1],
        "open_view_of_10000_s": opening[0], "open_view_of_10000_mb": opening[1],
    }  # fmt: skip


def measured(task: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU and further MB of a task in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.process_time()
        task()
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(writing, json.dumps([time.process_time() - started, more / 1024]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seconds, more = json.loads(pipe.read())
    os.waitpid(child, 0)
    return seconds, more


# ----------------------------------------------------------------------------------------------------- compression
def part_compression(arguments: argparse.Namespace) -> Figures:
    """Each filter on the same rows, all with fletcher32; MB of rows a second, whole columns, one thread."""
    units = real_units(arguments)
    with temporary_folder() as folder:
        publish(folder, units)
        with h5py.File(folder / "0.h5") as file:
            rows = {name: file[name][:] for name in COLUMN}
        raw = sum(values.nbytes for values in rows.values())
        count = len(rows["image_id"])
        figures: Figures = {}
        print(f"  {'filter':<26} {'chunk':>8} {'bytes/image':>11} {'write MB/s':>10} {'read MB/s':>10}")
        for name, options in filters().items():
            for target in (SHARD_CHUNK, PACKED_CHUNK):
                path = folder / "try.h5"
                write = fastest(lambda: write_with(path, rows, options, target), arguments.rounds)  # noqa: B023
                read = fastest(lambda: read_all(path), arguments.rounds)  # noqa: B023
                size, kib = path.stat().st_size / count, target >> 10
                print(f"  {name:<26} {kib:>4} KiB {size:>11.1f} {raw / write / 1e6:>10.1f} {raw / read / 1e6:>10.1f}")
                figures[f"{name}_{kib}k_bytes"] = size
    return {**figures, "raw_bytes_per_image": raw / count}


def filters() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"none": {}}
    for shuffle in (False, True):
        tail = "+shuffle" if shuffle else ""
        found |= {f"gzip-{level}{tail}": {"compression": "gzip", "compression_opts": level, "shuffle": shuffle}
                  for level in (1, 2, 3, 4, 6)}  # fmt: skip
        found[f"lzf{tail}"] = {"compression": "lzf", "shuffle": shuffle}
    try:
        import hdf5plugin
    except ImportError:
        print("  hdf5plugin is not installed: zstd and blosc2 are left out")
        return found
    for level in (1, 3, 9):
        found[f"zstd-{level}+shuffle"] = {**hdf5plugin.Zstd(clevel=level), "shuffle": True}
        for kind, name in ((hdf5plugin.Blosc2.SHUFFLE, "shuffle"), (hdf5plugin.Blosc2.BITSHUFFLE, "bitshuffle")):
            found[f"blosc2-zstd-{level}+{name}"] = dict(hdf5plugin.Blosc2("zstd", level, kind))
    return found


def write_with(path: Path, rows: dict[str, np.ndarray], options: dict[str, Any], target: int) -> None:
    with h5py.File(path, "w", libver=LIBVER) as file:
        for column in COLUMNS:
            data = rows[column.name]
            chunks = (chunk_rows(data.shape, data.dtype, target), *data.shape[1:])
            file.create_dataset(column.name, data=data, chunks=chunks, fletcher32=True, **options)


def read_all(path: Path) -> None:
    with h5py.File(path) as file:
        for name in COLUMN:
            file[name][:]


def fastest(task: Callable[[], object], rounds: int) -> float:
    """Seconds of CPU, the least of several rounds: other work on the machine only ever adds."""
    seconds = []
    for _ in range(rounds):
        started = time.process_time()
        task()
        seconds.append(time.process_time() - started)
    return min(seconds)


# ------------------------------------------------------------------------------------------------------------ read
READ_BATCH, READ_SEGMENTS = 64, 28


def part_read(arguments: argparse.Namespace) -> Figures:
    """Block-shuffled batches of 64, shards by the real writer; one thread, files in the page cache."""
    with temporary_folder() as folder:
        store, images = readable_store(folder, arguments)
        disk, held = (AttributionDataset(store, images, memory=memory) for memory in (False, True))
        packed = AttributionDataset(packed_store(store), images, memory=False)
        mapped = memory_maps(folder, held)
        blocks = BlockShuffled(disk, READ_BATCH)
        # What BlockShuffled gives, so that images are read in the same order.
        batches = [np.searchsorted(images.ids, batch["image_id"].numpy()) for batch in BlockShuffled(held, READ_BATCH)]
        parts = [np.sort(np.concatenate(part)) for part in batched(batches, blocks.part_rows // READ_BATCH)]
        one = next(iter(blocks))
        again = disk.complete(batches[0], {name: each[batches[0]] for name, each in mapped.items()})
        assert all(torch.equal(one[name].nan_to_num(), again[name].nan_to_num()) for name in again)
        tasks: dict[str, Callable[[], object]] = {
            "store": lambda: list_lengths(BlockShuffled(disk, READ_BATCH)),
            "packed": lambda: list_lengths(BlockShuffled(packed, READ_BATCH)),
            "held": lambda: list_lengths(BlockShuffled(held, READ_BATCH)),
            "memmap": lambda: list_lengths(
                disk.complete(own, {name: each[own] for name, each in mapped.items()}) for own in batches
            ),
            "store_rows": lambda: [disk.decode(part) for part in parts],
            "memmap_rows": lambda: [each[own] for own in batches for each in mapped.values()],
        }
        wall, cpu = in_turns(tasks, arguments.rounds)
        cold, _ = in_turns({name: tasks[name] for name in ("store", "memmap")}, arguments.rounds, folder)
        worker = one_worker(disk)
    for name, seconds in wall.items():
        own, both = len(images) / seconds, f"{1e6 * seconds / len(images):.2f}"
        print(f"  {name:<12} {own:12.0f} rows/s {both:>8} us/row, CPU {1e6 * cpu[name] / len(images):.2f} us/row")
    return {
        "read_vs_memmap": wall["memmap"] / wall["store"],
        "read_in_memory_vs_memmap": wall["memmap"] / wall["held"],
        "read_packed_vs_memmap": wall["memmap"] / wall["packed"],
        "rows_per_second_one_worker": worker,
        "read_vs_memmap_cpu": cpu["memmap"] / cpu["store"],
        "read_in_memory_vs_memmap_cpu": cpu["memmap"] / cpu["held"],
        "read_vs_memmap_cold": cold["memmap"] / cold["store"],
        "read_vs_memmap_without_images": wall["memmap_rows"] / wall["store_rows"],
        "rows_per_second_same_process": len(images) / wall["store"],
    }


def readable_store(folder: Path, arguments: argparse.Namespace) -> tuple[Path, ImageSet]:
    """A view over shards, and the images: CIFAR-10 where it is, else noise of its shape."""
    count = arguments.read_rows
    if (arguments.cifar10 / "cifar-10-batches-py").is_dir():
        images = load_images(DataConfig(name="cifar10", root=arguments.cifar10), "train")
        images = images.subset(images.ids[:count])
    else:
        print("  no CIFAR-10: noise")
        random, ids = np.random.default_rng(0), np.arange(count)
        pixels = ArrayPixels(random.integers(0, 256, (count, 3, 32, 32), np.uint8), 255)
        images = ImageSet("noise", "train", tuple("0123456789"), ids, ids % 10, pixels.shape, pixels)
    shards, manifests = [], []
    distinct = read_rows(min(count, 2048))
    for start in range(0, len(images), arguments.read_shard):
        ids = images.ids[start : start + arguments.read_shard]
        rows = {name: each[ids % len(distinct["label"])] for name, each in distinct.items()}
        labels = images.labels_of(ids)
        rows |= {"image_id": ids, "label": labels, "target": np.stack([labels, (labels + 1) % 10], 1)}
        path, manifest = folder / f"shards/{len(shards)}.h5", folder / f"shards/{len(shards)}.json"
        manifests.append(ShardWriter(path, manifest, "bench", "u1").publish(ids, [Unit(rows, 1.0)]))
        shards.append(path)
    build_view(folder / "store.h5", shards, manifests, "bench")
    size = sum(path.stat().st_size for path in shards)
    print(f"  {len(images)} rows in {len(shards)} shards, {size / len(images):.0f} bytes a row", flush=True)
    return folder / "store.h5", images


def packed_store(store: Path) -> Path:
    """The same rows after `consolidate --repack`."""
    shards = StoreReader(store).files()
    manifests = [read_manifest(path.with_suffix(".json")) for path in shards]
    packed, described = [], []
    for group in group_shards([path.stat().st_size for path in shards]):
        packed.append(store.parent / f"packed/{len(packed)}.h5")
        packed[-1].parent.mkdir(exist_ok=True)
        digests = {shards[index]: manifests[index]["sha256"] for index in group}
        described.append(pack_shards(packed[-1], digests, store_shapes(manifests), "bench", {}))
    build_view(store.with_name("packed.h5"), packed, described, "bench")
    return store.with_name("packed.h5")


def read_rows(count: int) -> dict[str, np.ndarray]:
    """Rows such as LIME's of CIFAR: segments are the cells of 28 random points, values are random."""
    random = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(np.arange(32), np.arange(32)), -1).reshape(-1, 1, 2)
    points = random.uniform(0, 32, (count, READ_SEGMENTS, 2))
    maps = np.stack([((grid - own) ** 2).sum(-1).argmin(1).reshape(32, 32) for own in points])
    sizes = {"N": count, "L": 2, "S": READ_SEGMENTS}
    rows = {
        column.name: abs(random.normal(0, 0.01, [sizes[axis] for axis in column.axes])).astype(np.float32)
        if column.dtype == "f4" else random.integers(0, 10, [sizes[axis] for axis in column.axes])
        for column in COLUMNS if column.name != "segments"
    }  # fmt: skip
    rows["coefficients"] *= random.choice([-1, 1], rows["coefficients"].shape).astype(np.float32)
    rows["num_samples"] += 1
    return {**rows, "segments": maps, "num_segments": np.full(count, READ_SEGMENTS)}


def batched(batches: list[np.ndarray], count: int) -> Iterator[list[np.ndarray]]:
    yield from (batches[start : start + count] for start in range(0, len(batches), count))


def memory_maps(folder: Path, held: AttributionDataset) -> dict[str, np.ndarray]:
    """The columns of all items, uncompressed, in files of their own."""
    maps = {}
    for name, values in held.decode(np.arange(len(held))).items():
        values.tofile(folder / f"{name}.bin")
        maps[name] = np.memmap(folder / f"{name}.bin", values.dtype, "r", shape=values.shape)
    os.sync()  # pages that are not written yet could not be dropped
    return maps


def list_lengths(batches: Iterable[dict[str, torch.Tensor]]) -> int:
    return sum(len(batch["label"]) for batch in batches)


def in_turns(
    tasks: dict[str, Callable[[], object]], rounds: int, cold: Path | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Least wall and CPU seconds of each task, run in turns; cold: files below are dropped from the cache before."""
    wall, cpu = dict.fromkeys(tasks, math.inf), dict.fromkeys(tasks, math.inf)
    for _ in range(rounds):
        for name, task in tasks.items():
            for path in cold.rglob("*") if cold else ():
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started, busy = time.perf_counter(), time.process_time()
            task()
            wall[name] = min(wall[name], time.perf_counter() - started)
            cpu[name] = min(cpu[name], time.process_time() - busy)
    return wall, cpu


def one_worker(dataset: AttributionDataset) -> float:
    """Rows a second that a DataLoader gets from one worker, after its first batch."""
    batches = iter(DataLoader(BlockShuffled(dataset, READ_BATCH), batch_size=None, num_workers=1, prefetch_factor=8))
    next(batches)
    started = time.perf_counter()
    return list_lengths(batches) / (time.perf_counter() - started)


# ---------------------------------------------------------------------------------------------------------- loader
def part_loader(arguments: argparse.Namespace) -> Figures:
    """Guided steps of ResNet-18 on CIFAR's size, batch 64, PGD-10, all loss terms, one CPU thread; random rows."""
    settings = {"batch_size": 64, "epochs": 1, "max_steps": arguments.steps, "engine": "torch", "augment": "crop-flip"}
    training = TrainingConfig.model_validate({**settings, "spurious": {"max_empty": 1.0}})
    with temporary_folder() as folder:
        store, images = readable_store(folder, arguments)
        datasets = {name: AttributionDataset(store, images, ["segments"], name == "held") for name in ("disk", "held")}
        for dataset in datasets.values():
            dataset.flagged = flag_segments(dataset.rows, training.spurious, 0)
        net = build_model(ModelConfig(name="resnet18-cifar"), len(images.classes), images.shape[0])
        step = GuidedStep(net, training, torch.full((3,), 0.5))
        waits: list[float] = []
        ends = [time.perf_counter()]
        read = timed(datasets["disk"].batch, waits)
        engine = make_engine(step, training, torch.device("cpu"), 1)
        train(
            engine, None, Batches(read, images.ids), None, training, Checkpoints(folder / "arm", "bench"), Progress(),
            Watch(lambda entry: ends.append(time.perf_counter())),
        )  # fmt: skip
        random, held_waits = np.random.default_rng(0), list[float]()
        held = timed(datasets["held"].batch, held_waits)
        for _ in range(100):
            held(random.integers(0, len(images), 64))
    step_s = statistics.median(np.diff(ends).tolist())
    return {
        "loader_share": statistics.median(held_waits) / step_s,
        "loader_share_from_disk": statistics.median(waits) / step_s,
        "refinement_step_s": step_s,
        "loader_batch_ms": 1000 * statistics.median(held_waits),
        "loader_batch_from_disk_ms": 1000 * statistics.median(waits),
    }


def timed(
    read: Callable[[np.ndarray], dict[str, torch.Tensor]], seconds: list[float]
) -> Callable[[np.ndarray], dict[str, torch.Tensor]]:
    def measured(chosen: np.ndarray) -> dict[str, torch.Tensor]:
        started = time.perf_counter()
        batch = read(chosen)
        seconds.append(time.perf_counter() - started)
        return batch

    return measured


# ------------------------------------------------------------------------------------------------------------ main
def missed(figures: dict[str, Any]) -> list[str]:
    """Goals that the measured figures miss, in words; a figure that was not measured misses none."""
    return [
        f"{name} is {figures[name]:.4g}, {how} {bound:g} is asked for"
        for name, (how, bound) in GOALS.items()
        if figures.get(name) is not None and (figures[name] > bound if how == "at most" else figures[name] < bound)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure misses its goal (GOALS in this file)")
    parser.add_argument("--parts", default=DEFAULT_PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--images", type=int, default=512, help="explained for size, write and compression")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=1000, help="of part consolidate")
    parser.add_argument("--rows", type=int, default=1000, help="of a shard of part consolidate")
    parser.add_argument("--read-rows", type=int, default=50_000, help="of parts read and loader")
    parser.add_argument("--read-shard", type=int, default=1000, help="rows of a shard of parts read and loader")
    parser.add_argument("--steps", type=int, default=3, help="of part loader")
    parser.add_argument("--cifar10", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--weights", type=Path, default=Path("data/weights/resnet20-12fca82f.th"))
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repack", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        as_rank(arguments.as_rank, arguments.repack)
        return 0
    torch.set_num_threads(1)
    figures, load = run_parts({name: globals()[f"part_{name}"] for name in PARTS}, parser, arguments)
    if arguments.json:
        versions = {"h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version}
        print(json.dumps({**figures, "hardware": hardware(), **versions, "load": load}))
    found = missed(figures) if arguments.check else []
    for line in found:
        print(f"bench_store: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
