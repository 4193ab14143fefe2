"""Submit missing shards as arrays, and the jobs that follow them; all of it is in Slurm's hands when this returns."""

import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcguard.cluster import sbatch, slurm
from hpcguard.cluster.packing import Chunk, chunks, pack, shards_per_task
from hpcguard.cluster.submission import ATTRIBUTE, CONSOLIDATE, Job, Submission, job_name, new_submission, parse_name
from hpcguard.cluster.submit import Array, array_text, submit_array
from hpcguard.config import Config, JobConfig, load_config
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder

Task = Callable[[int], None]
SUBMITTED_AGAIN = 3  # exit status of the settling stage: another job looks after what is missing


@dataclass(frozen=True)
class Part:
    """One chunk of tasks that share their memory."""

    chunk: Chunk  # its `after` is the place of the part that must end first
    memory_gb: float | None


@dataclass(frozen=True)
class Follower:
    """A job that follows the arrays, or the follower before it."""

    kind: str
    job: JobConfig
    commands: list[str]


def arrange(
    config: Config, memory: dict[int, float | None], limits: slurm.Limits
) -> tuple[list[list[int]], list[Part]]:
    """Tasks (their shards) and the arrays that hold them, within the cluster's limits; memory: by missing shard."""
    asked = config.cluster.slurm
    room = limits.max_jobs if limits.max_submit is None else min(limits.max_jobs, limits.max_submit - limits.queued)
    levels = sorted(set(memory.values()), key=lambda level: level or 0.0)
    room -= len(followers(config, Path(), 0)) + len(levels)
    per_task = shards_per_task(len(memory), asked.shards_per_task or config.cluster.workers_of_a_task, room)
    tasks: list[list[int]] = []
    parts: list[Part] = []
    for level in levels:
        own = pack([shard for shard in sorted(memory) if memory[shard] == level], per_task)
        base, place = len(tasks), len(parts)
        for chunk in chunks(len(own), limits.max_array_size, max(1, asked.tasks_at_once // len(levels))):
            after = None if chunk.after is None else place + chunk.after
            parts.append(Part(Chunk(base + chunk.first, chunk.tasks, chunk.parallel, after), level))
        tasks += own
    return tasks, parts


def submit(
    config: Config, run: RunFolder, memory: dict[int, float | None], task: Task, waits_for: Sequence[str] = (),
    waiting: Sequence[Job] = (), history: dict[int, list[int]] | None = None,
) -> Submission:  # fmt: skip
    """Submit the shards in `memory` and the jobs that follow. If Slurm refuses any, all are taken back: InputError.

    waits_for: further jobs, already in the queue, that those which follow must wait for. waiting: jobs behind a former
    submission's consolidation, which now wait for this one's. history: where a job and not a person submits again.
    """
    check_next(config)
    limits = slurm.limits(*_place(config))
    tasks, parts = arrange(config, memory, limits)
    submission = new_submission(run, config, tasks, history is None, history)
    try:
        waits = [*waits_for]
        for part in parts:
            after = None if part.chunk.after is None else submission.jobs[part.chunk.after].job
            id = submit_array(task, _array(config, run, submission, part, after))
            submission.add(Job(ATTRIBUTE, id, part.chunk.first, part.chunk.tasks))
            waits.append(id)
        _submit_followers(config, run, submission, waits, waiting)
    except InputError:
        submission.take_back()
        with suppress(InputError):  # the first fault is the one to tell
            named = [job.array for job in slurm.queue_of(run.path) if parse_name(job.name)[1] == submission.number]
            slurm.cancel(sorted({*named, *(job.job for job in submission.jobs if job not in waiting)}))
        raise
    return submission


def check_next(config: Config) -> None:
    """InputError unless cluster.slurm.next, if given, is a configuration of another run for Slurm."""
    path = config.cluster.slurm.next
    if path is None:
        return
    following = load_config(path.expanduser())
    if following.cluster.executor != "slurm":
        raise InputError(f"cluster.slurm.next = {path}: set cluster.executor to slurm in it")
    if following.run.resolve() == config.run.resolve():
        raise InputError(f"cluster.slurm.next = {path}: has the same run = {config.run}; give it another")


def texts(config: Config, run: RunFolder, memory: dict[int, float | None]) -> list[str]:
    """The exact sbatch scripts that `submit` would submit, dependencies by name."""
    check_next(config)
    _, parts = arrange(config, memory, slurm.limits(*_place(config)))
    submission = Submission(run.submission(1), 1, [])
    found = []
    for part in parts:
        after = None if part.chunk.after is None else f"ARRAY{part.chunk.after + 1}"
        found.append(array_text(_array(config, run, submission, part, after)))
    waits = ":".join(f"ARRAY{place + 1}" for place in range(len(parts)))
    dependency = f"afterany:{waits}" if parts else None
    for follower in followers(config, submission.config, submission.number):
        found.append(_text(config, run, submission, follower, dependency))
        dependency = f"afterok:{follower.kind.upper()}"
    return found


def _array(config: Config, run: RunFolder, submission: Submission, part: Part, after: str | None) -> Array:
    name = job_name(ATTRIBUTE, submission.number, part.chunk.first)
    comment, folder = str(run.path.resolve()), submission.folder.resolve()
    waits = () if after is None else (after,)
    return Array(folder, config.cluster.slurm, name, comment, part.chunk, waits, part.memory_gb)


def _place(config: Config) -> tuple[str, str, str]:
    asked = config.cluster.slurm
    return asked.account or "", asked.partition or "", asked.qos or ""


def followers(config: Config, path: Path, number: int) -> list[Follower]:
    """The jobs after the arrays of a submission whose configuration lies at `path`, in their order."""
    asked = config.cluster.slurm

    def stage(name: str, *more: str) -> str:
        return sbatch.stage(asked, name, path, *more)

    settle = [
        "status=0",
        f"{stage('attribute', '--settle', str(number))} || status=$?",
        f'if [ "$status" = {SUBMITTED_AGAIN} ]; then exit 0; fi  # another such job looks after what is missing',
        'if [ "$status" != 0 ]; then exit "$status"; fi',
        stage("consolidate"),
    ]
    found = [Follower(CONSOLIDATE, asked.consolidate, settle)]
    if "refine" in asked.then:
        step = f"{shlex.join(['srun', '--kill-on-bad-exit=1', *sbatch.srun(asked, asked.refine)])} {stage('refine')}"
        found.append(Follower("refine", asked.refine, [step]))
    last = [stage(name) for name in ("evaluate", "report") if name in asked.then]
    if last:
        found.append(Follower("evaluate", asked.evaluate, last))
    if asked.next:
        command = sbatch.stage(asked, asked.next_stage, asked.next.expanduser().resolve())
        found.append(Follower("next", asked.consolidate, [command]))
    return found


def _submit_followers(
    config: Config, run: RunFolder, submission: Submission, waits: Sequence[str], waiting: Sequence[Job]
) -> None:
    dependency = f"afterany:{':'.join(waits)}" if waits else None
    for follower in followers(config, submission.config, submission.number)[: 1 if waiting else None]:
        path = submission.folder / f"{follower.kind}.sh"
        path.write_text(_text(config, run, submission, follower, dependency), encoding="utf-8")
        id = slurm.submit(path, config.cluster.slurm.export)
        submission.add(Job(follower.kind, id))
        dependency = f"afterok:{id}"
    if waiting and dependency:
        slurm.redirect(waiting[0].job, dependency)
        for job in waiting:
            submission.add(job)


def _text(config: Config, run: RunFolder, submission: Submission, follower: Follower, dependency: str | None) -> str:
    asked = config.cluster.slurm
    name = job_name(follower.kind, submission.number)
    log = submission.folder.resolve() / f"{follower.kind}_%j.out"
    options: dict[str, sbatch.Value] = {
        **sbatch.options(asked, follower.job),
        "job-name": name,
        "comment": str(run.path.resolve()),
        "output": str(log),
        "open-mode": "append",
    }
    if follower.kind == "refine":
        # To the tasks of its steps: refinement saves a checkpoint and asks to be requeued.
        options["signal"] = f"USR2@{asked.signal_seconds}"
    if dependency:
        options |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    return sbatch.script(options, sbatch.setup(asked), follower.commands)


def describe(submission: Submission) -> list[str]:
    """What was submitted, for the user."""
    arrays = [job for job in submission.jobs if job.kind == ATTRIBUTE]
    shards = sum(map(len, submission.tasks))
    lines = []
    if arrays:
        ids = ", ".join(f"{job.job} ({job.tasks} task{'s' if job.tasks > 1 else ''})" for job in arrays)
        lines.append(f"  {shards} shards in {len(submission.tasks)} tasks: job {ids}")
    lines += [f"  then {job.kind}: job {job.job}" for job in submission.jobs if job.kind != ATTRIBUTE]
    return lines
