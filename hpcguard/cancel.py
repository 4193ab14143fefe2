"""Cancel every job of a run that is still in Slurm's queue; what is published and journalled is kept.

Only jobs whose comment is this run folder are touched. `python -m hpcguard.attribute` goes on from there later.
"""

import argparse
from collections import Counter

from hpcguard.cluster import slurm
from hpcguard.cluster.submission import ATTRIBUTE, parse_name
from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.runs import RunFolder, exclusive

EXAMPLE = ("python -m hpcguard.cancel runs/quickstart --dry-run", "python -m hpcguard.cancel runs/quickstart")
SECTIONS = ("run",)
ROUNDS = 3
PATIENCE_S = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="list the jobs; cancel none")


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    if not folder.path.is_dir():
        raise InputError(f"run = {folder.path}: no such folder; `python -m hpcguard.attribute` makes it")
    jobs = _jobs(folder)
    if not jobs:
        say(f"cancel: no job of {folder.path} is in Slurm's queue")
        return 0
    _say_jobs(jobs)
    if arguments.dry_run:
        say(f"dry run: {_number(jobs)} of {folder.path} would be cancelled")
        return 0
    cancelled: set[str] = set()
    with exclusive(folder.slurm, PATIENCE_S):  # who submits more just now comes first
        for _ in range(ROUNDS):
            new = [job for job in _jobs(folder) if job.array not in cancelled]
            if not new:
                break
            slurm.cancel(order(new))
            cancelled |= {job.array for job in new}
    say(f"cancel: {_number(jobs)} of {folder.path} cancelled; `python -m hpcguard.attribute` would go on from there")
    return 0


def _jobs(folder: RunFolder) -> list[slurm.QueuedJob]:
    return slurm.queue_of(folder.path)


def order(jobs: list[slurm.QueuedJob]) -> list[str]:
    """Ids of whole arrays, those first that wait for others: they would start, and submit again what is cancelled."""
    arrays = {(_kind(job) == ATTRIBUTE, -int(job.array)): job.array for job in jobs}
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
