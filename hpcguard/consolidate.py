"""Verify every shard of a run, in parallel under MPI, and publish one store over them.

Every planned image must be there exactly once, in shards whose bytes fit their manifests; otherwise nothing is
published, and the shards to redo are named. Writes RUN/store.h5 (a virtual view) and RUN/store.json (statistics,
digests of all sources); with --repack also RUN/packed, a few large files laid out for training, over which the view
then lies, until --no-repack. Starts its own ranks with cluster.mpi_ranks, or runs under mpiexec or srun --mpi.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from hpcguard.cluster.environment import check_tasks
from hpcguard.cluster.plan import Plan, attribution_identity, require_plan
from hpcguard.cluster.ranks import Communicator, communicator, mpi_command, run_mpi, under_mpi
from hpcguard.config import Config, SpuriousConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.metrics.attribution import Sums, combine_statistics, row_statistics, summarise, summarise_classes
from hpcguard.progress import say
from hpcguard.refinement.spurious import is_computed, judge
from hpcguard.runs import (
    RunFolder,
    digest_file,
    exclusive,
    publish_together,
    remove_temporaries,
    sealed_text,
    size,
)
from hpcguard.store import (
    attributes,
    generation,
    group_shards,
    pack_shards,
    read_manifest,
    read_store_manifest,
    shard_problem,
    store_shapes,
    view_problem,
    write_view,
)

EXAMPLE = (
    "python -m hpcguard.consolidate configs/quickstart.yaml cluster.mpi_ranks=2",
    "mpiexec -n 4 python -m hpcguard.consolidate runs/quickstart --repack",
)
SECTIONS = ("data", "model", "attribution", "cluster", "refinement")
GROUPS = 256  # of shards, each added up by one rank: cut by the plan alone, so that no sum depends on the ranks
CRITERIA = ("weight", "sensitivity", "instability", "irrelevant", "misleading")  # that need nothing but the rows


@dataclass
class Verified:
    """What ranks found in their shards."""

    problems: dict[int, str] = field(default_factory=dict)
    manifests: dict[int, dict[str, Any]] = field(default_factory=dict)
    sums: dict[int, Sums] = field(default_factory=dict)  # by group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repack", action=argparse.BooleanOptionalAction,
        help="copy the shards into few large files for training; without either a store stays as it is laid out",
    )  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """What rank 0 finds out for all ranks: they need no images, and must all do the same."""

    plan: Plan
    ids: np.ndarray
    classes: tuple[str, ...]
    repack: bool
    done: bool


def run(config: Config, arguments: argparse.Namespace) -> int:
    ranks = 1 if under_mpi() else config.cluster.mpi_ranks
    if ranks > 1 and (command := mpi_command(ranks, _own_command(arguments))):
        return run_mpi(command)
    folder, world = RunFolder(config.run), communicator()
    check_tasks(world.size)
    # One consolidation of a run at a time: another one would delete the packed files that this one publishes.
    with exclusive(folder.path) if world.rank == 0 and folder.path.is_dir() else nullcontext():
        asked: Asked = world.bcast(_ask(config, folder, arguments.repack) if world.rank == 0 else None)
        if not asked.done:
            consolidate(
                folder, asked.plan, asked.ids, asked.classes, config.refinement.spurious, world, asked.repack,
                config.cluster.quarantine,
            )  # fmt: skip
        elif world.rank == 0:
            say(f"consolidate: {folder.store} is there and fits its {asked.plan.num_shards} shards")
    return 0


def _own_command(arguments: argparse.Namespace) -> list[str]:
    repack = {None: [], True: ["--repack"], False: ["--no-repack"]}[arguments.repack]
    return [sys.executable, "-m", "hpcguard.consolidate", arguments.config, *arguments.overrides, *repack]


def _ask(config: Config, folder: RunFolder, repack: bool | None) -> Asked:
    """repack: None: as the store is laid out, if there is one."""
    images = load_images(config.data, "train")
    identity = attribution_identity(config, images, digest_file(folder.explained_weights(config)))
    plan = require_plan(folder.plan, identity)
    packed = bool(_record(folder).get("packed"))
    wanted = packed if repack is None else repack
    done = wanted == packed and view_problem(folder.store, folder.store_manifest, plan.fingerprint) is None
    return Asked(plan, images.ids, images.classes, wanted, done)


def _record(folder: RunFolder) -> dict[str, Any]:
    """store.json, or nothing where there is none that can be read."""
    try:
        return read_store_manifest(folder.store_manifest)
    except InputError:
        return {}


def consolidate(
    folder: RunFolder, plan: Plan, ids: np.ndarray, classes: Sequence[str], spurious: SpuriousConfig,
    world: Communicator, repack: bool, quarantine: float,
) -> None:  # fmt: skip
    """What all ranks do together. Raises InputError on rank 0 if a shard cannot be used; then nothing is published."""
    gathered = world.gather(_verify(folder, plan, ids, len(classes), spurious, world))
    manifests: list[dict[str, Any]] = []
    if gathered is not None:
        problems = {index: text for part in gathered for index, text in part.problems.items()}
        _check_shards(folder, plan, problems)
        found = {index: each for part in gathered for index, each in part.manifests.items()}
        manifests = [found[index] for index in range(plan.num_shards)]
        _check_quarantine(folder, plan, manifests, quarantine)
        if repack:
            _remove_unfinished(folder, generation(manifests))
    packed = _pack(folder, plan, world, world.bcast(manifests)) if repack else {}
    if gathered is not None:
        sums = {group: part for rank in gathered for group, part in rank.sums.items()}
        total = combine_statistics([sums[group] for group in sorted(sums)])
        statistics = {
            "statistics": summarise(total),
            "classes": summarise_classes(total, classes),
            "spurious": spurious.model_dump(mode="json", include={*CRITERIA, "z"}),
        }
        _publish(folder, plan, manifests, packed, statistics)
        _report(folder, plan, statistics["statistics"], world.size, len(packed))


def _verify(
    folder: RunFolder, plan: Plan, ids: np.ndarray, num_classes: int, spurious: SpuriousConfig, world: Communicator
) -> Verified:
    """This rank's groups of consecutive shards, each looked at once, with the sums of its rows."""
    found = Verified()
    size = -(-plan.num_shards // GROUPS)
    for group in range(world.rank, -(-plan.num_shards // size), world.size):
        total: Sums = {}
        for index in range(group * size, min((group + 1) * size, plan.num_shards)):
            blocks: list[Sums] = []
            visit = partial(_add_up, blocks, num_classes, spurious)
            shard, manifest = folder.shard(index), folder.manifest(index)
            own = plan.shard_ids(index, ids)
            if problem := shard_problem(shard, manifest, own, plan.fingerprint, visit=visit, classes=num_classes):
                found.problems[index] = problem
                continue
            found.manifests[index] = {**read_manifest(manifest), "bytes": shard.stat().st_size, "configuration": None}
            total = combine_statistics([total, *blocks])
        found.sums[group] = total
    return found


def _add_up(blocks: list[Sums], num_classes: int, spurious: SpuriousConfig, rows: dict[str, np.ndarray]) -> None:
    """What each criterion flags by itself is counted, before spurious.share cuts it."""
    flagged = {name: judge(rows, name, spurious)[0] for name in CRITERIA if is_computed(rows, name)}
    blocks.append(row_statistics(rows, num_classes, flagged))


def _check_shards(folder: RunFolder, plan: Plan, problems: Mapping[int, str]) -> None:
    """InputError that names every shard that cannot be used, and every file that is no shard of this plan."""
    if problems:
        listed = ", ".join(f"{names} ({why})" for names, why in _in_runs(problems))
        raise InputError(
            f"{len(problems)} of {plan.num_shards} shards in {folder.shards} cannot be used: {listed}; "
            f"run `python -m hpcguard.attribute {folder.path}` to redo them"
        )
    planned = {path.name for k in range(plan.num_shards) for path in (folder.shard(k), folder.manifest(k))}
    strange = sorted(path.name for path in folder.shards.iterdir() if not path.name.startswith("."))
    if strange := [name for name in strange if name not in planned]:
        raise InputError(
            f"{folder.shards} holds {len(strange)} files beside the plan's shards, duplicates or another plan's: "
            f"{', '.join(strange)}; run `rm` on them"
        )


def _in_runs(problems: Mapping[int, str]) -> list[tuple[str, str]]:
    """Neighbours with the same problem as one range: 00003-00008."""
    place = {index: number for number, index in enumerate(sorted(problems))}
    runs = [list(run) for _, run in groupby(sorted(problems), lambda k: (k - place[k], problems[k]))]
    return [
        (f"{run[0]:05d}" if len(run) == 1 else f"{run[0]:05d}-{run[-1]:05d}", problems[run[0]]) for run in runs
    ]  # fmt: skip


def _left_out(manifests: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    return {entry["image"]: entry["why"] for manifest in manifests for entry in manifest["quarantined"]}


def _check_quarantine(folder: RunFolder, plan: Plan, manifests: Sequence[Mapping[str, Any]], quarantine: float) -> None:
    left_out = _left_out(manifests)
    if len(left_out) > quarantine * plan.num_images:
        image, why = next(iter(left_out.items()))
        raise InputError(
            f"{len(left_out)} of {plan.num_images} images could not be explained, more than cluster.quarantine = "
            f"{quarantine:g} allows; the first: image {image}: {why}; raise cluster.quarantine to go on without "
            "them, or mend them and begin another run"
        )


def _pack(
    folder: RunFolder, plan: Plan, world: Communicator, manifests: Sequence[Mapping[str, Any]]
) -> dict[int, dict[str, Any]]:
    """Packed files by number, on rank 0; rank r has written files r, r + size, ... of them.

    None of them replaces a file of another generation: what is published stays whole until store.json names these.
    """
    shapes, name = store_shapes(manifests), generation(manifests)
    own: dict[int, dict[str, Any]] = {}
    folder.packed.mkdir(mode=0o700, exist_ok=True)
    try:
        for number, group in enumerate(group_shards([manifest["bytes"] for manifest in manifests])):
            if number % world.size == world.rank:
                target = folder.packed_file(name, number)
                shards = {folder.shard(index): manifests[index]["sha256"] for index in group}
                described = pack_shards(target, shards, shapes, plan.fingerprint, plan.identity)
                own[number] = {**described, "file": target.name}
    except BaseException:  # a full disk: leave it as full as it was
        published = _packed_sources(folder)
        for target in {folder.packed_file(name, number) for number in own} - published:
            target.unlink(missing_ok=True)
        raise
    gathered = world.gather(own)
    return {number: each for part in gathered or [] for number, each in part.items()}


def _packed_sources(folder: RunFolder) -> set[Path]:
    """Packed files under the store that is published."""
    paths = {folder.path / source for source in _record(folder).get("sources", {})}
    return {path for path in paths if path.parent == folder.packed}


def _remove_unfinished(folder: RunFolder, name: str) -> None:
    """What killed repackings of other shards have left; the caller holds the run's lock."""
    published = _packed_sources(folder)
    for path in folder.packed.glob("*.h5"):
        if path not in published and not path.name.startswith(name):
            path.unlink(missing_ok=True)
    for path in folder.packed.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _publish(
    folder: RunFolder, plan: Plan, manifests: Sequence[Mapping[str, Any]], packed: Mapping[int, Mapping[str, Any]],
    statistics: Mapping[str, Any],
) -> None:  # fmt: skip
    """View and manifest; then what the former store had and this one has not is deleted."""
    former = _packed_sources(folder)
    sources: Sequence[Path] = [folder.shard(index) for index in range(plan.num_shards)]
    described = manifests
    if packed:
        described = [packed[number] for number in range(len(packed))]
        sources = [folder.packed / each["file"] for each in described]
    _check_sources(sources, described)
    remove_temporaries(folder.store, folder.store_manifest)
    with publish_together(folder.store, folder.store_manifest) as (view, manifest):
        write_view(view, folder.store, sources, described, plan.fingerprint, plan.identity)
        record = _describe(folder, plan, manifests, sources, described, statistics)
        manifest.write_text(sealed_text({**record, "sha256": digest_file(view)}), encoding="utf-8")
    for stale in former - set(sources):
        stale.unlink(missing_ok=True)


def _check_sources(sources: Sequence[Path], described: Sequence[Mapping[str, Any]]) -> None:
    """InputError unless the files are still there, in the size in which they were verified or written."""
    for source, each in zip(sources, described, strict=True):
        if size(source) != each["bytes"]:
            raise InputError(f"{source}: has changed or gone since it was verified; run the same command again")


def _describe(
    folder: RunFolder, plan: Plan, manifests: Sequence[Mapping[str, Any]], sources: Sequence[Path],
    described: Sequence[Mapping[str, Any]], statistics: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What store.json says beside the digest of the view."""
    packed = described is not manifests
    return {
        **attributes(plan.fingerprint, plan.identity),
        "configuration": plan.identity,
        "images": sum(manifest["rows"] for manifest in manifests),
        "quarantined": sorted(_left_out(manifests)),
        "shards": plan.num_shards,
        "packed": len(described) if packed else 0,
        "worker_seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        **statistics,
        "sources": {
            str(source.relative_to(folder.path)): manifest["sha256"]
            for source, manifest in zip(sources, described, strict=True)
        },
    }


def _report(folder: RunFolder, plan: Plan, summary: Mapping[str, float], ranks: int, packed: int) -> None:
    left_out = plan.num_images - round(summary["images"])
    images = f"{summary['images']:.0f} images" + (f" ({left_out} quarantined)" if left_out else "")
    copied = f", copied into {packed} files" if packed else ""
    say(f"consolidate: {images} from {plan.num_shards} verified shards, {ranks} rank(s){copied}: {folder.store}")
    say(
        f"  segments {summary['segments']:.1f}, weighted R^2 {summary['score']:.3f}, "
        f"standard error / largest |coefficient| {summary['relative_error']:.3f}, accuracy {summary['accuracy']:.3f}"
    )


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("consolidate"))
