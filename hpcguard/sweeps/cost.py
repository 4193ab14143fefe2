"""What a sweep has cost, each job counted once however many cells share it."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcguard.errors import InputError
from hpcguard.runs import read_json
from hpcguard.sweeps.evidence import REMEDY, is_stored, result_of, training_of
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Job, Kind

KINDS: tuple[Kind, ...] = ("refine", "attribute", "evaluate")


@dataclass(frozen=True)
class Cost:
    """Of one job, as its stage has measured it."""

    seconds: float
    hours: float
    unit: str  # of hours: GPU, core, or worker where cores were not counted


@dataclass(frozen=True)
class CostLine:
    """Jobs of one kind whose hours have one unit."""

    kind: Kind
    unit: str
    jobs: int
    median: float  # seconds
    seconds: float
    hours: float
    unshared: float  # hours, had every cell done all jobs of its own


def costs(folder: SweepFolder, graph: Graph, alike: Mapping[str, Any]) -> dict[str, Cost]:
    """By job; those that are done."""
    found = {name: _cost(folder, job, alike) for name, job in graph.jobs.items()}
    return {name: cost for name, cost in found.items() if cost is not None}


def cost_lines(graph: Graph, known: Mapping[str, Cost]) -> list[CostLine]:
    uses = dict.fromkeys(known, 0)
    for cell in graph.cells:
        for name in graph.before([cell.evaluate]) & known.keys():
            uses[name] += 1
    lines = []
    for kind in KINDS:
        of_kind = [name for name in known if graph.jobs[name].kind == kind]
        for unit in dict.fromkeys(known[name].unit for name in of_kind):
            alike = [name for name in of_kind if known[name].unit == unit]
            seconds = [known[name].seconds for name in alike]
            lines.append(
                CostLine(
                    kind, unit, len(alike), statistics.median(seconds), sum(seconds),
                    _total(known[name].hours for name in alike),
                    _total(known[name].hours * uses[name] for name in alike),
                )
            )  # fmt: skip
    return lines


def _total(hours: Iterable[float]) -> float:
    return float(sum(hours))


def _cost(folder: SweepFolder, job: Job, alike: Mapping[str, Any]) -> Cost | None:
    run = folder.run(job)
    try:
        if job.kind == "attribute":
            if not is_stored(run):
                return None
            seconds = float(read_json(run.store_manifest, REMEDY)["worker_seconds"])
            return Cost(seconds, seconds / 3600, "worker")
        training = training_of(run, job.arm)
        if training is None:
            return None
        if job.kind == "refine":
            on_gpu = str(training.get("device")).startswith("cuda")
            return _spent(training["seconds"], training.get("world_size", 1), training.get("threads", 1), on_gpu)
        result = result_of(folder, job, training, alike)
        if result is None:
            return None
        hardware = result.get("hardware", {})
        return _spent(result["seconds"], 1, hardware.get("threads", 1), bool(hardware.get("gpu")))
    except (InputError, KeyError, TypeError, ValueError):
        return None  # not recorded


def _spent(seconds: float, processes: int, threads: int, on_gpu: bool) -> Cost:
    hours = seconds * processes / 3600
    return Cost(seconds, hours if on_gpu else hours * threads, "GPU" if on_gpu else "core")
