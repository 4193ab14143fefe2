"""After the arrays: decide what becomes of shards that are missing, each by what happened to it."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpcguard.cluster import slurm
from hpcguard.cluster.dispatch import SUBMITTED_AGAIN, Task, describe, submit
from hpcguard.cluster.failures import Failure, Kind, by_shard, read_failures, record
from hpcguard.cluster.submission import (
    ATTRIBUTE,
    CONSOLIDATE,
    Submission,
    history,
    last_tasks,
    parse_name,
    read_submission,
    read_submissions,
    shards_in_queue,
)
from hpcguard.config import ClusterConfig, Config
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.runs import RunFolder, exclusive, size, write_json

ENDS: dict[str, Kind] = {
    "OUT_OF_MEMORY": "out-of-memory",
    "TIMEOUT": "time-out",
    "NODE_FAIL": "node-failure",
    "PREEMPTED": "pre-empted",
    "CANCELLED": "cancelled",
}  # of a task that could tell of nothing itself, by Slurm's state; any other was killed

KILLED_FOR_MEMORY = re.compile(rb"exceeded (job |step )?memory limit|oom.kill|out of memory", re.I)  # says Slurm
DECIDED = ("error", "time-out", "cancelled", "unknown")  # final ones that only a person can undo
LOG_END = 64 * 1024
TRIES, PAUSE_S = 20, 60.0  # where Slurm is silent or refuses
PATIENCE_S = 600.0  # with another process that submits


@contextmanager
def settling(run: RunFolder, number: int) -> Iterator[Submission]:
    """The submission to settle; where even that cannot be done, its record says why."""
    own = read_submission(run.submission(number))
    try:
        yield own
    except Exception as error:
        _end(own, "gave up", [f"{'' if isinstance(error, InputError) else type(error).__name__ + ': '}{error}"])
        raise


def settle(config: Config, run: RunFolder, problems: dict[int, str], own: Submission, task: Task) -> int:
    """Look after what a submission left: submit again what may be, give the rest up; the stage's exit status.

    problems: why each missing shard cannot be used. Slurm may refuse or be silent for a while: that is waited for.
    """
    if not problems:
        return _end(own, "complete", [])
    for left in reversed(range(TRIES)):
        try:
            with exclusive(run.slurm, PATIENCE_S):
                return _settle_once(config, run, problems, own, task)
        except InputError as error:
            if not left:
                raise
            say(f"attribute: {error}; trying again in {PAUSE_S:g} s, {left} times more")
            time.sleep(PAUSE_S)
    raise AssertionError("not reached")


def _settle_once(config: Config, run: RunFolder, problems: dict[int, str], own: Submission, task: Task) -> int:
    submissions, queue = read_submissions(run), slurm.queue_of(run.path)
    pending = {job.id for job in queue if job.state == "PENDING"}
    waiting = [job for job in own.jobs if job.kind not in (ATTRIBUTE, CONSOLIDATE) and job.job in pending]
    if later := _later_caretaker(queue, own.number):  # we were requeued after we had submitted it
        if waiting:
            slurm.redirect(waiting[0].job, f"afterok:{later.id}")
        return _end(own, "submitted again", [], parse_name(later.name)[1])
    alive = shards_in_queue(submissions, queue)
    missing = [shard for shard in problems if shard not in alive]
    states = _record_ends(run, submissions, missing)
    finished = {shard: sum(map(size, paths)) for shard, paths in run.all_journals().items()}
    past = history(submissions, finished)
    rounds = {shard: entry[0] for shard, entry in past.items()}
    decision = decide(missing, read_failures(run), states, rounds, config.cluster)
    if own.stopped.exists():  # shards that never began have not failed
        decision = Decision({}, {shard: decision.given_up.get(shard, "stopped early") for shard in missing})
    else:
        _record_given_up(run, decision.given_up, states)
    why = [f"shard {shard:05d}: {problems[shard]}: {reason}" for shard, reason in decision.given_up.items()]
    why += [f"shard {shard:05d}: {problems[shard]}" for shard in decision.again if problems[shard] != "missing"]
    if not decision.again and not alive:
        return _end(own, "gave up", why)
    waits_for = sorted({job.array for job in alive.values()})
    new = submit(config, run, decision.again, task, waits_for, waiting, past)
    for line in describe(new):
        say(line)
    return _end(own, "submitted again", why, new.number)


def _later_caretaker(queue: Sequence[slurm.QueuedJob], number: int) -> slurm.QueuedJob | None:
    """The consolidation of a later submission, if one is in the queue."""
    found = [job for job in queue if parse_name(job.name)[0] == CONSOLIDATE and parse_name(job.name)[1] > number]
    return max(found, key=lambda job: parse_name(job.name)[1], default=None)


def _record_given_up(run: RunFolder, given_up: dict[int, str], states: dict[int, str]) -> None:
    """A final record for every shard that has none, so that it counts as failed."""
    failures = by_shard(read_failures(run))
    for shard, why in given_up.items():
        own = failures.get(shard, [])
        if any(failure.final for failure in own):
            continue
        kind: Kind = "cancelled" if states.get(shard) == "CANCELLED" else own[-1].kind if own else "unknown"
        record(run, Failure(shard, f"given-up-{time.time_ns():x}", kind, True, why, log=own[-1].log if own else None))


def _end(own: Submission, state: str, why: list[str], following: int | None = None) -> int:
    write_json(own.settled, {"state": state, "why": why, "next": following, "time": time.time()})
    say(f"attribute: submission {own.number}: {state}")
    for line in why:
        say(f"  {line}")
    if state == "gave up":
        say("  mend the cause, then `hpcguard retry` this run folder; jobs that wait for these shards are cancelled")
    return {"complete": 0, "submitted again": SUBMITTED_AGAIN, "gave up": 1}[state]


def _record_ends(run: RunFolder, submissions: Sequence[Submission], missing: Sequence[int]) -> dict[int, str]:
    """Slurm's state of each shard's last task; a record of those that began and ended without a word of their own."""
    last = last_tasks(submissions)
    tasks = {shard: last[shard] for shard in missing if shard in last}
    states = slurm.states(sorted(set(tasks.values())))
    failures = by_shard(read_failures(run))
    journals = run.all_journals()
    for shard, task in tasks.items():
        begun = [path.name.split(".", 1)[1].removesuffix(".units") for path in journals.get(shard, [])]
        begun = [attempt for attempt in begun if attempt.startswith(f"{task}.r")]
        # An attempt is JOB.rRESTARTS.HOST-..., and that of a record may say more behind the host.
        if not begun or any(f.attempt.startswith(begun[-1].rsplit("-", 1)[0]) for f in failures.get(shard, [])):
            continue
        state = states.get(task, "unknown")
        log = _log(submissions, task)
        # To Slurm a batch script whose srun was killed for its memory has FAILED.
        kind = ENDS.get(state) or ("out-of-memory" if log and _killed_for_memory(Path(log)) else "killed")
        before = any(failure.kind == "out-of-memory" for failure in failures.get(shard, []))
        attempt = begun[-1]
        # Out of memory is answered by smaller batches first, and is final the second time: then by more memory.
        record(run, Failure(
            shard, attempt, kind, kind == "out-of-memory" and before, f"its task ended without a word (Slurm: {state})",
            host=attempt.split(".")[2].rsplit("-", 1)[0], job=task, log=log,
            memory_gb=slurm.memory_gb(task),
        ))  # fmt: skip
    return {shard: states[task] for shard, task in tasks.items() if task in states}


def _log(submissions: Sequence[Submission], task: str) -> str | None:
    found = [path for submission in submissions if (path := submission.folder / f"{task}_0_log.err").exists()]
    return str(found[-1]) if found else None


def _killed_for_memory(log: Path) -> bool:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LOG_END))
        return KILLED_FOR_MEMORY.search(file.read()) is not None


@dataclass
class Decision:
    """What to do about the missing shards."""

    again: dict[int, float | None] = field(default_factory=dict)  # shard: memory in GiB
    given_up: dict[int, str] = field(default_factory=dict)  # shard: why


def decide(
    missing: Sequence[int],
    failures: Sequence[Failure],
    states: dict[int, str],
    rounds: dict[int, int],
    config: ClusterConfig,
) -> Decision:
    """Which missing shards to submit again, and with what memory; pure.

    failures: those that nobody has forgiven. states: Slurm's last word on each shard's task, where it is known.
    rounds: submissions in a row that finished no unit of the shard, since a person last submitted it.
    """
    decision = Decision()
    grouped = by_shard(failures)
    for shard in missing:
        verdict = _one(grouped.get(shard, []), states.get(shard, ""), rounds.get(shard, 0), config)
        if isinstance(verdict, str):
            decision.given_up[shard] = verdict
        else:
            decision.again[shard] = verdict
    return decision


def _one(own: Sequence[Failure], state: str, rounds: int, config: ClusterConfig) -> float | str | None:
    """The memory to try a shard with, or why not."""
    final = [failure for failure in own if failure.final]
    errors = [failure for failure in final if failure.kind in DECIDED]
    if errors:
        return errors[-1].message
    if any(failure.kind == "gpu-out-of-memory" for failure in final):
        return f"{final[-1].message}; ask for GPUs with more memory (cluster.slurm.constraint)"
    if state == "CANCELLED" and not final:
        return "its job was cancelled"
    base = config.slurm.attribute.memory_gb
    if rounds > config.slurm.rounds:
        last = own[-1].message if own else f"Slurm says {state}" if state else "nothing is known of its end"
        return f"missing after {rounds} submissions without progress; the last: {last}"
    exhausted = sum(failure.kind == "out-of-memory" and failure.final for failure in own)
    if not exhausted:
        return base
    had = [memory for failure in own if failure.kind == "out-of-memory" and (memory := failure.memory_gb or base)]
    if not had:
        return f"{final[-1].message}; set cluster.slurm.attribute.memory_gb"
    known, largest = max(had), config.slurm.max_memory_gb or 4 * (base or min(had))
    if known >= largest:
        return f"{final[-1].message} with {known:g} GiB; raise cluster.slurm.max_memory_gb"
    return min(2 * known, largest)
