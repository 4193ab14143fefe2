"""Arithmetic of Slurm arrays: shards to tasks, tasks to arrays that a cluster accepts."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpcguard.errors import InputError


@dataclass(frozen=True)
class Chunk:
    """One array: its tasks are first, first + 1, ... and its indices start at 0."""

    first: int
    tasks: int
    parallel: int  # at most so many of its tasks run at once
    after: int | None  # the chunk whose end it must wait for


def pack(shards: Sequence[int], per_task: int) -> list[list[int]]:
    """Consecutive shards to tasks of `per_task`; the last task may have fewer."""
    return [list(shards[start : start + per_task]) for start in range(0, len(shards), per_task)]


def chunks(tasks: int, largest: int, at_once: int) -> list[Chunk]:
    """Cut tasks into arrays of nearly equal size, at most `largest` (MaxArraySize: indices must stay below it).

    Slurm caps the tasks that run at once only within one array. So arrays are dealt to lanes: a lane's arrays run one
    after another, and the caps of the lanes sum to at most `at_once`.
    """
    count = -(-tasks // largest)
    lanes = min(at_once, count)
    bounds = [tasks * k // count for k in range(count)] + [tasks]
    result = []
    for k in range(count):
        size = bounds[k + 1] - bounds[k]
        share = at_once // lanes + (k % lanes < at_once % lanes)
        result.append(Chunk(bounds[k], size, min(share, size), k - lanes if k >= lanes else None))
    return result


def shards_per_task(shards: int, wanted: int, room: int) -> int:
    """The smallest packing from `wanted` upwards whose tasks fit into `room` jobs. Raises InputError if room < 1."""
    if room < 1:
        raise InputError(
            "no room for another job: this user has as many as Slurm allows (MaxSubmitJobs, MaxJobCount); "
            "wait until some end, or cancel some (squeue --me)"
        )
    return max(wanted, -(-shards // room))
