"""What one task of a Slurm array does: its shards in a pool of workers, and the right end when Slurm wants it to go.

This process only looks after its workers, so it imports no torch: they do, once each.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from hpcguard.cluster import slurm, submit
from hpcguard.cluster.attempt import Attempt, new_attempt, run_attempt
from hpcguard.cluster.failures import Kind, Problem, read_failures
from hpcguard.cluster.local import Outcome, Report
from hpcguard.cluster.plan import Plan, read_plan
from hpcguard.cluster.submission import Submission, read_submission
from hpcguard.config import Config, load_config
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.runs import RunFolder, publish_json_once, size

LINGER_S = 60.0  # after asking to be requeued


def array_task(number: int) -> None:
    """One task of a Slurm array: its shards in a pool with a worker a GPU. Raises SystemExit with the job's status."""
    submission = read_submission(submit.own_submission())
    if submission.stopped.exists():
        raise SystemExit(f"submission {submission.number} was stopped early: {submission.stopped}")
    config = load_config(submission.config)
    folder = RunFolder(config.run)
    plan = read_plan(folder.plan)
    job = slurm.own_job()
    attempt = Attempt(
        folder, plan, new_attempt(job, slurm.restarts()), job, submit.own_log(), slurm.own_memory_gb(),
        lambda: submit.told_to_stop() or submission.stopped.exists(),
    )  # fmt: skip
    shards = submission.tasks[number]
    _note_restart(attempt, shards)
    started = time.monotonic()
    workers = min(len(shards), config.cluster.workers_of_a_task)
    task = _ShardTask(config, plan, workers, attempt.name)
    try:
        outcome = run_attempt(attempt, task, shards, workers, config.cluster)
    except InputError as error:  # of this node or of the run: the others may tell the same
        attempt.end(shards[0], Problem("error", str(error), str(error)), config.cluster.equal_errors)
        _stop_if_told(submission, attempt)
        raise
    _stop_if_told(submission, attempt)
    if outcome.stopped and not attempt.stopped_because and not submission.stopped.exists():
        _requeue(attempt, outcome, config.cluster.slurm.attribute.minutes, time.monotonic() - started)
    raise SystemExit(0 if len(outcome.done) == len(shards) else 1)


def _stop_if_told(submission: Submission, attempt: Attempt) -> None:
    """Where the rest would fail too: tell the running tasks, and take back those that wait."""
    if attempt.stopped_because:
        publish_json_once(submission.stopped, {"why": attempt.stopped_because, "time": time.time()})
        jobs = read_submission(submission.folder).jobs  # more may have been submitted since we began
        slurm.cancel([job.job for job in jobs if job.kind == "attribute"], pending_only=True)


def _requeue(attempt: Attempt, outcome: Outcome, minutes: int, seconds: float) -> None:
    """Slurm has warned us: note why, and ask to be run again; not where two time limits brought nothing."""
    kind: Kind = "pre-empted" if slurm.was_preempted(attempt.job or "") else "time-out"
    begun = [shard for shard in outcome.stopped if attempt.own_journals(shard)]
    units = sum(size(path) for shard in begun for path in attempt.own_journals(shard))
    # A task that waited for another one's shard, or came to its last one late, has not wasted its time.
    fruitless = kind == "time-out" and bool(begun) and not units and not outcome.done
    message = f"{kind} after {seconds:.0f} s"
    if fruitless:
        message += f" without finishing a unit: raise cluster.slurm.attribute.minutes = {minutes}"
    # Once may be a slow start on a busy file system, twice is not.
    before = {failure.shard for failure in read_failures(attempt.folder) if failure.kind == kind and not failure.units}
    given_up = [shard for shard in begun if fruitless and shard in before]
    for shard in begun or outcome.stopped[:1]:
        attempt.record(shard, Problem(kind, message), final=shard in given_up)
    if given_up:
        return
    say(f"attribute: {message}; to be requeued")
    if slurm.requeue_self():
        time.sleep(LINGER_S)  # Slurm ends us meanwhile
    say("attribute: Slurm did not requeue this task; the job that looks after the arrays will")


def _note_restart(attempt: Attempt, shards: list[int]) -> None:
    """What ended the former start of this job, if it could not tell itself."""
    former = f"{attempt.job}.r{slurm.restarts() - 1}."
    if not slurm.restarts() or any(failure.attempt.startswith(former) for failure in read_failures(attempt.folder)):
        return
    begun = {shard: path for shard in shards for path in attempt.folder.journals(shard) if f".{former}" in path.name}
    hosts = {path.name.split(former, 1)[1].rsplit("-", 1)[0] for path in begun.values()}
    failed = slurm.was_node_failure(attempt.job or "") or any(map(slurm.node_is_down, hosts))
    kind: Kind = "node-failure" if failed else "requeued"
    for shard in begun or shards[:1]:
        attempt.record(shard, Problem(kind, f"{kind} of {', '.join(sorted(hosts)) or 'an unknown node'}"), final=False)


@dataclass
class _ShardTask:
    """shards.ShardTask, made in the worker process that first calls it."""

    config: Config
    plan: Plan
    workers: int
    attempt: str
    _task: Callable[[int, int, Report], None] | None = field(default=None, init=False)

    def __call__(self, index: int, slot: int, report: Report) -> None:
        if self._task is None:
            from hpcguard.shards import ShardTask

            self._task = ShardTask(self.config, self.plan, self.workers, self.attempt)
        self._task(index, slot, report)
