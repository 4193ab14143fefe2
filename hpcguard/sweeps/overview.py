"""How far a sweep is, for `hpcguard status`."""

import time
from collections import Counter
from typing import Any

from hpcguard.errors import InputError
from hpcguard.progress import duration, say
from hpcguard.sweeps.evidence import cell_states, done_jobs, record_of, states_with
from hpcguard.sweeps.folder import SweepFolder, read_plan
from hpcguard.sweeps.grid import name_of
from hpcguard.sweeps.slurm_state import look

MOST_ROWS = 60
MOST_FAILED = 10
PATIENCE_S = 600.0  # with a Slurm that does not answer, while nothing is seen to run
MARKS = {
    "done": "done", "running": "running", "queued": "queued", "failed": "FAILED", "held up": "held up",
    "waiting": "waiting",
}  # fmt: skip
STAGES = ("refine", "attribute", "evaluate")


def overview(folder: SweepFolder) -> dict[str, Any]:
    """States of all cells and jobs, and why jobs have failed."""
    graph, alike, _ = read_plan(folder)
    done = done_jobs(folder, graph, alike)
    seen = look(folder, graph.jobs.keys() - done)
    states = states_with(folder, graph, done, seen)
    cells = [
        {"values": cell.values, "seed": cell.seed, "state": state, "job": job}
        for cell, (state, job) in zip(graph.cells, cell_states(graph, states), strict=True)
    ]
    failed = {name: record_of(folder, name) for name, state in states.items() if state == "failed"}
    return {
        "sweep": str(folder.path),
        "cells": cells,
        "jobs": {
            kind: dict(Counter(state for name, state in states.items() if graph.jobs[name].kind == kind))
            for kind in STAGES
        },
        "held_up": [name for name, state in states.items() if state == "held up"],
        "slurm": {"tasks": len({task.id for task in seen.live.values()}), "problem": seen.problem},
        "failed": {
            name: {"why": record.get("why") or seen.ended.get(name), "log": record.get("log")}
            for name, record in failed.items()
        },
    }


def rests(state: dict[str, Any]) -> bool:
    """Whether nothing of it runs or is queued, and that is known."""
    return not state["slurm"]["problem"] and not state["slurm"]["tasks"] and not _runs(state)


def _runs(state: dict[str, Any]) -> bool:
    return any(counts.get("running") for counts in state["jobs"].values())


def follow(folder: SweepFolder, seconds: float) -> dict[str, Any]:
    """Say how far it is whenever that has changed, until nothing of it runs or is queued; the last state.

    InputError where Slurm has not answered for PATIENCE_S: what it has may run or not.
    """
    said, told, known = "", False, time.monotonic()
    while True:
        state = overview(folder)
        if said != (line := one_line(state)):
            say(f"{time.strftime('%H:%M:%S')} {line}")
            said = line
        problem = state["slurm"]["problem"]
        if problem and not told:
            say(f"slurm is asked again, for up to {duration(PATIENCE_S)}: {problem}")
        told = bool(problem)
        if not problem or _runs(state):
            known = time.monotonic()
        elif time.monotonic() - known >= PATIENCE_S:
            raise InputError(problem)
        if rests(state):
            return state
        time.sleep(seconds)


def one_line(state: dict[str, Any]) -> str:
    """How far it is, for who follows it."""
    cells = state["cells"]
    told = f"cells {_counts(Counter(cell['state'] for cell in cells), len(cells))}"
    jobs: Counter[str] = sum(map(Counter, state["jobs"].values()), Counter())
    unknown = "; what Slurm has is unknown" * bool(state["slurm"]["problem"])
    return f"{told}; jobs {_counts(jobs, sum(jobs.values()))}{unknown}"


def lines(state: dict[str, Any]) -> list[str]:
    """The overview as text: totals, the grid with a column a seed, and what has failed."""
    cells = state["cells"]
    told = [f"sweep   {state['sweep']}", f"cells   {_counts(Counter(cell['state'] for cell in cells), len(cells))}"]
    for kind, counts in state["jobs"].items():
        if counts:
            told.append(f"  {kind:<10}{_counts(counts, sum(counts.values()))}")
    if state["slurm"]["tasks"]:
        told.append(f"slurm   {state['slurm']['tasks']} tasks in its queue")
    if state["slurm"]["problem"]:
        told.append(f"slurm   unknown: {state['slurm']['problem']}")
    told += ["", *_grid(cells)]
    for name, failure in list(state["failed"].items())[:MOST_FAILED]:
        told += ["", f"{name} FAILED: {failure['why']}", *([f"  log: {failure['log']}"] if failure["log"] else [])]
    if len(state["failed"]) > MOST_FAILED:
        told += ["", f"and {len(state['failed']) - MOST_FAILED} more failed jobs; --json has all"]
    return told


def _counts(counts: dict[str, int], total: int) -> str:
    return f"{total}: " + ", ".join(f"{counts[state]} {state}" for state in MARKS if counts.get(state))


def _grid(cells: list[dict[str, Any]]) -> list[str]:
    """A row a combination of values, a column a seed; those that are neither done nor waiting first to be shown."""
    seeds = sorted({cell["seed"] for cell in cells})
    rows: dict[str, dict[int, str]] = {}
    for cell in cells:
        rows.setdefault(name_of(cell["values"], None), {})[cell["seed"]] = MARKS[cell["state"]]
    shown = list(rows)
    if len(shown) > MOST_ROWS:
        busy = [name for name in shown if {"running", "queued", "FAILED"} & set(rows[name].values())]
        shown = [*busy, *(name for name in shown if name not in busy)][:MOST_ROWS]
    width = max(map(len, shown))
    head = f"{'':<{width}}  " + "  ".join(f"{f'seed {seed}':>8}" for seed in seeds)
    body = [f"{name:<{width}}  " + "  ".join(f"{rows[name].get(seed, ''):>8}" for seed in seeds) for name in shown]
    more = [f"and {len(rows) - len(shown)} more rows; --json has all"] if len(shown) < len(rows) else []
    return [head.rstrip(), *(line.rstrip() for line in body), *more]
