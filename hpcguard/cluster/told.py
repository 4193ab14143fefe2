"""Signals that ask a process to stop, noted and looked at between steps instead of ending it at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

TIME_IS_UP = signal.SIGUSR2  # what Slurm is asked to send before a time limit (sbatch --signal)
END = signal.SIGTERM  # what schedulers send before they kill


@contextmanager
def told_by(*signals: signal.Signals) -> Iterator[set[int]]:
    """The signals that have come, as a set that grows, while the block runs; only in the main thread."""
    received: set[int] = set()
    former = {each: signal.signal(each, lambda number, _: received.add(number)) for each in signals}
    try:
        yield received
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
