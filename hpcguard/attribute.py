"""Explain every training image with LIME, in shards, and keep what is done.

Writes RUN/plan.json once, then RUN/shards/*.h5 with a manifest each. Running the same command again does only the
shards that are missing or damaged. The stored values depend on configuration, weights and data, never on the number
of shards or workers.
"""

import argparse
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcguard.attribution import explain_batch, true_and_runner_up
from hpcguard.attribution.ahead import Block, segmented_ahead
from hpcguard.attribution.segments import check_segmentation, labels_fit_a_byte, segments_on_device
from hpcguard.cluster.devices import full_float32, pick_device
from hpcguard.cluster.local import Report, cores_of_a_worker, run_local
from hpcguard.cluster.plan import Plan, agree_on_plan, attribution_identity, make_plan, require_plan
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.models import check_answers, fastest_layout, for_inference, load_model
from hpcguard.progress import progress, say
from hpcguard.runs import RunFolder, digest_file
from hpcguard.store import ShardWriter, rows_from, shard_problem

EXAMPLE = (
    "python -m hpcguard.attribute configs/quickstart.yaml --dry-run",
    "python -m hpcguard.attribute configs/quickstart.yaml cluster.workers=2",
)
SECTIONS = ("data", "model", "attribution", "cluster")
SAMPLE_IMAGES = 2  # explained to estimate the cost
MOST_SEGMENTERS = 4  # of cluster.segmenters: auto


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true", help="print plan, shards and an estimate of the cost; start nothing"
    )


def run(config: Config, arguments: argparse.Namespace) -> int:
    pick_device(config.device)
    images = load_images(config.data, "train")
    folder = RunFolder(config.run)
    if arguments.dry_run:
        return _dry_run(config, images, folder)
    weights = folder.explained_weights(config)
    identity = attribution_identity(config, images, digest_file(weights))
    model = load_model(config.model, len(images.classes), images.shape[0], weights)
    check_answers(model, torch.from_numpy(images.images(images.ids[:1])), len(images.classes))
    _check_segmentation(config, images)
    folder.create()
    plan = agree_on_plan(folder.plan, make_plan(images.ids, config.attribution.unit, config.cluster.shards, identity))
    if plan.num_shards != config.cluster.shards:
        say(f"plan: {plan.num_shards} shards, as first planned (cluster.shards = {config.cluster.shards} is not used)")
    digests = {"data_sha256": identity["data"]["sha256"], "weights_sha256": identity["model"]["weights_sha256"]}
    folder.record_config(config, **digests)
    problems = {index: _problem(folder, plan, images, index) for index in range(plan.num_shards)}
    todo = [index for index, problem in problems.items() if problem]
    _say_what_remains(problems, plan, folder)
    if not todo:
        return 0
    return _run_shards(config, folder, plan, images, todo)


def _check_segmentation(config: Config, images: ImageSet) -> None:
    check_segmentation(images.images(images.ids[:1])[0], config.attribution, int(images.ids[0]))


def _problem(folder: RunFolder, plan: Plan, images: ImageSet, index: int) -> str | None:
    ids = plan.shard_ids(index, images.ids)
    return shard_problem(folder.shard(index), folder.manifest(index), ids, plan.fingerprint)


def _say_what_remains(problems: dict[int, str | None], plan: Plan, folder: RunFolder) -> None:
    todo = {index: problem for index, problem in problems.items() if problem}
    done = plan.num_shards - len(todo)
    if not todo:
        say(
            f"attribute: all {plan.num_shards} shards ({plan.num_images} images) are done and verified: {folder.shards}"
        )
        return
    say(f"attribute: {plan.num_images} images in {plan.num_shards} shards; {done} done, {len(todo)} to do")
    for index, problem in todo.items():
        if problem != "missing":
            say(f"  shard {index:05d}: {problem}; doing it again")


def _run_shards(config: Config, folder: RunFolder, plan: Plan, images: ImageSet, todo: list[int]) -> int:
    units = {index: len(plan.units(index, images.ids)) for index in todo}
    reported = dict.fromkeys(todo, 0)
    started = time.monotonic()
    with progress("attribute", sum(units.values()), "units") as meter:

        def on_progress(index: int, amount: int) -> None:
            # Zero: the worker died and the shard starts again, so that what it had reported no longer counts.
            meter.advance(amount or -reported[index])
            reported[index] = reported[index] + amount if amount else 0

        def on_end(index: int, problem: str | None) -> None:
            if problem:
                (folder.logs / f"shard_{index:05d}.log").write_text(problem)
            meter.note(f"shard {index:05d} {'FAILED' if problem else 'done'}")

        outcome = run_local(
            partial(attribute_shard, config, plan), todo, config.cluster.workers, config.cluster.threads,
            config.cluster.attempts, on_progress, on_end,
        )  # fmt: skip
    rate = len(images) / (time.monotonic() - started)
    say(f"attribute: {len(outcome.done)} of {len(todo)} shards done in {time.monotonic() - started:.1f} s")
    for index, problem in sorted(outcome.failed.items()):
        say(
            f"  shard {index:05d} FAILED: {problem.strip().splitlines()[-1]} (log: {folder.logs}/shard_{index:05d}.log)"
        )
    if outcome.failed:
        say("  the same command tries the failed shards again")
    elif len(todo) == plan.num_shards:
        say(f"  {rate:.1f} images a second with {config.cluster.workers} workers")
    return 1 if outcome.failed else 0


def attribute_shard(config: Config, plan: Plan, index: int, slot: int, report: Report) -> None:
    """Explain one shard of a plan and publish it; `slot` chooses the GPU where there are several."""
    folder = RunFolder(config.run)
    images = load_images(config.data, "train")
    device = pick_device(config.device, slot)
    weights = folder.explained_weights(config)
    if digest_file(weights) != plan.identity["model"]["weights_sha256"]:
        raise InputError(f"{weights}: changed since the plan was made; restore it, or set run to another folder")
    predict = probabilities(config, images, weights, device)
    narrow = labels_fit_a_byte(config.attribution, *images.shape[1:])
    writer = ShardWriter(folder.shard(index), folder.manifest(index), plan.fingerprint, "u1" if narrow else "u2")
    with closing(_segmented(config, images, plan.units(index, images.ids), device)) as blocks:
        for ids, pixels, segments in blocks:
            writer.append(explain_unit(predict, pixels, images.labels_of(ids), ids, config, device, segments))
            report(1)
    writer.publish(plan.shard_ids(index, images.ids), shard=index, pid=os.getpid())


def _segmented(
    config: Config, images: ImageSet, units: list[np.ndarray], device: torch.device
) -> Generator[tuple[np.ndarray, np.ndarray, np.ndarray | None], None, None]:
    """(ids, images, segments) of each unit; no segments where they are best made with the explanation."""
    blocks: Iterator[Block] = ((ids, images.images(ids)) for ids in units)
    processes = segmenters(config, device.type, images.shape[0])
    if processes:
        yield from segmented_ahead(blocks, config.attribution, processes)
    else:
        yield from ((ids, pixels, None) for ids, pixels in blocks)


def segmenters(config: Config, device_type: str, channels: int) -> int:
    """How many processes segment for one worker whose model runs on such a device."""
    if config.cluster.segmenters != "auto":
        return config.cluster.segmenters
    if device_type == "cpu" or segments_on_device(config.attribution, device_type, channels):
        return 0
    workers = min(config.cluster.workers, config.cluster.shards)
    return min(MOST_SEGMENTERS, cores_of_a_worker(workers) - 1)


def probabilities(config: Config, images: ImageSet, weights: Path | None, device: torch.device) -> Any:
    """The model as a function from images in [0, 1] to probabilities."""
    full_float32()
    example = torch.from_numpy(images.images(images.ids[:2])).to(device)
    model = for_inference(load_model(config.model, len(images.classes), images.shape[0], weights), example)
    return lambda batch: model(batch).softmax(1)


def explain_unit(
    predict: Any,
    images: np.ndarray,
    labels: np.ndarray,
    ids: np.ndarray,
    config: Config,
    device: torch.device,
    segments: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Store rows of one unit: the true label and the strongest wrong one explained."""
    pixels = fastest_layout(torch.from_numpy(images).to(device))
    with torch.inference_mode():
        targets = true_and_runner_up(predict(pixels.clone()), torch.from_numpy(labels).to(device))
    explained = explain_batch(predict, pixels, ids, config.attribution, targets.cpu().numpy(), segments)
    return rows_from(explained, labels)


def _dry_run(config: Config, images: ImageSet, folder: RunFolder) -> int:
    _check_segmentation(config, images)
    plan, done = _planned(config, images, folder)
    say(f"run folder   {folder.path}{' (exists)' if folder.path.exists() else ''}")
    say(f"images       {len(images)} of {images.name}, {'x'.join(map(str, images.shape))}")
    say(f"plan         {plan.num_shards} shards of at most {max(np.diff(plan.bounds))} images, units of {plan.unit}")
    for index in range(min(plan.num_shards, 8)):
        ids = plan.shard_ids(index, images.ids)
        say(f"  shard {index:05d}  {len(ids)} images, ids {ids[0]} to {ids[-1]}{', done' if index in done else ''}")
    if plan.num_shards > 8:
        say(f"  ... and {plan.num_shards - 8} more; {len(done)} of all are done")
    seconds, segments = _measure(config, images)
    workers = min(config.cluster.workers, plan.num_shards)
    say(f"sample       {SAMPLE_IMAGES} images: {segments:.0f} segments, {seconds:.3f} s an image on one worker")
    left = len(images) - sum(len(plan.shard_ids(index, images.ids)) for index in done)
    total = seconds * left
    alone, together = _duration(total), _duration(total / workers)
    rows = left * config.attribution.most_samples
    say(f"cost         {rows:,} model rows, {alone} with one worker, {together} with {workers}")
    say("dry run: nothing was started or written")
    return 0


def _planned(config: Config, images: ImageSet, folder: RunFolder) -> tuple[Plan, set[int]]:
    """The folder's plan, if it has one that fits, else the one that would be made; and which shards are done."""
    if not folder.plan.exists():
        return make_plan(images.ids, config.attribution.unit, config.cluster.shards, {}), set()
    identity = attribution_identity(config, images, digest_file(folder.explained_weights(config)))
    plan = require_plan(folder.plan, identity)
    return plan, {index for index in range(plan.num_shards) if not _problem(folder, plan, images, index)}


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _measure(config: Config, images: ImageSet) -> tuple[float, float]:
    """Seconds an image and segments an image, from a few images; the time does not depend on the weights."""
    torch.set_num_threads(config.cluster.threads)
    device = pick_device(config.device, 0)
    predict = probabilities(config, images, None, device)
    ids = images.ids[:: max(1, len(images) // SAMPLE_IMAGES)][:SAMPLE_IMAGES]
    pixels, labels = images.images(ids), images.labels_of(ids)
    # Imports and first-call costs do not count.
    explain_unit(predict, pixels[:1], labels[:1], ids[:1], config, device)
    started = time.perf_counter()
    rows = explain_unit(predict, pixels, labels, ids, config, device)
    return (time.perf_counter() - started) / len(ids), float(rows["num_segments"].mean())


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("attribute"))
