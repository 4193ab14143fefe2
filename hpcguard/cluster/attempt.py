"""One process's attempt at some shards: a pool, progress, a record of everything that went wrong, and when to stop."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcguard.cluster.failures import Failure, Problem, equal_errors, read_failures, record
from hpcguard.cluster.local import Events, Outcome, Task, run_local
from hpcguard.cluster.plan import Plan
from hpcguard.config import ClusterConfig
from hpcguard.progress import Meter, progress, say
from hpcguard.runs import RunFolder

OUTLIVE_S = 1.0


def new_attempt(job: str | None, restarts: int) -> str:
    """A name for what this process is about to do: 12_3.r0.HOST in a Slurm job, else by its process id."""
    return f"{f'{job}.r{restarts}' if job else os.getpid()}.{os.uname().nodename.split('.')[0]}"


@dataclass
class Attempt:
    """Who tries, for the records; and what it has done so far."""

    folder: RunFolder
    plan: Plan
    name: str  # see new_attempt
    job: str | None = None  # of Slurm
    log: str | None = None
    memory_gb: float | None = None
    told_to_stop: Callable[[], bool] = lambda: False
    finished: dict[int, int] = field(default_factory=dict)  # units by shard, those of former attempts included
    stopped_because: str | None = None

    def end(self, shard: int, problem: Problem, limit: int) -> None:
        """Publish why a shard has failed, and stop if so many have by an equal error."""
        self.record(shard, problem, final=True)
        if problem.kind == "error":
            self.stopped_because = _enough_errors(self.folder, limit)

    def own_journals(self, shard: int) -> list[Path]:
        return [path for path in self.folder.journals(shard) if f".{self.name}-" in path.name]

    def record(self, shard: int, problem: Problem, final: bool) -> None:
        """Publish what happened to a shard."""
        if self.job and problem.kind == "killed":
            # Slurm kills a task's processes one by one. If it is our turn next, others know better what it was.
            time.sleep(OUTLIVE_S)
        name = f"{self.name}.{time.time_ns() // 1_000_000:x}"  # a shard may fail more than once in an attempt
        record(self.folder, Failure(
            shard, name, problem.kind, final, problem.message, problem.signature, problem.tail, os.uname().nodename,
            self.job, self.log, self.finished.get(shard, 0), self.memory_gb,
        ))  # fmt: skip


def run_attempt(attempt: Attempt, task: Task, shards: Sequence[int], workers: int, config: ClusterConfig) -> Outcome:
    """Work through shards in a pool of processes and say how it went; config.equal_errors equal errors end it early."""
    started = time.monotonic()
    total = sum(attempt.plan.num_units(index) for index in shards)
    with progress("attribute", total, "units") as meter:
        events = _events(attempt, meter, config.equal_errors)
        outcome = run_local(task, shards, workers, config.threads, config.attempts, events)
    say(f"attribute: {len(outcome.done)} of {len(shards)} shards done in {time.monotonic() - started:.1f} s")
    shown: set[str | None] = {None}
    for index, problem in sorted(outcome.failed.items()):
        say(f"  shard {index:05d} FAILED ({problem.kind}): {problem.message} (record: {attempt.folder.failures})")
        if problem.signature not in shown:
            say("    " + problem.tail.replace("\n", "\n    "))
            shown.add(problem.signature)
    if attempt.stopped_because:
        say(f"  stopped early: {attempt.stopped_because}")
    return outcome


def _events(attempt: Attempt, meter: Meter, limit: int) -> Events:
    def on_progress(index: int, amount: int) -> None:
        meter.advance(amount)
        attempt.finished[index] = attempt.finished.get(index, 0) + amount

    def on_restart(index: int, problem: Problem) -> None:
        attempt.record(index, problem, final=False)
        meter.advance(-attempt.finished.get(index, 0))  # the next worker tells of the finished units again
        attempt.finished[index] = 0
        meter.note(f"shard {index:05d}: {problem.message}; going on with a new worker")

    def on_end(index: int, problem: Problem | None) -> None:
        meter.note(f"shard {index:05d} {'FAILED' if problem else 'done'}")
        if problem:
            attempt.end(index, problem, limit)

    return Events(on_progress, on_end, on_restart, lambda: bool(attempt.stopped_because) or attempt.told_to_stop())


def _enough_errors(folder: RunFolder, limit: int) -> str | None:
    count, example = equal_errors(read_failures(folder))
    if count < limit or example is None:
        return None
    return f"{count} shards failed with the same error: {example.message}"
