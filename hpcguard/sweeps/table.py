"""Results as a tidy table: a row a cell."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcguard.sweeps.evidence import result_of, training_of
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Planned

Row = dict[str, Any]
CLEAN, CORRUPTED, ALL_ATTACKS = "clean", "corrupted", "all-attacks"  # columns
EXPLANATION = "explanation_"  # how columns on explanations begin


def axes_of(graph: Graph) -> list[str]:
    """Names of all values that cells have, those of explicit cells included."""
    return list(dict.fromkeys(name for cell in graph.cells for name in cell.values))


def rows(folder: SweepFolder, graph: Graph, alike: Mapping[str, Any], states: Sequence[str]) -> list[Row]:
    """A row a cell: axes, seed, state, and what was measured; None where there is nothing."""
    axes = axes_of(graph)
    return [
        {**dict.fromkeys(axes), **cell.values, "seed": cell.seed, "state": state}
        | _measured(folder, graph, cell, alike)
        for cell, state in zip(graph.cells, states, strict=True)
    ]


def _measured(folder: SweepFolder, graph: Graph, cell: Planned, alike: Mapping[str, Any]) -> Row:
    job = graph.jobs[cell.refine]
    run = folder.run(job)
    training = training_of(run, job.arm)
    if training is None:
        return {}
    chosen = training.get("chosen", {})
    row: Row = {f"validation_{name}": chosen.get(f"validation_{name}") for name in ("clean", "robust")}
    row["flagged"] = training.get("spurious", {}).get("flagged")
    row["left_out"] = len(training.get("identity", {}).get("quarantined", []))
    row["refine_seconds"] = training.get("seconds")
    result = result_of(folder, graph.jobs[cell.evaluate], training, alike)
    if result is not None:
        row |= figures_of(result)
    return row | {"weights": str(run.weights(job.arm).relative_to(folder.path))}


def figures_of(result: Mapping[str, Any]) -> Row:
    """What a result says, a figure a column: accuracies from clean to all attacks together, and of explanations."""
    accuracies = {name: attack["accuracy"] for name, attack in result["attacks"].items()}
    if corruptions := result.get("corruptions"):
        accuracies = {CLEAN: accuracies.pop(CLEAN), CORRUPTED: corruptions["mean_accuracy"]["mean"], **accuracies}
    if len(result["attacks"]) > 2 and "worst" in result:
        accuracies[ALL_ATTACKS] = result["worst"]["accuracy"]
    quality = {name: figure["mean"] for name, figure in (result.get("explanations") or {}).items()}
    quality = {"jaccard5": result.get("explanation_jaccard5"), **quality}
    return {
        **accuracies,
        "red_alarms": sum(bool(alarm["red"]) for alarm in result.get("alarms", [])),
        **{f"{EXPLANATION}{name}": mean for name, mean in quality.items()},
        "evaluate_seconds": result.get("seconds"),
    }


UNITS = {
    "flagged": "share of segments", "left_out": "images", "red_alarms": "alarms",
    "refine_seconds": "s", "evaluate_seconds": "s", "explanation_jaccard5": "Jaccard index",
}  # fmt: skip
LAST = ("refine_seconds", "evaluate_seconds", "weights")
OTHER = ("seed", "state", "validation_clean", "validation_robust", "flagged", "left_out", "red_alarms", *LAST)


def columns(table: Iterable[Row]) -> list[str]:
    """All columns in the order of their first row, cost and files last."""
    names = dict.fromkeys(name for row in table for name in row)
    return [name for name in names if name not in LAST] + [name for name in LAST if name in names]


def accuracies_in(table: Sequence[Row], axes: Sequence[str]) -> list[str]:
    """The columns that hold accuracies on the images measured."""
    known = {*axes, *OTHER}
    return [name for name in columns(table) if name not in known and not name.startswith(EXPLANATION)]


def qualities_in(table: Sequence[Row], axes: Sequence[str]) -> list[str]:
    """The columns that hold the quality of explanations and are measured."""
    found = [name for name in columns(table) if name not in axes and name.startswith(EXPLANATION)]
    return [name for name in found if any(row.get(name) is not None for row in table)]


def units(table: Sequence[Row], axes: Sequence[str]) -> dict[str, str]:
    """Of the columns that have one."""
    shares = (*accuracies_in(table, axes), "validation_clean", "validation_robust")
    return {**dict.fromkeys(shares, "share of images"), **UNITS}


def to_csv(table: Sequence[Row]) -> str:
    names = columns(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in table)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value
