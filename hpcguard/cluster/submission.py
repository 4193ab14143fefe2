"""What was submitted to Slurm, as files: RUN/slurm/0001 holds the shards of every task and the ids of all jobs."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpcguard.cluster.slurm import QueuedJob
from hpcguard.config import Config
from hpcguard.runs import RunFolder, publish, publish_json_once, read_json, write_json

REMEDY = "submit again with `python -m hpcguard.attribute`"
ATTRIBUTE = "attribute"  # the kind of job that is an array of tasks


@dataclass(frozen=True)
class Job:
    """One sbatch: an array of attribution tasks, numbered from first_task, or a job that follows them."""

    kind: str
    job: str
    first_task: int = 0
    tasks: int = 0

    def ids(self) -> list[str]:
        """As squeue names them: 12_0, 12_1, ...; Slurm makes no array of a single task."""
        return [self.job] if self.tasks <= 1 else [f"{self.job}_{index}" for index in range(self.tasks)]


@dataclass
class Submission:
    """One submission; `jobs` grows with every sbatch."""

    folder: Path
    number: int
    tasks: list[list[int]]  # the shards of each
    by_hand: bool = True  # by a person, not by the job that looks after a former one
    jobs: list[Job] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def settled(self) -> Path:
        """How it ended: written by the job that looks after its arrays."""
        return self.folder / "settled.json"

    @property
    def stopped(self) -> Path:
        """Why its tasks were stopped early."""
        return self.folder / "stopped.json"

    def add(self, job: Job) -> None:
        """Note a job as soon as Slurm has it."""
        self.jobs.append(job)
        write_json(self.folder / "jobs.json", {"jobs": [asdict(job) for job in self.jobs]})

    def follower(self, *kinds: str) -> Job | None:
        """The first job of these kinds, if there is one."""
        return next((job for kind in kinds for job in self.jobs if job.kind == kind), None)


def new_submission(run: RunFolder, config: Config, tasks: list[list[int]], by_hand: bool) -> Submission:
    """Claim the next number and write down, before anything is submitted, what each task is to do."""
    number = max((submission.number for submission in read_submissions(run)), default=0) + 1
    folder = run.submission(number)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    submission = Submission(folder, number, tasks, by_hand)
    with publish(submission.config) as temporary:
        temporary.write_text(yaml.safe_dump(_absolute(config), sort_keys=False), encoding="utf-8")
    values = {"number": number, "tasks": tasks, "by_hand": by_hand, "time": time.time()}
    publish_json_once(folder / "submission.json", values)
    return submission


def read_submissions(run: RunFolder) -> list[Submission]:
    """All submissions of a run, oldest first."""
    return [read_submission(path.parent) for path in sorted(run.slurm.glob("[0-9]*/submission.json"))]


def read_submission(folder: Path) -> Submission:
    """One submission; InputError if it is damaged."""
    values = read_json(folder / "submission.json", REMEDY, number=int, tasks=list, by_hand=bool)
    submission = Submission(folder, values["number"], values["tasks"], values["by_hand"])
    if (folder / "jobs.json").exists():
        jobs = read_json(folder / "jobs.json", REMEDY, jobs=list)["jobs"]
        submission.jobs = [Job(**job) for job in jobs]
    return submission


def shards_in_queue(submissions: Sequence[Submission], queue: Iterable[QueuedJob]) -> dict[int, QueuedJob]:
    """Shards whose array task Slurm still has, and that task."""
    tasks = {
        id: submission.tasks[job.first_task + index]
        for submission in submissions
        for job in submission.jobs
        if job.kind == ATTRIBUTE
        for index, id in enumerate(job.ids())
    }
    return {shard: queued for queued in queue for shard in tasks.get(queued.id, [])}


def last_tasks(submissions: Sequence[Submission]) -> dict[int, str]:
    """Slurm's id of the newest array task that held each shard."""
    return {
        shard: id
        for submission in submissions
        for job in submission.jobs
        if job.kind == ATTRIBUTE
        for index, id in enumerate(job.ids())
        for shard in submission.tasks[job.first_task + index]
    }


def rounds(submissions: Sequence[Submission]) -> dict[int, int]:
    """How many submissions held each shard since a person last submitted it, that one included."""
    counts: dict[int, int] = {}
    for submission in submissions:
        for shard in (shard for task in submission.tasks for shard in task):
            counts[shard] = 1 if submission.by_hand else counts.get(shard, 0) + 1
    return counts


def _absolute(config: Config) -> dict[str, Any]:
    """The configuration with every path absolute, for jobs that start elsewhere."""

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolve(inner) for key, inner in value.items()}
        return str(value.expanduser().resolve()) if isinstance(value, Path) else value

    plain = config.model_dump(mode="json")
    return _merge(plain, resolve(config.model_dump()))


def _merge(plain: Any, resolved: Any) -> Any:
    """`plain`, JSON, with the strings that `resolved` made of paths."""
    if isinstance(plain, dict):
        return {key: _merge(value, resolved[key]) for key, value in plain.items()}
    return resolved if isinstance(plain, str) and isinstance(resolved, str) else plain
