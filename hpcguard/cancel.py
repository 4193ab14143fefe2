"""Cancel every job of a run or a sweep that is still in Slurm's queue; what is published and journalled is kept.

Only jobs whose comment is this folder are touched. `python -m hpcguard.attribute` goes on from there later, or
`hpcguard sweep SWEEP`.
"""

import argparse
from collections import Counter
from pathlib import Path

from hpcguard.cluster import slurm
from hpcguard.cluster.submission import ATTRIBUTE, parse_name
from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.runs import RunFolder, exclusive

EXAMPLE = (
    "python -m hpcguard.cancel runs/quickstart --dry-run",
    "python -m hpcguard.cancel runs/quickstart",
    "python -m hpcguard.cancel runs/sweeps/components_small",
)
SECTIONS = ("run",)
ROUNDS = 3
PATIENCE_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="list the jobs; cancel none")


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    if not folder.path.is_dir():
        raise InputError(f"run = {folder.path}: no such folder; `python -m hpcguard.attribute` makes it")
    return _cancel(folder.path, folder.slurm, ATTRIBUTE, "python -m hpcguard.attribute", arguments.dry_run)


def run_sweep(path: Path, arguments: argparse.Namespace) -> int:
    """The same for a sweep's folder."""
    if arguments.overrides:
        raise InputError(f"{arguments.overrides[0]}: all jobs of {path} are cancelled; leave the keys out")
    return _cancel(path, path, "", f"hpcguard sweep {path}", arguments.dry_run)


def _cancel(folder: Path, locked: Path, last: str, goes_on: str, dry_run: bool) -> int:
    """Cancel what is queued of a folder; `locked`: the folder whose lock everybody holds who submits more of it."""
    jobs = slurm.queue_of(folder)
    if not jobs:
        say(f"cancel: no job of {folder} is in Slurm's queue")
        return 0
    _say_jobs(jobs)
    if dry_run:
        say(f"dry run: {_number(jobs)} of {folder} would be cancelled; `{goes_on}` would go on from there")
        return 0
    cancelled: set[str] = set()
    with exclusive(locked, PATIENCE_S):  # who submits more just now comes first
        for _ in range(ROUNDS):
            new = [job for job in slurm.queue_of(folder) if job.array not in cancelled]
            if not new:
                break
            slurm.cancel(order(new, last))
            cancelled |= {job.array for job in new}
    say(f"cancel: {_number(jobs)} of {folder} cancelled; `{goes_on}` would go on from there")
    return 0


def order(jobs: list[slurm.QueuedJob], last: str) -> list[str]:
    """Ids of whole arrays, those first that wait for others: they would start, and submit again what is cancelled.

    Jobs wait for older ones; in a run also for newer ones of the kind `last`, which were submitted again meanwhile.
    """
    arrays = {(_kind(job) == last, -int(job.array)): job.array for job in jobs}
    return [arrays[key] for key in sorted(arrays)]


def _say_jobs(jobs: list[slurm.QueuedJob]) -> None:
    arrays: dict[str, list[slurm.QueuedJob]] = {}
    for job in jobs:
        arrays.setdefault(job.array, []).append(job)
    for array, tasks in sorted(arrays.items(), key=lambda item: (len(item[0]), item[0])):
        states = ", ".join(f"{number} {state}" for state, number in sorted(Counter(t.state for t in tasks).items()))
        say(f"  {array:<9} {_kind(tasks[0]):<12} {_submission(tasks[0])}  {states}")


def _kind(job: slurm.QueuedJob) -> str:
    return parse_name(job.name)[0] or job.name


def _submission(job: slurm.QueuedJob) -> str:
    kind, number, _ = parse_name(job.name)
    return f"submission {number:04d}" if kind else ""


def _number(jobs: list[slurm.QueuedJob]) -> str:
    arrays = len({job.array for job in jobs})
    tasks = f" ({len(jobs)} tasks)" if len(jobs) > arrays else ""
    return f"{arrays} job{'s' if arrays > 1 else ''}{tasks}"


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("cancel"))
