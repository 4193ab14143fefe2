"""Explain every training image with LIME, in shards, and keep what is done.

Writes RUN/plan.json once, then RUN/shards/*.h5 with a manifest each: in worker processes here, or in Slurm arrays
that it submits and leaves (cluster.executor=slurm), with consolidation and what cluster.slurm.then names to follow.
Running the same command again does only what is missing or damaged. The stored values depend on configuration, weights
and data, never on the number of shards, workers or nodes.
"""

import argparse
import time
from itertools import pairwise

import numpy as np
import torch

from hpcguard.array_task import array_task
from hpcguard.attribution.segments import check_segmentation
from hpcguard.cluster import dispatch, slurm
from hpcguard.cluster.attempt import Attempt, new_attempt, run_attempt
from hpcguard.cluster.devices import pick_device
from hpcguard.cluster.failures import forgive
from hpcguard.cluster.plan import Plan, agree_on_plan, attribution_identity, make_plan, require_plan
from hpcguard.cluster.settle import settle, settling
from hpcguard.cluster.submission import ATTRIBUTE, parse_name, read_submissions, shards_in_queue
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.models import check_answers, check_gradient, load_model
from hpcguard.progress import duration, say
from hpcguard.ready_made import keep_baseline
from hpcguard.runs import RunFolder, digest_file, exclusive
from hpcguard.shards import (
    ShardTask,
    classifier,
    explain_unit,
    quarantined,
    readable_ids,
    shard_problems,
)
from hpcguard.store import view_problem

EXAMPLE = (
    "python -m hpcguard.attribute configs/quickstart.yaml --dry-run",
    "python -m hpcguard.attribute configs/quickstart.yaml cluster.workers=2",
    "python -m hpcguard.attribute configs/cifar10.yaml cluster.executor=slurm cluster.slurm.attribute.gpus_per_node=1",
)
SECTIONS = ("data", "model", "attribution", "cluster")
SAMPLE_IMAGES = 2  # explained to estimate the cost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print plan, shards, an estimate of the cost and, for Slurm, the exact sbatch text; start nothing",
    )  # fmt: skip
    parser.add_argument("--settle", type=int, metavar="NUMBER", help=argparse.SUPPRESS)  # of a submission, by its job


def run(config: Config, arguments: argparse.Namespace) -> int:
    images = load_images(config.data, "train")
    folder = RunFolder(config.run)
    if arguments.dry_run:
        return _dry_run(config, images, folder)
    if arguments.settle is not None:
        with settling(folder, arguments.settle) as submission:
            plan = _agreed_plan(config, images, folder)
            problems = shard_problems(folder, plan, images.ids)
            return settle(config, folder, problems, submission, array_task)
    plan = _agreed_plan(config, images, folder)
    problems = shard_problems(folder, plan, images.ids)
    _say_what_remains(problems, plan, folder)
    if config.cluster.executor == "slurm":
        return _submit(config, folder, plan, sorted(problems))
    forgive(folder, list(problems))
    return _run_here(config, folder, plan, sorted(problems)) if problems else 0


def _agreed_plan(config: Config, images: ImageSet, folder: RunFolder) -> Plan:
    """The run's plan, made and published if there is none; the model and one image are tried first."""
    if config.cluster.executor == "local":
        pick_device(config.device)
    keep_baseline(config, folder, images)
    weights = folder.explained_weights(config)
    identity = attribution_identity(config, images, digest_file(weights))
    model = load_model(config.model, len(images.classes), images.shape[0], weights)
    first = readable_ids(images, 1)
    check_answers(model, torch.from_numpy(images.images(first)), len(images.classes))
    if config.attribution.sensitivity:
        check_gradient(model, torch.from_numpy(images.images(first)))
    check_segmentation(images.images(first)[0], config.attribution, int(first[0]))
    folder.create()
    plan = agree_on_plan(folder.plan, make_plan(images.ids, config.attribution.unit, config.cluster.shards, identity))
    if plan.num_shards != config.cluster.shards:
        say(f"plan: {plan.num_shards} shards, as first planned (cluster.shards = {config.cluster.shards} is not used)")
    digests = {"data_sha256": identity["data"]["sha256"], "weights_sha256": identity["model"]["weights_sha256"]}
    folder.record_config(config, **digests)
    return plan


def _say_what_remains(problems: dict[int, str], plan: Plan, folder: RunFolder) -> None:
    if not problems:
        say(
            f"attribute: all {plan.num_shards} shards ({plan.num_images} images) are done and verified: {folder.shards}"
        )
        _say_quarantined(folder, plan)
        return
    done = plan.num_shards - len(problems)
    say(f"attribute: {plan.num_images} images in {plan.num_shards} shards; {done} done, {len(problems)} to do")
    say(f"  missing: {ranges([index for index, problem in problems.items() if problem == 'missing'])}")
    for index, problem in problems.items():
        if problem != "missing":
            say(f"  shard {index:05d}: {problem}; doing it again")


def ranges(numbers: list[int]) -> str:
    """Ascending numbers in short: 0-3, 7, 9-10."""
    breaks = [place for place in range(1, len(numbers)) if numbers[place] != numbers[place - 1] + 1]
    parts = [numbers[start:end] for start, end in pairwise([0, *breaks, len(numbers)])]
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts if part]
    more = [f"and {len(texts) - 12} more ranges"] if len(texts) > 12 else []
    return ", ".join([*texts[:12], *more]) or "none"


def _say_quarantined(folder: RunFolder, plan: Plan) -> None:
    left_out = quarantined(folder, range(plan.num_shards))
    for image, why in list(left_out.items())[:5]:
        say(f"  image {image} is left out (quarantined): {why}")
    if len(left_out) > 5:
        say(f"  and {len(left_out) - 5} more images; `hpcguard status` lists them")


def _run_here(config: Config, folder: RunFolder, plan: Plan, todo: list[int]) -> int:
    """In a pool of processes on this machine."""
    started = time.monotonic()
    attempt = Attempt(folder, plan, new_attempt(None, 0))
    workers = min(config.cluster.workers, len(todo))
    task = ShardTask(config, plan, workers, attempt.name)
    outcome = run_attempt(attempt, task, todo, workers, config.cluster)
    _say_quarantined(folder, plan)
    if len(outcome.done) < len(todo):
        say("  the same command tries the missing shards again")
        return 1
    if len(todo) == plan.num_shards:
        rate = plan.num_images / (time.monotonic() - started)
        say(f"  {rate:.1f} images a second with {workers} workers")
    return 0


def _submit(config: Config, folder: RunFolder, plan: Plan, missing: list[int]) -> int:
    """As Slurm arrays, with the jobs that follow; returns as soon as they are in the queue."""
    with exclusive(folder.slurm):
        queue = [job for job in slurm.queue_of(folder.path) if job.id != slurm.own_job()]
        if followers := [job for job in queue if parse_name(job.name)[0] != ATTRIBUTE]:
            say(f"  nothing submitted: {', '.join(f'{job.name} is {job.state}' for job in followers)}")
            say("  what is missing when the arrays end is submitted again by the job called consolidate")
            say(f"  watch it with `hpcguard status {folder.path} --watch`, end it with `hpcguard cancel {folder.path}`")
            return 0
        if forgiven := forgive(folder, missing):
            say(f"  {forgiven} record(s) of failed attempts put aside")
        consolidated = not view_problem(folder.store, folder.store_manifest, plan.fingerprint)
        if consolidated and not missing and not config.cluster.slurm.then:
            return 0
        alive = shards_in_queue(read_submissions(folder), queue)
        memory = {shard: config.cluster.slurm.attribute.memory_gb for shard in missing if shard not in alive}
        waits_for = sorted({job.array for job in alive.values()})
        submission = dispatch.submit(config, folder, memory, array_task, waits_for=waits_for)
    say(f"attribute: submission {submission.number}, in {submission.folder}")
    for line in dispatch.describe(submission):
        say(line)
    say(f"  watch it with `hpcguard status {folder.path} --watch`, end it with `hpcguard cancel {folder.path}`")
    return 0


def _dry_run(config: Config, images: ImageSet, folder: RunFolder) -> int:
    first = readable_ids(images, 1)
    check_segmentation(images.images(first)[0], config.attribution, int(first[0]))
    plan, missing = _planned(config, images, folder)
    say(f"run folder   {folder.path}{' (exists)' if folder.path.exists() else ''}")
    say(f"images       {len(images)} of {images.name}, {'x'.join(map(str, images.shape))}")
    say(f"plan         {plan.num_shards} shards of at most {max(np.diff(plan.bounds))} images, units of {plan.unit}")
    for index in range(min(plan.num_shards, 8)):
        ids = plan.shard_ids(index, images.ids)
        done = "" if index in missing else ", done"
        say(f"  shard {index:05d}  {len(ids)} images, ids {ids[0]} to {ids[-1]}{done}")
    if plan.num_shards > 8:
        say(f"  ... and {plan.num_shards - 8} more; {plan.num_shards - len(missing)} of all are done")
    left = sum(len(plan.shard_ids(index, images.ids)) for index in missing)
    _say_cost(config, images, plan, left)
    if config.cluster.executor == "slurm":
        _say_scripts(config, folder, missing)
    say("dry run: nothing was started or written")
    return 0


def _say_cost(config: Config, images: ImageSet, plan: Plan, left: int) -> None:
    if config.cluster.images_per_second:
        seconds = 1 / config.cluster.images_per_second
        say(f"rate         {config.cluster.images_per_second:g} images a second on one worker, as given")
    else:
        seconds, segments = _measure(config, images)
        say(
            f"sample       {SAMPLE_IMAGES} images: {segments:.0f} segments, {seconds:.3f} s an image on one worker here"
        )
    asked, on_slurm = config.cluster.slurm, config.cluster.executor == "slurm"
    workers = min(config.cluster.workers, plan.num_shards)
    if on_slurm:
        workers = min(config.cluster.workers_of_a_task * asked.tasks_at_once, plan.num_shards)
    alone, together = duration(seconds * left, 1), duration(seconds * left / workers, 1)
    rows = left * config.attribution.most_samples * (1 + config.attribution.noisy_copies)
    say(f"cost         {rows:,} model rows, {alone} with one worker, {together} with {workers}")
    if on_slurm:
        what = "GPU-hours" if asked.attribute.gpus_per_node else "worker-hours"
        say(f"             {seconds * left / 3600:.2f} {what} at this rate; cluster.images_per_second states another")
        if asked.attribute.gpus_per_node and not (config.cluster.images_per_second or torch.cuda.is_available()):
            say("             but there is no GPU here: give cluster.images_per_second for an estimate that means much")


def _say_scripts(config: Config, folder: RunFolder, missing: list[int]) -> None:
    """The exact sbatch scripts, and what Slurm says to each."""
    memory: dict[int, float | None] = dict.fromkeys(missing, config.cluster.slurm.attribute.memory_gb)
    for text in dispatch.texts(config, folder, memory):
        say(f"\n{text}")
        alone = "\n".join(line for line in text.splitlines() if not line.startswith("#SBATCH --dependency"))
        say(f"sbatch --test-only: {slurm.check(alone)}")
    say("")


def _planned(config: Config, images: ImageSet, folder: RunFolder) -> tuple[Plan, list[int]]:
    """The folder's plan, if it has one that fits, else the one that would be made; and the missing shards."""
    if not folder.plan.exists():
        plan = make_plan(images.ids, config.attribution.unit, config.cluster.shards, {})
        return plan, list(range(plan.num_shards))
    identity = attribution_identity(config, images, digest_file(folder.explained_weights(config)))
    plan = require_plan(folder.plan, identity)
    return plan, sorted(shard_problems(folder, plan, images.ids))


def _measure(config: Config, images: ImageSet) -> tuple[float, float]:
    """Seconds an image and segments an image, from a few images; the time does not depend on the weights."""
    torch.set_num_threads(config.cluster.threads)
    device = pick_device(config.device, 0)
    model = classifier(config, images, None, device)
    ids = images.ids[:: max(1, len(images) // SAMPLE_IMAGES)][:SAMPLE_IMAGES]
    pixels, labels = images.images(ids), images.labels_of(ids)
    # Imports and first-call costs do not count.
    explain_unit(model, pixels[:1], labels[:1], ids[:1], config, device)
    started = time.perf_counter()
    rows = explain_unit(model, pixels, labels, ids, config, device)
    return (time.perf_counter() - started) / len(ids), float(rows["num_segments"].mean())


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("attribute"))
