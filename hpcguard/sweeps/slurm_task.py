"""What a task of a sweep does on Slurm: its jobs as hpcguard commands on its node, and the right end; or the table."""

import time

from hpcguard.cluster import slurm, submit
from hpcguard.cluster.environment import outside_step
from hpcguard.config import Config
from hpcguard.config.sweep import RESOLVED, load_sweep
from hpcguard.errors import InputError
from hpcguard.progress import duration, say
from hpcguard.sweeps.evidence import is_done
from hpcguard.sweeps.folder import SweepFolder, measured_alike
from hpcguard.sweeps.grid import expand
from hpcguard.sweeps.jobs import Graph, Job, plan_jobs
from hpcguard.sweeps.local import LocalRun
from hpcguard.sweeps.overview import lines, overview
from hpcguard.sweeps.ready import Ready
from hpcguard.sweeps.slurm_state import read_submission

LINGER_S = 60.0  # after asking to be requeued
MOST_RESTARTS = 100  # a time limit too short for a single step would go on for ever


def sweep_task(number: int) -> None:
    """One task: what is missing of its jobs. Raises SystemExit with the job's status."""
    place = submit.own_submission()
    sweep, base = load_sweep(place / RESOLVED, [])
    folder = SweepFolder(place.parents[1])
    graph = plan_jobs(folder.path, base, expand(sweep))
    own = read_submission(place).tasks[number]
    if unknown := [name for name in own if name not in graph.jobs]:
        raise InputError(f"{unknown[0]}: what it depends on has changed since it was submitted; start the sweep again")
    # What was submitted is missing or damaged; begun again, this task has done some of it.
    begun = slurm.restarts() > 0
    todo = [name for name in own if not (begun and is_done(folder, graph.jobs[name], measured_alike(base)))]
    told: list[bool] = []

    def told_to_stop() -> bool:
        if not told and submit.told_to_stop():
            told.append(True)
        return bool(told)

    with outside_step():
        run = LocalRun(folder, on_a_node(base), graph, 1, 0, _say, told_to_stop)
        outcome = run.do(Ready(_part(graph, own), todo, sweep.pack))
    if told and outcome.stopped:
        _requeue()
    for name, why in outcome.failed.items():
        say(f"sweep: {name} FAILED: {why} (log: {folder.log(name)})")
    raise SystemExit(1 if outcome.failed or outcome.stopped else 0)


def report_task(_: int) -> None:
    """A submission's last job: the table of what is there.

    Raises SystemExit, with 1 where a cell has failed, or is not done and Slurm does not tell why.
    """
    from hpcguard.sweeps.report import write_report  # here, for matplotlib: who only submits waits for nothing

    folder = SweepFolder(submit.own_submission().parents[1])
    state = overview(folder)
    for line in lines(state):
        say(line)
    write_report(folder)
    states = {cell["state"] for cell in state["cells"]}
    unknown = state["slurm"]["problem"] and states != {"done"}
    raise SystemExit(1 if unknown or states & {"failed", "held up"} else 0)


def on_a_node(base: Config) -> Config:
    """The base with the workers that a task of attribution has."""
    cluster = base.cluster.model_copy(update={"workers": base.cluster.workers_of_a_task})
    return base.model_copy(update={"cluster": cluster})


def _part(graph: Graph, own: list[str]) -> Graph:
    return Graph([], {name: graph.jobs[name] for name in own}, graph.inputs)


def _say(what: str, jobs: list[Job], seconds: float, why: str) -> None:
    took = f" after {duration(seconds, 1)}" if seconds else ""
    for job in jobs:
        say(f"{what:<7} {job.name}{took}" + (f": {why}" if why else ""))


def _requeue() -> None:
    """Slurm has warned us: ask it to run this task again; what has been trained is saved."""
    if slurm.restarts() >= MOST_RESTARTS:
        say(f"sweep: started {MOST_RESTARTS} times without an end; raise minutes in cluster.slurm")
        return
    say("sweep: told to stop; to be requeued")
    if slurm.requeue_self():
        time.sleep(LINGER_S)  # Slurm ends us meanwhile
    say("sweep: Slurm did not requeue this task; start the sweep again")
