#!/usr/bin/env python3
"""Measure hpcguard's sweeps: planning and status of 10,000 cells, and what cells share.

  python tools/bench_sweep.py [--json] [--parts plan,status,shared] [--cells 10000] [--rounds 3]

plan       `hpcguard sweep SWEEP.yaml --dry-run`, as a whole process: every cell's training differs
status     `hpcguard status SWEEP`, as a whole process, with as many trainings and results published as --done says
shared     jobs of configs/sweeps/components_small.yaml if every cell did its own, against those after sharing

Beside each wall time stands the CPU time of the same process (_cpu_s): other work on the machine stretches the one, and
hardly the other.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import yaml
from bench_parts import Figures, hardware, run_parts

from hpcguard.config.sweep import load_sweep
from hpcguard.runs import RunFolder
from hpcguard.sweeps.folder import SweepFolder, measured_alike, write_plan
from hpcguard.sweeps.grid import expand
from hpcguard.sweeps.jobs import plan_jobs

PARTS = ("plan", "status", "shared")
SEEDS = 10
ROOT = Path(__file__).parents[1]
SHARED = ROOT / "configs/sweeps/components_small.yaml"
RESULTS = ROOT / "docs/results/study/cells"


def sweep_file(folder: Path, cells: int) -> Path:
    """A sweep of so many cells over one store, no two of which train the same: weights of masking, and 10 seeds."""
    path = folder / "sweep.yaml"
    weights = {"start": 0.0, "stop": 1.0, "count": cells // SEEDS}
    values = {
        "run": str(folder / "sweep"),
        "config": {"baseline": {"engine": "torch"}, "refinement": {"engine": "torch"}},
        "axes": {"refinement.masking.weight": {"range": weights}},
        "seeds": list(range(SEEDS)),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def measured(command: list[str], rounds: int) -> tuple[float, float]:
    """Median wall and CPU seconds of an hpcguard command."""
    walls, cpus = [], []
    for _ in range(rounds):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpcguard", *command], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        walls.append(time.perf_counter() - started)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls), statistics.median(cpus)


def plan(arguments: argparse.Namespace) -> Figures:
    """a dry run of the sweep"""
    with tempfile.TemporaryDirectory() as folder:
        path = sweep_file(Path(folder), arguments.cells)
        wall, cpu = measured(["sweep", str(path), "--dry-run"], arguments.rounds)
    return {f"plan_{arguments.cells}_s": wall, f"plan_{arguments.cells}_cpu_s": cpu}


def status(arguments: argparse.Namespace) -> Figures:
    """status of the sweep, from published files"""
    with tempfile.TemporaryDirectory() as name:
        sweep, base = load_sweep(sweep_file(Path(name), arguments.cells), [])
        graph = plan_jobs(sweep.run, base, expand(sweep))
        folder = SweepFolder(sweep.run)
        folder.create()
        write_plan(folder, sweep, base, graph)
        cells = graph.cells[: int(arguments.done * len(graph.cells))]
        identity = {**measured_alike(base), **dict.fromkeys(("weights_sha256", "baseline_sha256"), "0" * 64)}
        for job in [graph.jobs[name] for name in graph.before(cell.evaluate for cell in cells)]:
            if job.kind == "refine":
                pretend(folder.run(job), job.arm, identity)
        wall, cpu = measured(["status", str(sweep.run)], arguments.rounds)
    return {f"status_{arguments.cells}_s": wall, f"status_{arguments.cells}_cpu_s": cpu}


def pretend(run: RunFolder, arm: str, identity: dict[str, object]) -> None:
    """Files of a trained and measured arm: a result of the study with another identity; the weights are empty."""
    training = {"arm": arm, "weights_sha256": "0" * 64, "identity": identity, "seconds": 1.0}
    for path in (run.weights(arm), run.result(arm), run.explanations(arm)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run.result(arm).write_text(json.dumps({**real_result(), "arm": arm, "identity": identity}, indent=1) + "\n")
    run.training(arm).write_text(json.dumps(training, indent=1))


@cache
def real_result() -> dict[str, object]:
    return dict(json.loads(min(RESULTS.glob("*.json")).read_text()))


def shared(arguments: argparse.Namespace) -> Figures:
    """jobs before and after sharing"""
    sweep, base = load_sweep(SHARED, [])
    graph = plan_jobs(sweep.run, base, expand(sweep))
    alone = sum(len(graph.before([cell.evaluate])) for cell in graph.cells)
    return {"cells": len(graph.cells), "jobs": len(graph.jobs), "shared_jobs_ratio": alone / len(graph.jobs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object at the end")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the parts above")
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--done", type=float, default=0.6, help="share of the cells that part status finds done")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are shown")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    figures, load = run_parts({"plan": plan, "status": status, "shared": shared}, parser, arguments)
    if arguments.json:
        print(json.dumps({**figures, "hardware": hardware(), "load": load}))


if __name__ == "__main__":
    main()
