"""What a run's evidence says: facts that evidence.py has read go in, a summary comes out.

Unknown stays unknown: where Slurm could not be asked, a shard that is not done is neither running nor waiting.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from hpcguard.cluster.plan import Plan
from hpcguard.cluster.slurm import QueuedJob
from hpcguard.cluster.submission import ATTRIBUTE, parse_name

UNKNOWN = "unknown"
RUNNING = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"})
WINDOW_S = 600.0  # of the rate, at least; and at least ...
WINDOW_SHARDS = 3  # ... so many times a shard's duration, so that a whole wave of tasks counts
SLOWEST = 5
EXAMPLES = 10  # of quarantined images and of manifests that cannot be used


@dataclass(frozen=True)
class Published:
    """A manifest's cheap facts."""

    fingerprint: str
    rows: int
    bytes: int | None  # of the file; None: not noted
    seconds: float
    host: str | None
    time: float
    quarantined: tuple[tuple[int, str], ...]  # (image, why)


@dataclass(frozen=True)
class Submission:
    """One numbered submission; `problems` says what of it could not be read."""

    number: int
    tasks: Sequence[Sequence[int]]
    jobs: Sequence[Mapping[str, Any]]
    settled: Mapping[str, Any] = field(default_factory=dict)  # empty: not yet
    stopped: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evidence:
    """All that was found in one look at a run."""

    plan: Plan
    published: Mapping[int, Published | str]  # a text: why the manifest cannot be used
    files: Mapping[int, int]  # bytes of the files that are there, by shard
    records: Sequence[Mapping[str, Any]] = ()  # failures and interruptions that nobody has forgiven
    unreadable: tuple[str, ...] = ()  # of the records
    held: frozenset[int] = frozenset()  # shards whose lock a process has
    attempts: Mapping[int, frozenset[str]] = field(default_factory=dict)  # jobs that have a journal of the shard
    submissions: Sequence[Submission] = ()
    queue: Sequence[QueuedJob] | None = ()  # None: Slurm could not be asked
    why: str = ""  # it could not
    states: Mapping[str, str] = field(default_factory=dict)  # of jobs that have left the queue


def summarise(evidence: Evidence) -> dict[str, Any]:
    """Everything that status shows of the shards, as JSON values."""
    states = shard_states(evidence)
    done = {index: published_of(evidence, index) for index, state in states.items() if state == "done"}
    progress = _progress(evidence, states)
    return {
        "progress": progress,
        "interrupted": _counted(Counter(_kind(record) for record in evidence.records if not record["final"])),
        "quarantined": _quarantined(done),
        "speed": _speed(evidence, states, done, progress["running"]),
        "slowest": _slowest(done),
        "slurm": _slurm(evidence),
        "failing": _failing(evidence.records, states),
    }


def shard_problem(plan: Plan, index: int, published: Published | str | None, size: int | None) -> str | None:
    """Why a shard does not count as done, by its manifest alone, or None."""
    if published is None:
        return "missing"
    if isinstance(published, str):
        return published
    if size is None:
        return "its file is missing"
    if published.bytes not in (None, size):
        return f"its file has {size} bytes, not {published.bytes}"
    if published.fingerprint != plan.fingerprint:
        return "made by another plan"
    planned = plan.bounds[index + 1] - plan.bounds[index]
    if published.rows + len(published.quarantined) != planned:
        return f"holds {published.rows} rows and {len(published.quarantined)} quarantined, {planned} are planned"
    return None


def is_done(evidence: Evidence, index: int) -> bool:
    return shard_problem(evidence.plan, index, evidence.published.get(index), evidence.files.get(index)) is None


def published_of(evidence: Evidence, index: int) -> Published:
    found = evidence.published[index]
    assert isinstance(found, Published)
    return found


def shard_states(evidence: Evidence) -> dict[int, str]:
    """done, running, pending, failed:KIND, waiting or unknown for every shard."""
    failed = _failed(evidence.records)
    queued, mapped = queued_shards(evidence)
    rest = "waiting" if evidence.queue is not None and mapped else UNKNOWN
    states = {}
    for index in range(evidence.plan.num_shards):
        state, job = queued.get(index, ("", ""))
        record = failed.get(index)
        if is_done(evidence, index):
            states[index] = "done"
        elif evidence.queue is not None and index in evidence.held:
            states[index] = "running"
        elif record and (not job or record.get("job") == job):  # else another task is to try it again
            states[index] = f"failed:{_kind(record)}"
        else:
            states[index] = UNKNOWN if evidence.queue is None else state or rest
    return states


def queued_shards(evidence: Evidence) -> tuple[dict[int, tuple[str, str]], bool]:
    """(running or pending, task) of the shards in the queue; and whether every such task's shards are known."""
    tasks = {submission.number: submission.tasks for submission in evidence.submissions}
    queued: dict[int, tuple[str, str]] = {}
    mapped = True
    for job in evidence.queue or ():
        kind, number, first = parse_name(job.name)
        if kind != ATTRIBUTE or first is None:
            continue
        task = first + (job.index or 0)
        own = tasks.get(number, ())
        if task >= len(own):
            mapped = False
            continue
        left = [index for index in own[task] if not is_done(evidence, index)]
        begun = _begun(evidence, job, left)
        for index in left:
            state = "running" if index in begun else "pending"
            if queued.get(index, ("", ""))[0] != "running":  # a shard may be in two submissions
                queued[index] = state, job.id
    return queued, mapped


def _begun(evidence: Evidence, job: QueuedJob, left: Sequence[int]) -> set[int]:
    """Of the shards that a task has left, those that it computes now: with a journal of its, else the first."""
    if job.state not in RUNNING:
        return set()
    return {index for index in left if job.id in evidence.attempts.get(index, ())} or set(left[:1])


def _failed(records: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """The last final record of each shard that has one."""
    return {record["shard"]: record for record in sorted(records, key=_time) if record["final"]}


def _counted(counts: Counter[str]) -> dict[str, int]:
    """The largest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _failed_by_kind(states: Mapping[int, str]) -> Counter[str]:
    return Counter(state.partition(":")[2] for state in states.values() if state.startswith("failed"))


def _kind(record: Mapping[str, Any]) -> str:
    return str(record["kind"])


def _time(record: Mapping[str, Any]) -> float:
    return float(record["time"])


def _progress(evidence: Evidence, states: Mapping[int, str]) -> dict[str, Any]:
    counts = Counter(state.partition(":")[0] for state in states.values())
    asked = evidence.queue is not None
    problems = {
        index: shard_problem(evidence.plan, index, found, evidence.files.get(index))
        for index, found in sorted(evidence.published.items())
    }
    unusable = [{"shard": index, "why": why} for index, why in problems.items() if why]
    return {
        "done": counts["done"],
        "running": counts["running"] if asked else UNKNOWN,
        "pending": counts["pending"] if asked else UNKNOWN,
        "waiting": counts["waiting"] if asked else UNKNOWN,
        "failed": _counted(_failed_by_kind(states)),
        "unknown": counts[UNKNOWN],
        "unusable": {"count": len(unusable), "first": unusable[:EXAMPLES]},
        "unreadable_records": list(evidence.unreadable[:EXAMPLES]),
    }


def _quarantined(done: Mapping[int, Published]) -> dict[str, Any]:
    rows = [(image, index, why) for index, shard in sorted(done.items()) for image, why in shard.quarantined]
    first = [{"image": image, "shard": index, "why": why} for image, index, why in rows[:EXAMPLES]]
    return {"count": len(rows), "ids": [image for image, _, _ in rows], "first": first}


def _speed(
    evidence: Evidence, states: Mapping[int, str], done: Mapping[int, Published], running: int | str
) -> dict[str, Any]:
    """Images a second over what was published lately, and the time that the images left will take at that rate."""
    recent, seconds = recent_work(list(done.values()))
    rate = sum(shard.rows for shard in recent) / seconds if seconds > 0 else None
    sizes = {index: evidence.plan.bounds[index + 1] - evidence.plan.bounds[index] for index in states}
    left = sum(sizes[index] for index, state in states.items() if state != "done" and not state.startswith("failed"))
    remaining: float | str | None = UNKNOWN
    if running == 0 or not left:
        remaining = None  # nothing gets done, or nothing is left
    elif rate and running != UNKNOWN:
        remaining = round(left / rate, 1)
    return {
        "images_per_second": rate,
        "over_shards": len(recent),
        "over_seconds": round(seconds, 1),
        "images_left": left,
        "seconds_left": remaining,
        "last_published": max((shard.time for shard in recent), default=None),
    }


def recent_work(shards: Sequence[Published]) -> tuple[list[Published], float]:
    """The shards published in the last while, and how long of it any was being computed.

    Counting publications over such a time is right for tasks that end one by one and for whole waves of them, and
    nights in which nothing ran do not count.
    """
    if not shards:
        return [], 0.0
    end = max(shard.time for shard in shards)
    by_time = sorted(shards, key=lambda shard: shard.time)
    start = end - max(WINDOW_S, WINDOW_SHARDS * median(shard.seconds for shard in by_time[-50:]))
    recent = [shard for shard in by_time if shard.time > start]
    busy, reached = 0.0, start
    for begun, ended in sorted((shard.time - shard.seconds, shard.time) for shard in recent):
        busy += max(0.0, ended - max(begun, reached))
        reached = max(reached, ended)
    return recent, busy


def _slowest(done: Mapping[int, Published]) -> list[dict[str, Any]]:
    slow = sorted(done.items(), key=lambda item: (-item[1].seconds, item[0]))[:SLOWEST]
    return [{"shard": index, "seconds": shard.seconds, "host": shard.host} for index, shard in slow]


def _failing(records: Sequence[Mapping[str, Any]], states: Mapping[int, str]) -> list[dict[str, Any]]:
    """The latest record of every class that shards have failed with."""
    counts = _failed_by_kind(states)
    last = {
        _kind(record): record
        for record in sorted(records, key=_time)
        if record["final"] and states.get(record["shard"]) == f"failed:{_kind(record)}"
    }
    keys = ("shard", "attempt", "host", "job", "message", "tail", "log")
    return [
        {"kind": kind, "shards": counts[kind], **{key: last[kind].get(key) for key in keys}} for kind in sorted(last)
    ]


def _slurm(evidence: Evidence) -> dict[str, Any]:
    if not evidence.submissions and not evidence.queue:
        return {"state": "not used", "jobs_in_queue": 0, "submissions": []}
    asked = evidence.queue is not None
    return {
        "state": "asked" if asked else UNKNOWN,
        **({} if asked else {"why": evidence.why}),
        "jobs_in_queue": len(evidence.queue) if evidence.queue is not None else UNKNOWN,
        "submissions": [_submission(evidence, submission) for submission in recent_submissions(evidence.submissions)],
    }


def recent_submissions(submissions: Sequence[Submission]) -> Sequence[Submission]:
    """Those whose jobs are shown, the last one first."""
    return sorted(submissions, key=lambda submission: -submission.number)[:3]


def _submission(evidence: Evidence, submission: Submission) -> dict[str, Any]:
    settled = submission.settled
    # What stopped the arrays comes first: the shards given up may be many, and for that reason.
    why = [f"stopped early: {submission.stopped.get('why')}"] if submission.stopped else []
    why += [str(line) for line in settled.get("why", [])]
    return {
        "number": submission.number,
        "settled": settled.get("state"),
        "next": settled.get("next"),
        "why": why,
        "jobs": [_job(evidence, job) for job in [*submission.jobs, *_unrecorded(evidence, submission)]],
        "problems": list(submission.problems),
    }


def _unrecorded(evidence: Evidence, submission: Submission) -> list[dict[str, Any]]:
    """Jobs that are queued but not recorded: who submits was ended between sbatch and its record."""
    recorded = {str(job["job"]) for job in submission.jobs}
    found = {}
    for job in evidence.queue or ():
        kind, number, _ = parse_name(job.name)
        if kind and number == submission.number and job.array not in recorded:
            found[job.array] = {"kind": kind, "job": job.array}
    return list(found.values())


def job_ids(job: Mapping[str, Any]) -> list[str]:
    """Slurm's ids of a recorded job, or of all tasks of an array."""
    own, tasks = str(job["job"]), job.get("tasks", 1)
    return [own] if tasks <= 1 else [f"{own}_{index}" for index in range(tasks)]


def _job(evidence: Evidence, job: Mapping[str, Any]) -> dict[str, Any]:
    """A job's states with their numbers of tasks: from the queue, else the last that Slurm knows, else none."""
    own = str(job["job"])
    summary: dict[str, Any] = {"kind": job["kind"], "job": own, "tasks": job.get("tasks", 1)}
    if evidence.queue is None:
        return {**summary, "states": UNKNOWN, "reasons": {}}
    queued = [entry for entry in evidence.queue if entry.array == own]
    states = Counter(entry.state for entry in queued)
    if not queued:
        states += Counter(evidence.states[id] for id in job_ids(job) if id in evidence.states)
    reasons = Counter(entry.reason for entry in queued if entry.state == "PENDING" and entry.reason != "None")
    return {**summary, "states": _counted(states), "in_queue": bool(queued), "reasons": _counted(reasons)}
