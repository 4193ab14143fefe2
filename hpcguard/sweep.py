"""A sweep: cells over the axes of a base configuration, each trained and measured, with what they share done once.

Writes SWEEP/models/*, SWEEP/stores/* (run folders, by the digest of what they depend on), SWEEP/logs/*, and
at the end what `hpcguard report SWEEP` writes. Says first how many cells and distinct jobs there are and what is known
of their cost. Each job is an hpcguard command of its own, max_jobs at once; a failed one holds up only what needs it.
Killed, interrupted, or with cells added, the same command does what is missing or has failed. The sweep's folder can
be given in the place of its YAML file. With cluster.executor=slurm the jobs go to Slurm as arrays, each behind what it
needs, and a last job that writes the table, and the command returns; --wait follows them, `hpcguard cancel SWEEP` ends
them. What is queued or runs there is never submitted again.
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from hpcguard.config import Config
from hpcguard.config.sweep import SweepConfig, load_sweep
from hpcguard.errors import InputError
from hpcguard.progress import duration, say
from hpcguard.runs import exclusive
from hpcguard.sweeps import slurm
from hpcguard.sweeps.evidence import cell_states, damaged, done_jobs, job_states, jobs_to_do, record_of
from hpcguard.sweeps.folder import SweepFolder, measured_alike, write_plan
from hpcguard.sweeps.grid import expand, matches, name_of
from hpcguard.sweeps.jobs import Graph, Job, Kind, plan_jobs
from hpcguard.sweeps.local import LocalRun, Outcome, seconds_by_kind
from hpcguard.sweeps.overview import follow
from hpcguard.sweeps.ready import Ready
from hpcguard.sweeps.slurm_state import live_jobs, read_submissions

EXAMPLE = (
    "python -m hpcguard.sweep configs/sweeps/components_small.yaml --dry-run",
    "python -m hpcguard.sweep configs/sweeps/components_small.yaml max_jobs=2",
    "python -m hpcguard.sweep configs/sweeps/components_small.yaml cluster.executor=slurm pack=4 --wait",
    "python -m hpcguard.status runs/sweeps/components_small",
)
SECTIONS = ()
KINDS: dict[Kind, str] = {"refine": "trainings", "attribute": "stores", "evaluate": "evaluations"}
STOPPED = 75
WAIT_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; start and write nothing")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="with Slurm: stay until none of its jobs is left there, then write the table",
    )


def run(source: Path, arguments: argparse.Namespace) -> int:
    sweep, base = load_sweep(source, arguments.overrides)
    on_slurm = base.cluster.executor == "slurm"
    if on_slurm:
        slurm.check_asked(base.cluster.slurm)
    try:
        cells = expand(sweep)
        _check_control(sweep, [cell.values for cell in cells])
        graph = plan_jobs(sweep.run, base, cells)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    folder, alike = SweepFolder(sweep.run), measured_alike(base)
    todo = jobs_to_do(graph, done_jobs(folder, graph, alike))
    _say_plan(folder, graph, todo, base.cluster.slurm.tasks_at_once if on_slurm else sweep.max_jobs)
    if arguments.dry_run:
        if on_slurm:
            _say_arrays(folder, sweep, base, graph, todo)
        say("dry run: nothing was started or written")
        return 0
    folder.create()
    with exclusive(folder.path):
        if not on_slurm:
            _check_free(folder)
        write_plan(folder, sweep, base, graph)
        if not on_slurm:
            return _do(folder, sweep, base, graph)
        submitted = _submit(folder, sweep, base, graph)
    if submitted and not arguments.wait:
        return 0
    return _conclude(folder, graph, alike, _outcome(follow(folder, WAIT_S)))


def _check_control(sweep: SweepConfig, points: list[dict[str, Any]]) -> None:
    if sweep.control and not any(matches(values, sweep.control) for values in points):
        raise InputError(f"control = {sweep.control}: fits no cell; write axes and values as they are above")


def _check_free(folder: SweepFolder) -> None:
    """InputError if Slurm has jobs of the sweep, which would be done twice."""
    try:
        live = live_jobs(folder, read_submissions(folder)) if folder.slurm.is_dir() else {}
    except InputError:  # there is no Slurm here
        return
    if live:
        raise InputError(
            f"cluster.executor = local: {len(live)} jobs of {folder.path} are in Slurm's queue; write slurm, wait "
            f"until they have ended (`hpcguard status {folder.path} --watch`), or `hpcguard cancel {folder.path}`"
        )


def _do(folder: SweepFolder, sweep: SweepConfig, base: Config, graph: Graph) -> int:
    """Do what is missing; the table, a summary and the exit status."""
    alike = measured_alike(base)
    todo = _todo(folder, graph, alike)
    outcome = Outcome()
    if todo:
        progress = _Progress(graph, len(todo))
        ready = Ready(graph, todo, sweep.pack, sweep.max_jobs)
        outcome = LocalRun(folder, base, graph, sweep.max_jobs, _gpus(base), progress.hear).do(ready)
    return _conclude(folder, graph, alike, outcome)


def _todo(folder: SweepFolder, graph: Graph, alike: dict[str, Any]) -> list[str]:
    """Jobs to do, among them those whose files others are to build on and are damaged, with what these need."""
    done = done_jobs(folder, graph, alike)  # again: another process had the lock until now
    broken = damaged(folder, graph, done)
    for name, why in broken.items():
        say(f"sweep: {name}: {why}; doing it again")
    return jobs_to_do(graph, done - broken.keys())


def _submit(folder: SweepFolder, sweep: SweepConfig, base: Config, graph: Graph) -> bool:
    """Give Slurm what is missing and it does not have; whether it has any of the sweep's jobs now."""
    todo = _todo(folder, graph, measured_alike(base))
    if not todo:
        return False
    planned = slurm.batch(folder, base.cluster.slurm, graph, todo, sweep.pack)
    for line in slurm.describe_plan(base.cluster.slurm, planned):
        say(line)
    if planned.submits:
        submission = slurm.submit(folder, base.cluster.slurm, planned)
        say(f"sweep: submission {submission.number}, in {submission.folder}")
        for line in slurm.describe(submission):
            say(line)
    say(f"  watch it with `hpcguard status {folder.path} --watch`, end it with `hpcguard cancel {folder.path}`")
    say("  its last job writes the table; then the same command submits again what is missing or has failed")
    return True


def _say_arrays(folder: SweepFolder, sweep: SweepConfig, base: Config, graph: Graph, todo: list[str]) -> None:
    asked = base.cluster.slurm
    try:
        planned = slurm.batch(folder, asked, graph, todo, sweep.pack)
    except InputError as error:
        say(f"slurm        cannot be asked here, so its usual limits are taken: {error}")
        planned = slurm.batch_unasked(asked, graph, todo, sweep.pack)
    for line in slurm.describe_plan(asked, planned):
        say(line)


def _outcome(state: dict[str, Any]) -> Outcome:
    """How a sweep on Slurm has ended, by what `hpcguard status` shows."""
    failed = {name: str(failure["why"]) for name, failure in state["failed"].items()}
    return Outcome(failed=failed, held_up=set(state["held_up"]))


def _gpus(base: Config) -> int:
    if base.device != "auto":
        return 0
    import torch  # here: who only plans waits for nothing

    return torch.cuda.device_count()


class _Progress:
    """A line for every job that starts or ends."""

    def __init__(self, graph: Graph, total: int) -> None:
        self._total, self._ended = total, 0
        self._cells: dict[str, str] = {}
        for cell in graph.cells:
            for name in graph.before([cell.evaluate]):
                self._cells.setdefault(name, name_of(cell.values, cell.seed))

    def hear(self, what: str, jobs: list[Job], seconds: float, why: str) -> None:
        self._ended += len(jobs) if what != "started" else 0
        took = f" after {duration(seconds, 1)}" if seconds else ""
        for job in jobs:
            named = f"{job.kind:<9} {job.name.partition('-')[2]}  ({self._cells.get(job.name, '')})"
            say(f"[{self._ended}/{self._total}] {'FAILED' if what == 'failed' else what:<7} {named}{took}")
        if why:
            say(f"    {why}")


def _say_plan(folder: SweepFolder, graph: Graph, todo: list[str], at_once: int) -> None:
    """Cells, distinct jobs by kind, and what is known of their cost."""
    say(f"sweep        {folder.path}{' (exists)' if folder.path.exists() else ''}")
    distinct = Counter(job.kind for job in graph.jobs.values())
    alone = sum(len(graph.before([cell.evaluate])) for cell in graph.cells)
    say(f"cells        {len(graph.cells)}")
    say(f"jobs         {len(graph.jobs)} distinct; {alone} if every cell did its own")
    missing = Counter(graph.jobs[name].kind for name in todo)
    known = (
        seconds_by_kind({name: record_of(folder, name) for name in graph.jobs}, graph) if folder.path.is_dir() else {}
    )
    total, unknown = 0.0, []
    for kind, what in KINDS.items():
        if not distinct[kind]:
            continue
        cost = ""
        if missing[kind] and kind in known:
            each = statistics.median(known[kind])
            total += each * missing[kind]
            cost = f", about {duration(each, 1)} each (median of {len(known[kind])} done here)"
        elif missing[kind]:
            unknown.append(what)
        say(f"  {what:<11}{distinct[kind]:>6}, {missing[kind]} to do{cost}")
    if todo:
        lacking = f"; unknown for {', '.join(unknown)}, none of which has been done here" if unknown else ""
        rest = f"about {duration(total)} of work, {duration(total / at_once)} with {at_once} at once"
        say(f"cost         {rest if total else 'unknown'}{lacking if total else ': no job has been done here yet'}")


def _conclude(folder: SweepFolder, graph: Graph, alike: dict[str, Any], outcome: Outcome) -> int:
    """The report, a summary and the exit status."""
    from hpcguard.sweeps.report import write_report  # here, for torch and matplotlib: who only plans waits for nothing

    states = [state for state, _ in cell_states(graph, job_states(folder, graph, alike))]
    write_report(folder)
    for name, why in outcome.failed.items():
        log = record_of(folder, name).get("log")
        say(f"sweep: {name} FAILED: {why}{f' (log: {log})' if log else ''}")
    told = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states).items()))
    say(f"sweep: {len(graph.cells)} cells: {told}; {folder.table}")
    if outcome.held_up:
        say(f"sweep: {len(outcome.held_up)} jobs were not begun, for they need what has failed")
    if outcome.stopped:
        say("sweep: told to stop; the same command goes on from here")
        return STOPPED
    return 0 if set(states) <= {"done"} and not outcome.failed else 1


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("sweep"))
