"""Verify every shard of a run, in parallel under MPI, and publish one store over them.

Every planned image must be there exactly once, in shards whose bytes fit their manifests; otherwise nothing is
published, and the shards to redo are named. Writes RUN/store.h5 (a virtual view) and RUN/store.json (statistics,
digests of all sources). Starts its own ranks with cluster.mpi_ranks, or runs under mpiexec or srun --mpi.
"""

import argparse
import sys
from typing import Any

import numpy as np

from hpcguard.cluster.plan import Plan, attribution_identity, require_plan
from hpcguard.cluster.ranks import Communicator, communicator, mpi_command, run_mpi, under_mpi
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.metrics.attribution import combine_statistics, row_statistics, summarise
from hpcguard.progress import say
from hpcguard.runs import RunFolder, digest_file, read_json, write_json
from hpcguard.store import build_view, open_rows, shard_problem, view_problem

EXAMPLE = (
    "python -m hpcguard.consolidate configs/quickstart.yaml cluster.mpi_ranks=2",
    "mpiexec -n 4 python -m hpcguard.consolidate runs/quickstart",
)
SECTIONS = ("data", "model", "attribution", "cluster")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options beside the common ones."""


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    images = load_images(config.data, "train")
    identity = attribution_identity(config, images, digest_file(folder.explained_weights(config)))
    plan = require_plan(folder.plan, identity)
    if not under_mpi():
        if not view_problem(folder.store, folder.store_manifest, plan.fingerprint):
            say(f"consolidate: {folder.store} is there and fits its {plan.num_shards} shards")
            return 0
        if config.cluster.mpi_ranks > 1 and (command := mpi_command(config.cluster.mpi_ranks, _own_command(arguments))):
            return run_mpi(command)
    world = communicator()
    problems, statistics = _verify(folder, plan, images, world)
    if world.rank == 0:
        _publish(folder, plan, problems, statistics, world.size, config.cluster.quarantine)
    return 0


def _own_command(arguments: argparse.Namespace) -> list[str]:
    return [sys.executable, "-m", "hpcguard.consolidate", arguments.config, *arguments.overrides]


def _verify(
    folder: RunFolder, plan: Plan, images: ImageSet, world: Communicator
) -> tuple[dict[int, str], dict[str, np.ndarray]]:
    """Rank r verifies shards r, r + size, ...; rank 0 gets all problems and the summed statistics."""
    problems: dict[int, str] = {}
    sums: dict[int, dict[str, np.ndarray]] = {}
    for index in range(world.rank, plan.num_shards, world.size):
        ids = plan.shard_ids(index, images.ids)
        problem = shard_problem(folder.shard(index), folder.manifest(index), ids, plan.fingerprint)
        if problem:
            problems[index] = problem
        else:
            sums[index] = row_statistics(open_rows(folder.shard(index)), len(images.classes))
    gathered = world.gather((problems, sums))
    if gathered is None:
        return {}, {}
    all_sums = {index: part for _, sums in gathered for index, part in sums.items()}
    # Summed in the order of shards, so that the result does not depend on the number of ranks.
    total = combine_statistics([all_sums[index] for index in sorted(all_sums)])
    return {index: text for problems, _ in gathered for index, text in problems.items()}, total


def _publish(
    folder: RunFolder, plan: Plan, problems: dict[int, str], statistics: dict[str, np.ndarray], ranks: int,
    quarantine: float,
) -> None:  # fmt: skip
    if problems:
        listed = ", ".join(f"{index:05d} ({problems[index]})" for index in sorted(problems)[:5])
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(
            f"{len(problems)} of {plan.num_shards} shards in {folder.shards} cannot be used: {listed}{more}; "
            f"run `python -m hpcguard.attribute {folder.path}` to redo them"
        )
    shards = [folder.shard(index) for index in range(plan.num_shards)]
    manifests = [
        read_json(folder.manifest(index), "run attribute again", columns=dict) for index in range(plan.num_shards)
    ]
    left_out = {entry["image"]: entry["why"] for manifest in manifests for entry in manifest.get("quarantined", [])}
    if len(left_out) > quarantine * plan.num_images:
        image, why = next(iter(left_out.items()))
        raise InputError(
            f"{len(left_out)} of {plan.num_images} images could not be explained, more than cluster.quarantine = "
            f"{quarantine:g} allows; the first: image {image}: {why}; raise cluster.quarantine to go on without "
            "them, or mend them and begin another run"
        )
    build_view(folder.store, shards, manifests, plan.fingerprint)
    summary = summarise(statistics)
    record: dict[str, Any] = {
        "fingerprint": plan.fingerprint,
        "sha256": digest_file(folder.store),
        "images": plan.num_images - len(left_out),
        "quarantined": sorted(left_out),
        "shards": plan.num_shards,
        "ranks": ranks,
        "worker_seconds": round(sum(manifest.get("seconds", 0) for manifest in manifests), 1),
        "statistics": summary,
        "sources": {
            str(shard.relative_to(folder.path)): manifest["sha256"]
            for shard, manifest in zip(shards, manifests, strict=True)
        },
    }
    write_json(folder.store_manifest, record)
    images = f"{record['images']} images" + (f" ({len(left_out)} quarantined)" if left_out else "")
    say(f"consolidate: {images} from {plan.num_shards} verified shards, {ranks} rank(s): {folder.store}")
    say(
        f"  segments {summary['segments']:.1f}, weighted R^2 {summary['score']:.3f}, "
        f"standard error / largest |coefficient| {summary['relative_error']:.3f}, accuracy {summary['accuracy']:.3f}"
    )


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("consolidate"))
