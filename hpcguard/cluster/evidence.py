"""Reading what a run folder and Slurm tell about a run's shards, again and again, each small file once.

Nothing is hashed, locked for long or written: it works beside whatever computes the run, and from any machine that
sees the folder.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcguard.cluster import slurm
from hpcguard.cluster.overview import (
    Evidence,
    Published,
    Submission,
    is_done,
    job_ids,
    queued_shards,
    recent_submissions,
)
from hpcguard.cluster.plan import Plan, read_plan
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, is_claimed, size

Stamp = tuple[int, int]
LOG_TAIL_BYTES = 4096
LOG_TAIL_LINES = 12
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")


class Watcher:
    """Looks at one run; a second look reads only what has changed."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._cache: dict[str, tuple[Stamp, Any]] = {}
        self._ended: dict[str, str] = {}

    def look(self) -> Evidence:
        """What there is now. Raises InputError if there is no sound plan."""
        plan = self._plan()
        published, files = self._shards(plan)
        records, unreadable = self._records(plan)
        submissions = self._submissions()
        queue, why = self._queue(submissions)
        locks, attempts = self._unfinished()
        evidence = Evidence(
            plan=plan, published=published, files=files, records=records, unreadable=unreadable,
            attempts=attempts, submissions=submissions, queue=queue, why=why, states=self._states(submissions, queue),
        )  # fmt: skip
        return Evidence(**{**vars(evidence), "held": self._held(evidence, locks)})

    def _plan(self) -> Plan:
        status = self.folder.plan.stat() if self.folder.plan.exists() else None
        stamp = (status.st_mtime_ns, status.st_ino) if status else (0, 0)
        return self._cached(self.folder.plan, stamp, read_plan)

    def _cached(self, path: Path, stamp: Stamp, read: Callable[[Path], Any]) -> Any:
        known = self._cache.get(str(path))
        if known is None or known[0] != stamp:
            known = (stamp, read(path))
            self._cache[str(path)] = known
        return known[1]

    def _json_files(self, folder: Path) -> Iterator[tuple[str, Stamp]]:
        """(stem, stamp) of a folder's JSON files."""
        for entry in scan(folder):
            if entry.name.endswith(".json") and not entry.name.startswith("."):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # redone or forgiven since
                    continue
                yield entry.name.removesuffix(".json"), (status.st_mtime_ns, status.st_ino)

    def _shards(self, plan: Plan) -> tuple[dict[int, Published | str], dict[int, int]]:
        entries = {entry.name: entry for entry in scan(self.folder.shards)}
        names = {index: self.folder.shard(index).name for index in range(plan.num_shards)}
        files = {index: size(Path(entries[name])) for index, name in names.items() if name in entries}
        stamps = dict(self._json_files(self.folder.shards))
        published = {}
        for index in range(plan.num_shards):
            manifest = self.folder.manifest(index)
            if (stamp := stamps.get(manifest.stem)) is not None:
                published[index] = self._cached(manifest, stamp, read_manifest)
        return published, files

    def _records(self, plan: Plan) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        folder = self.folder.failures
        found = [self._cached(folder / f"{stem}.json", stamp, read_record) for stem, stamp in self._json_files(folder)]
        records = [record for record in found if isinstance(record, dict) and record["shard"] < plan.num_shards]
        return records, tuple(sorted(record for record in found if isinstance(record, str)))

    def _submissions(self) -> list[Submission]:
        numbers = sorted(int(entry.name) for entry in scan(self.folder.slurm) if entry.name.isdigit())
        return [self._submission(number) for number in numbers]

    def _submission(self, number: int) -> Submission:
        folder = self.folder.submission(number)
        stamps = dict(self._json_files(folder))
        problems: list[str] = []

        def part(name: str) -> dict[str, Any]:
            if name not in stamps:
                return {}
            found = self._cached(folder / f"{name}.json", stamps[name], read_object)
            if isinstance(found, str):
                problems.append(found)
                return {}
            return found

        tasks, jobs = part("submission").get("tasks", []), part("jobs").get("jobs", [])
        if not _are_tasks(tasks):
            problems.append("submission.json: damaged, tasks is no list of lists of shards")
            tasks = []
        if not _are_jobs(jobs):
            problems.append("jobs.json: damaged, jobs is no list of kinds and ids")
            jobs = []
        settled, stopped = part("settled"), part("stopped")
        if not isinstance(settled.get("why", []), list) or not isinstance(settled.get("next"), int | None):
            problems.append("settled.json: damaged")
            settled = {}
        return Submission(number, tasks, jobs, settled, stopped, tuple(problems))

    def _queue(self, submissions: Sequence[Submission]) -> tuple[list[slurm.QueuedJob] | None, str]:
        if not submissions:
            return [], ""  # a submission is recorded before its first job: nothing can be queued
        try:
            return slurm.queue_of(self.folder.path), ""
        except InputError as error:
            return None, " ".join(str(error).split())

    def _states(self, submissions: Sequence[Submission], queue: Sequence[slurm.QueuedJob] | None) -> Mapping[str, str]:
        """Last states of the shown submissions' jobs that have left the queue."""
        if queue is None:
            return {}
        queued = {job.array for job in queue}
        jobs = [job for submission in recent_submissions(submissions) for job in submission.jobs]
        ids = [id for job in jobs if str(job["job"]) not in queued for id in job_ids(job)]
        asked = [id for id in ids if id not in self._ended]
        try:
            found = slurm.states(asked) if asked else {}
        except InputError:
            found = {}
        self._ended |= {job: state for job, state in found.items() if state in ENDED}
        return {**self._ended, **found}

    def _unfinished(self) -> tuple[set[int], dict[int, frozenset[str]]]:
        """Shards with a lock file, and jobs with a journal of a shard."""
        locks: set[int] = set()
        attempts: dict[int, frozenset[str]] = {}
        for entry in scan(self.folder.unfinished):
            shard, _, rest = entry.name.partition(".")
            if not shard.isdigit():
                continue
            if rest == "lock":
                locks.add(int(shard))
            elif rest.endswith(".units"):
                attempts[int(shard)] = attempts.get(int(shard), frozenset()) | {rest.split(".")[0]}
        return locks, attempts

    def _held(self, evidence: Evidence, locks: set[int]) -> frozenset[int]:
        """Locks are tried only where nothing else tells: to try one is to hold it for a moment."""
        if evidence.queue is None:
            return frozenset()
        queued, _ = queued_shards(evidence)
        open_shards = (index for index in locks if index < evidence.plan.num_shards and index not in queued)
        return frozenset(
            index for index in open_shards if not is_done(evidence, index) and is_claimed(self.folder.lock(index))
        )


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """A folder's entries; none if it is not there."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def read_object(path: Path) -> dict[str, Any] | str:
    """A JSON object, or why it cannot be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return f"{path.name}: {error.strerror if isinstance(error, OSError) else 'damaged, not JSON'}"
    return values if isinstance(values, dict) else f"{path.name}: damaged, no JSON object"


def _are_tasks(tasks: object) -> bool:
    rows = tasks if isinstance(tasks, list) else [None]
    return all(isinstance(row, list) and all(isinstance(shard, int) for shard in row) for row in rows)


def _are_jobs(jobs: object) -> bool:
    rows = jobs if isinstance(jobs, list) else [None]
    return all(
        isinstance(row, dict) and {"kind", "job"} <= row.keys() and isinstance(row.get("tasks", 1), int) for row in rows
    )


def read_manifest(path: Path) -> Published | str:
    """The cheap facts of a shard's manifest, or why it cannot be used."""
    values = read_object(path)
    if isinstance(values, str):
        return values
    try:
        if values.get("shard", int(path.stem)) != int(path.stem):
            return f"{path.name}: of another shard"
        moment = values.get("published")
        quarantined = tuple((int(row["image"]), str(row["why"])) for row in values.get("quarantined") or [])
        time = float(path.stat().st_mtime if moment is None else moment)
        seconds = float(values.get("seconds") or 0)
        rows, size, host = int(values["rows"]), values.get("bytes"), values.get("host")
        return Published(str(values["fingerprint"]), rows, size, seconds, host, time, quarantined)
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"{path.name}: damaged ({type(error).__name__}: {error})"


def read_record(path: Path) -> dict[str, Any] | str:
    """A record of a failure, or why it cannot be used."""
    values = read_object(path)
    if isinstance(values, str):
        return values
    for key, kind in (("shard", int), ("kind", str), ("final", bool), ("time", int | float)):
        if not isinstance(values.get(key), kind):
            return f"{path.name}: damaged, {key} is {str(values.get(key))[:40]}"
    return values


def log_tail(path: Path) -> str:
    """The last lines of a log; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-LOG_TAIL_LINES:])
