"""What of a sweep was submitted to Slurm, as files, and what Slurm has of it now.

SWEEP/slurm/0001 holds a submission: the sweep as it was, the jobs of every task, the ids from sbatch, their logs.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpcguard.cluster import slurm
from hpcguard.cluster.submission import Job, claim_number, parse_name
from hpcguard.errors import InputError
from hpcguard.runs import publish_json_once, read_json, write_json
from hpcguard.sweeps.folder import SweepFolder

REMEDY = "start the sweep again"
REPORT = "report"  # the kind of the last job, which writes the table and holds none of the sweep's jobs
ENDED_WELL = ("COMPLETED", "CANCELLED")  # or on purpose: who cancels a task knows why it is missing


@dataclass
class Submission:
    """`submitted` grows with every sbatch: the arrays in their order, then the last job."""

    folder: Path
    number: int
    tasks: list[list[str]]  # the jobs of each
    submitted: list[Job] = field(default_factory=list)

    def add(self, job: Job) -> None:
        """Note an array, or the last job, as soon as Slurm has it."""
        self.submitted.append(job)
        write_json(self.folder / "jobs.json", {"jobs": [asdict(each) for each in self.submitted]})

    def take_back(self) -> None:
        """Slurm refused a part of it: it counts as never submitted."""
        (self.folder / "submission.json").replace(self.folder / "refused.json")


@dataclass(frozen=True)
class Seen:
    """Jobs of a sweep as Slurm has them."""

    live: dict[str, slurm.QueuedJob] = field(default_factory=dict)  # by job: the task that holds it
    ended: dict[str, str] = field(default_factory=dict)  # by job: how its last task ended, if not well
    problem: str = ""  # why nothing is known


def new_submission(folder: SweepFolder, tasks: list[list[str]]) -> Submission:
    """Write down, before anything is submitted, what each task is to do."""
    number, place = claim_number(folder.slurm)
    (place / folder.sweep.name).write_bytes(folder.sweep.read_bytes())  # as it is: cells may be changed meanwhile
    publish_json_once(place / "submission.json", {"number": number, "tasks": tasks, "time": time.time()})
    return Submission(place, number, tasks)


def read_submission(place: Path) -> Submission:
    values = read_json(place / "submission.json", REMEDY, number=int, tasks=list)
    submission = Submission(place, values["number"], values["tasks"])
    if (place / "jobs.json").exists():
        submission.submitted = [Job(**job) for job in read_json(place / "jobs.json", REMEDY, jobs=list)["jobs"]]
    return submission


def read_submissions(folder: SweepFolder) -> list[Submission]:
    """All submissions of a sweep, oldest first."""
    return [read_submission(path.parent) for path in sorted(folder.slurm.glob("[0-9]*/submission.json"))]


def live_jobs(folder: SweepFolder, submissions: Sequence[Submission]) -> dict[str, slurm.QueuedJob]:
    """Jobs that are in a task which Slurm still has."""
    return jobs_in(slurm.queue_of(folder.path), submissions)


def jobs_in(queue: Sequence[slurm.QueuedJob], submissions: Sequence[Submission]) -> dict[str, slurm.QueuedJob]:
    """Jobs that are in a task of the sweep's queue, by the task's name: its id may not be noted yet."""
    tasks = {submission.number: submission.tasks for submission in submissions}
    found: dict[str, slurm.QueuedJob] = {}
    for queued in queue:
        _, number, first = parse_name(queued.name)
        place = (first or 0) + (queued.index or 0)
        if first is not None and place < len(tasks.get(number, [])):
            found |= dict.fromkeys(tasks[number][place], queued)
    return found


def lacks_report(queue: Sequence[slurm.QueuedJob], live: Mapping[str, slurm.QueuedJob]) -> bool:
    """Whether no last job waits for some task: each waits for its own submission's and for all older ones."""
    named = [parse_name(job.name) for job in queue]
    newest = max((number for kind, number, _ in named if kind == REPORT), default=0)
    return any(parse_name(task.name)[1] > newest for task in live.values())


def look(folder: SweepFolder, not_done: Collection[str]) -> Seen:
    """What Slurm has of the jobs that are not done; asks it only about a sweep that it was given."""
    try:
        submissions = read_submissions(folder)
        if not submissions or not not_done:
            return Seen()
        live = live_jobs(folder, submissions)
        last = {
            name: (submission, id)
            for submission in submissions
            for array in submission.submitted
            if array.kind != REPORT
            for id, names in zip(array.ids(), submission.tasks[array.first_task :], strict=False)
            for name in names
            if name in not_done and name not in live
        }
        states = slurm.states(sorted({id for _, id in last.values()})) if last else {}
    except InputError as error:
        return Seen(problem=str(error))
    ended = {
        name: f"its task {id} ended as {states[id]} (log: {submission.folder / f'{id}_0_log.err'})"
        for name, (submission, id) in last.items()
        if states.get(id, "COMPLETED") not in ENDED_WELL
    }
    return Seen(live, ended)
