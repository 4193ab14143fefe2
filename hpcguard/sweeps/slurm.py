"""A sweep's jobs as Slurm arrays; all of it is in Slurm's hands when this returns."""

from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

from hpcguard.cluster import sbatch, slurm
from hpcguard.cluster.packing import Chunk
from hpcguard.cluster.submission import Job, job_name, parse_name
from hpcguard.cluster.submit import Array, submit_array
from hpcguard.config import JobConfig, SlurmConfig
from hpcguard.errors import InputError
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Kind
from hpcguard.sweeps.slurm_arrays import TaskArray, arrange
from hpcguard.sweeps.slurm_state import REPORT, Submission, jobs_in, lacks_report, new_submission, read_submissions
from hpcguard.sweeps.slurm_task import report_task, sweep_task

MAX_ARRAY_SIZE = 1001  # Slurm's default, where it cannot be asked


@dataclass(frozen=True)
class Batch:
    """What is to be submitted, and what Slurm has already."""

    arrays: list[TaskArray]
    live: dict[str, slurm.QueuedJob]  # by job
    lacks_report: bool = False  # of what is live: who submitted it was killed before the last job

    @property
    def tasks(self) -> list[list[str]]:
        return [task for array in self.arrays for task in array.tasks]

    @property
    def submits(self) -> bool:
        """Whether anything is to be submitted: arrays and a last job, or that alone."""
        return bool(self.arrays) or self.lacks_report


def check_asked(asked: SlurmConfig) -> None:
    """InputError unless each job asks for one process on one node, which starts the others."""
    for kind, job in (("attribute", asked.attribute), ("refine", asked.refine), ("evaluate", asked.evaluate)):
        if job.nodes * job.tasks_per_node > 1:
            raise InputError(
                f"cluster.slurm.{kind}: nodes = {job.nodes}, tasks_per_node = {job.tasks_per_node}: a sweep's job is "
                f"one task on one node; set both to 1 (processes and workers are started there, one a GPU)"
            )


def batch(folder: SweepFolder, asked: SlurmConfig, graph: Graph, todo: Sequence[str], per_task: int) -> Batch:
    """What of `todo` Slurm does not have already, within the cluster's limits; InputError where it has no room."""
    queue = slurm.queue_of(folder.path)
    live = jobs_in(queue, read_submissions(folder))
    limits = slurm.limits(asked.account or "", asked.partition or "", asked.qos or "")
    arrays = _arranged(asked, graph, todo, live.keys(), per_task, limits.max_array_size)
    planned = Batch(arrays, live, lacks_report(queue, live))
    tasks = len(planned.tasks) + 1  # the last job
    room = limits.max_jobs if limits.max_submit is None else min(limits.max_jobs, limits.max_submit - limits.queued)
    if planned.submits and tasks > room:
        raise InputError(
            f"{tasks} tasks to submit, and Slurm takes {max(room, 0)} more of this user: raise pack = {per_task}, "
            "or wait until some have ended (squeue --me)"
        )
    return planned


def batch_unasked(asked: SlurmConfig, graph: Graph, todo: Sequence[str], per_task: int) -> Batch:
    """The same where no Slurm is at hand: as if it had nothing and its limits were the usual ones."""
    return Batch(_arranged(asked, graph, todo, set(), per_task, MAX_ARRAY_SIZE), {})


def _arranged(
    asked: SlurmConfig, graph: Graph, todo: Sequence[str], live: Set[str], per_task: int, largest: int
) -> list[TaskArray]:
    return arrange(graph, [name for name in todo if name not in live], live, per_task, largest, asked.tasks_at_once)


def submit(folder: SweepFolder, asked: SlurmConfig, planned: Batch) -> Submission:
    """Submit the arrays in their order, and the last job. If Slurm refuses any, all are taken back: InputError."""
    submission = new_submission(folder, planned.tasks)
    try:
        _submit_arrays(folder, submission, asked, planned)
        waits = [*(task.array for task in planned.live.values()), *(array.job for array in submission.submitted)]
        last = report_array(folder, submission, asked, tuple(dict.fromkeys(waits)))
        submission.add(Job(REPORT, submit_array(report_task, last)))
    except InputError:
        submission.take_back()
        with suppress(InputError):  # the first fault is the one to tell
            named = [job.array for job in slurm.queue_of(folder.path) if parse_name(job.name)[1] == submission.number]
            slurm.cancel(sorted({*named, *(job.job for job in submission.submitted)}))
        raise
    return submission


def _submit_arrays(folder: SweepFolder, submission: Submission, asked: SlurmConfig, planned: Batch) -> None:
    ids = {name: task.id for name, task in planned.live.items()}
    first = 0
    for array in planned.arrays:
        after = None if array.after is None else submission.submitted[array.after].job
        needs = tuple(dict.fromkeys(ids[name] for name in array.needs))
        id = submit_array(sweep_task, sbatch_array(folder, submission, asked, array, first, needs, after))
        job = Job(array.kind, id, first, len(array.tasks))
        submission.add(job)
        for task, task_id in zip(array.tasks, job.ids(), strict=True):
            ids |= dict.fromkeys(task, task_id)
        first += len(array.tasks)


def sbatch_array(
    folder: SweepFolder, submission: Submission, asked: SlurmConfig, array: TaskArray, first: int,
    needs: tuple[str, ...], after: str | None,
) -> Array:  # fmt: skip
    return Array(
        submission.folder.resolve(), asked, job_name(array.kind, submission.number, first), str(folder.path.resolve()),
        Chunk(first, len(array.tasks), array.parallel, array.after), () if after is None else (after,), None, needs,
        asks_for(asked, array.kind),
    )  # fmt: skip


def report_array(folder: SweepFolder, submission: Submission, asked: SlurmConfig, waits: tuple[str, ...]) -> Array:
    """The last job. Its name has no first task, for it holds none."""
    return Array(
        submission.folder.resolve(), asked, job_name(REPORT, submission.number), str(folder.path.resolve()),
        Chunk(len(submission.tasks), 1, 1, None), waits, None, job=asked.consolidate,
    )  # fmt: skip


def asks_for(asked: SlurmConfig, kind: Kind) -> JobConfig:
    return {"attribute": asked.attribute, "refine": asked.refine, "evaluate": asked.evaluate}[kind]


def describe_plan(asked: SlurmConfig, planned: Batch) -> list[str]:
    """Arrays, tasks and what they ask for, before anything is submitted."""
    arrays, tasks = planned.arrays, planned.tasks
    held = f"; {len({task.id for task in planned.live.values()})} tasks are in its queue already" * bool(planned.live)
    lines = [f"slurm        {len(arrays)} arrays, {len(tasks)} tasks, at most {asked.tasks_at_once} at once{held}"]
    for kind in dict.fromkeys(array.kind for array in arrays):
        own = [array for array in arrays if array.kind == kind]
        count, most = sum(len(array.tasks) for array in own), max(len(task) for array in own for task in array.tasks)
        options = _options(asked, asks_for(asked, kind))
        lines.append(f"  {kind:<10} {len(own)} arrays, {count} tasks of up to {most} jobs: sbatch {options}")
    if planned.submits:
        lines.append(
            f"  {REPORT:<10} 1 task, which writes the table at the end: sbatch {_options(asked, asked.consolidate)}"
        )
    return lines


def _options(asked: SlurmConfig, job: JobConfig) -> str:
    wanted = sbatch.options(asked, job)
    return " ".join(f"--{name}" if value is True else f"--{name}={value}" for name, value in wanted.items())


def describe(submission: Submission) -> list[str]:
    """What was submitted, for the user."""
    *arrays, last = submission.submitted
    return [
        *(
            f"  {array.kind:<10} job {array.job}: {array.tasks} task{'s' if array.tasks > 1 else ''}"
            for array in arrays
        ),
        f"  {last.kind:<10} job {last.job}: the table, when all have ended",
    ]
