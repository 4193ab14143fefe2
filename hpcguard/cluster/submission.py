"""What was submitted to Slurm, as files: RUN/slurm/0001 holds the shards of every task and the ids of all jobs."""

import re
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
ATTRIBUTE, CONSOLIDATE = "attribute", "consolidate"  # kinds of jobs: an array of tasks, and who looks after them
NAME = re.compile(r"hpcguard-([a-z]+)-(\d+)(?:-(\d+))?")  # of a job: kind, submission, first task


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
    history: dict[int, list[int]] = field(default_factory=dict)  # by shard: fruitless rounds, bytes of finished units
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

    def take_back(self) -> None:
        """Slurm refused a part of it: it counts as never submitted."""
        (self.folder / "submission.json").replace(self.folder / "refused.json")

    def add(self, job: Job) -> None:
        """Note a job as soon as Slurm has it."""
        self.jobs.append(job)
        write_json(self.folder / "jobs.json", {"jobs": [asdict(job) for job in self.jobs]})


def job_name(kind: str, number: int, first: int | None = None) -> str:
    return f"hpcguard-{kind}-{number:04d}" + ("" if first is None else f"-{first}")


def parse_name(name: str) -> tuple[str, int, int | None]:
    """(kind, submission, first task) of one of our jobs; ("", 0, None) for any other."""
    found = NAME.fullmatch(name)
    return ("", 0, None) if found is None else (found[1], int(found[2]), None if found[3] is None else int(found[3]))


def claim_number(parent: Path) -> tuple[int, Path]:
    """The next submission's number and its new folder, of nobody else."""
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.glob("[0-9]*")), default=0)
    while True:
        number += 1
        folder = parent / f"{number:04d}"
        try:
            folder.mkdir(mode=0o700)  # fails for all but one, also where locks do not reach other nodes
            return number, folder
        except FileExistsError:
            continue


def new_submission(
    run: RunFolder, config: Config, tasks: list[list[int]], by_hand: bool, history: dict[int, list[int]] | None = None
) -> Submission:
    """Claim the next number and write down, before anything is submitted, what each task is to do."""
    number, folder = claim_number(run.slurm)
    submission = Submission(folder, number, tasks, by_hand, history or {})
    with publish(submission.config) as temporary:
        temporary.write_text(yaml.safe_dump(_absolute(config), sort_keys=False), encoding="utf-8")
    values = {
        "number": number, "tasks": tasks, "by_hand": by_hand, "history": history or {}, "time": time.time(),
    }  # fmt: skip
    publish_json_once(folder / "submission.json", values)
    return submission


def read_submissions(run: RunFolder) -> list[Submission]:
    """All submissions of a run, oldest first."""
    return [read_submission(path.parent) for path in sorted(run.slurm.glob("[0-9]*/submission.json"))]


def read_submission(folder: Path) -> Submission:
    """One submission; InputError if it is damaged."""
    values = read_json(folder / "submission.json", REMEDY, number=int, tasks=list, by_hand=bool)
    history = {int(shard): entry for shard, entry in values.get("history", {}).items()}
    submission = Submission(folder, values["number"], values["tasks"], values["by_hand"], history)
    if (folder / "jobs.json").exists():
        jobs = read_json(folder / "jobs.json", REMEDY, jobs=list)["jobs"]
        submission.jobs = [Job(**job) for job in jobs]
    return submission


def shards_in_queue(submissions: Sequence[Submission], queue: Iterable[QueuedJob]) -> dict[int, QueuedJob]:
    """Shards whose array task Slurm still has, and that task; known by its name, for its id may not be noted yet."""
    tasks = {submission.number: submission.tasks for submission in submissions}
    found: dict[int, QueuedJob] = {}
    for queued in queue:
        kind, number, first = parse_name(queued.name)
        if kind != ATTRIBUTE or first is None:
            continue
        own, task = tasks.get(number, []), first + (queued.index or 0)
        if task < len(own):
            found |= dict.fromkeys(own[task], queued)
    return found


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


def history(submissions: Sequence[Submission], finished: dict[int, int]) -> dict[int, list[int]]:
    """[rounds that brought nothing, bytes of finished units] of each shard, `finished` being the bytes by now.

    Counted since a person last submitted the shard; a round in which any unit was finished begins the count again.
    """
    last: dict[int, list[int]] = {}
    for submission in submissions:
        for shard in (shard for task in submission.tasks for shard in task):
            last[shard] = [0, 0] if submission.by_hand else submission.history.get(shard, [0, 0])
    return {
        shard: [0 if finished.get(shard, 0) > before else rounds + 1, finished.get(shard, 0)]
        for shard, (rounds, before) in last.items()
    }


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
