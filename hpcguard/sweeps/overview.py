"""How far a sweep is, for `hpcguard status`."""

from collections import Counter
from typing import Any

from hpcguard.sweeps.evidence import cell_states, job_states, record_of
from hpcguard.sweeps.folder import SweepFolder, read_plan
from hpcguard.sweeps.grid import name_of

MOST_ROWS = 60
MOST_FAILED = 10
MARKS = {"done": "done", "running": "running", "failed": "FAILED", "waiting": "waiting"}
STAGES = ("refine", "attribute", "evaluate")


def overview(folder: SweepFolder) -> dict[str, Any]:
    """States of all cells and jobs, and why jobs have failed."""
    graph, alike, _ = read_plan(folder)
    states = job_states(folder, graph, alike)
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
        "failed": {name: {"why": record.get("why"), "log": record.get("log")} for name, record in failed.items()},
    }


def lines(state: dict[str, Any]) -> list[str]:
    """The overview as text: totals, the grid with a column a seed, and what has failed."""
    cells = state["cells"]
    told = [f"sweep   {state['sweep']}", f"cells   {_counts(Counter(cell['state'] for cell in cells), len(cells))}"]
    for kind, counts in state["jobs"].items():
        if counts:
            told.append(f"  {kind:<10}{_counts(counts, sum(counts.values()))}")
    told += ["", *_grid(cells)]
    for name, failure in list(state["failed"].items())[:MOST_FAILED]:
        told += ["", f"{name} FAILED: {failure['why']}", f"  log: {failure['log']}"]
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
        busy = [name for name in shown if {"running", "FAILED"} & set(rows[name].values())]
        shown = [*busy, *(name for name in shown if name not in busy)][:MOST_ROWS]
    width = max(map(len, shown))
    head = f"{'':<{width}}  " + "  ".join(f"{f'seed {seed}':>8}" for seed in seeds)
    body = [f"{name:<{width}}  " + "  ".join(f"{rows[name].get(seed, ''):>8}" for seed in seeds) for name in shown]
    more = [f"and {len(rows) - len(shown)} more rows; --json has all"] if len(shown) < len(rows) else []
    return [head.rstrip(), *(line.rstrip() for line in body), *more]
