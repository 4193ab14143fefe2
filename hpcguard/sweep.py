"""A sweep: cells over the axes of a base configuration, each trained and measured, with what they share done once.

Writes SWEEP/models/*, SWEEP/stores/* (run folders, by the digest of what they depend on), SWEEP/logs/*, and
at the end what `hpcguard report SWEEP` writes. Says first how many cells and distinct jobs there are and what is known
of their cost. Each job is an hpcguard command of its own, max_jobs at once; a failed one holds up only what needs it.
Killed, interrupted, or with cells added, the same command does what is missing or has failed. The sweep's folder can
be given in the place of its YAML file.
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
from hpcguard.sweeps.evidence import cell_states, damaged, done_jobs, job_states, jobs_to_do, record_of
from hpcguard.sweeps.folder import SweepFolder, measured_alike, write_plan
from hpcguard.sweeps.grid import expand, matches, name_of
from hpcguard.sweeps.jobs import Graph, Job, Kind, plan_jobs
from hpcguard.sweeps.local import LocalRun, Outcome, seconds_by_kind
from hpcguard.sweeps.ready import Ready

EXAMPLE = (
    "python -m hpcguard.sweep configs/sweeps/components_small.yaml --dry-run",
    "python -m hpcguard.sweep configs/sweeps/components_small.yaml max_jobs=2",
    "python -m hpcguard.status runs/sweeps/components_small",
)
SECTIONS = ()
KINDS: dict[Kind, str] = {"refine": "trainings", "attribute": "stores", "evaluate": "evaluations"}
STOPPED = 75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; start and write nothing")


def run(source: Path, arguments: argparse.Namespace) -> int:
    sweep, base = load_sweep(source, arguments.overrides)
    if base.cluster.executor == "slurm":
        raise InputError(
            "cluster.executor = slurm: a sweep runs its jobs where it is; write local, and start it within a job"
        )
    try:
        cells = expand(sweep)
        _check_control(sweep, [cell.values for cell in cells])
        graph = plan_jobs(sweep.run, base, cells)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    folder, alike = SweepFolder(sweep.run), measured_alike(base)
    todo = jobs_to_do(graph, done_jobs(folder, graph, alike))
    _say_plan(folder, sweep, graph, todo)
    if arguments.dry_run:
        say("dry run: nothing was started or written")
        return 0
    folder.create()
    with exclusive(folder.path):
        write_plan(folder, sweep, base, graph)
        return _do(folder, sweep, base, graph)


def _check_control(sweep: SweepConfig, points: list[dict[str, Any]]) -> None:
    if sweep.control and not any(matches(values, sweep.control) for values in points):
        raise InputError(f"control = {sweep.control}: fits no cell; write axes and values as they are above")


def _do(folder: SweepFolder, sweep: SweepConfig, base: Config, graph: Graph) -> int:
    """Do what is missing; the table, a summary and the exit status."""
    alike = measured_alike(base)
    todo = jobs_to_do(graph, done_jobs(folder, graph, alike))  # again: another process had the lock until now
    broken = damaged(folder, graph, todo) if todo else {}
    for name, why in broken.items():
        say(f"sweep: {name}: {why}; doing it again")
    wanted = {*todo, *broken}
    todo = [name for name in graph.jobs if name in wanted]
    outcome = Outcome()
    if todo:
        progress = _Progress(graph, len(todo))
        ready = Ready(graph, todo, sweep.pack)
        outcome = LocalRun(folder, base, graph, sweep.max_jobs, _gpus(base), progress.hear).do(ready)
    states = cell_states(graph, job_states(folder, graph, alike))
    from hpcguard.sweeps.report import write_report  # here, for torch and matplotlib: who only plans waits for nothing

    write_report(folder)
    return _conclude(folder, graph, outcome, Counter(state for state, _ in states))


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


def _say_plan(folder: SweepFolder, sweep: SweepConfig, graph: Graph, todo: list[str]) -> None:
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
        rest = f"about {duration(total)} of work, {duration(total / sweep.max_jobs)} with {sweep.max_jobs} at once"
        say(f"cost         {rest if total else 'unknown'}{lacking if total else ': no job has been done here yet'}")


def _conclude(folder: SweepFolder, graph: Graph, outcome: Outcome, states: Counter[str]) -> int:
    for name, why in outcome.failed.items():
        say(f"sweep: {name} FAILED: {why} (log: {folder.log(name)})")
    told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    say(f"sweep: {len(graph.cells)} cells: {told}; {folder.table}, {folder.report}")
    if outcome.held_up:
        say(f"sweep: {len(outcome.held_up)} jobs were not begun, for they need what has failed")
    if outcome.stopped:
        say("sweep: told to stop; the same command goes on from here")
        return STOPPED
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("sweep"))
