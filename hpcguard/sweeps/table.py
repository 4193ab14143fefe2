"""Results as a tidy table, their means over seeds, and paired differences from the control."""

import csv
import io
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcguard.sweeps.axes import shown
from hpcguard.sweeps.evidence import result_of, training_of
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.grid import matches
from hpcguard.sweeps.jobs import Graph, Planned

Row = dict[str, Any]


def rows(folder: SweepFolder, graph: Graph, alike: Mapping[str, Any], states: Sequence[str]) -> list[Row]:
    """A row a cell: axes, seed, state, and what was measured; None where there is nothing."""
    return [
        {**cell.values, "seed": cell.seed, "state": state, **_measured(folder, graph, cell, alike)}
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
    result = result_of(run, job.arm, training, alike)
    if result is not None:
        row |= {name: attack["accuracy"] for name, attack in result["attacks"].items()}
        row |= {"explanation_jaccard5": result.get("explanation_jaccard5"), "evaluate_seconds": result.get("seconds")}
    return row | {"weights": str(run.weights(job.arm).relative_to(folder.path))}


LAST = ("refine_seconds", "evaluate_seconds", "weights")
OTHER = ("seed", "state", "validation_clean", "validation_robust", "flagged", "left_out", "explanation_jaccard5", *LAST)


def columns(table: Iterable[Row]) -> list[str]:
    """All columns in the order of their first row, cost and files last."""
    names = dict.fromkeys(name for row in table for name in row)
    return [name for name in names if name not in LAST] + [name for name in LAST if name in names]


def attacks_in(table: Sequence[Row], axes: Sequence[str]) -> list[str]:
    """The columns that hold accuracies on test images."""
    return [name for name in columns(table) if name not in axes and name not in OTHER]


def to_csv(table: Sequence[Row]) -> str:
    names = columns(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(row.get(name)) for name in names] for row in table)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict | bool) else value


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval by Student's t; nan for a single value."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def control_of(row: Row, control: Mapping[str, Any], table: Sequence[Row], axes: Sequence[str]) -> Row | None:
    """The control's row of the same seed and, of several, of the same other axes; None if there is none."""
    fitting = [each for each in table if each["seed"] == row["seed"] and matches(each, control)]
    others = [name for name in axes if name not in control]
    alike = [each for each in fitting if all(each.get(name) == row.get(name) for name in others)]
    return (alike or fitting)[0] if alike or len(fitting) == 1 else None


def to_markdown(table: Sequence[Row], axes: Sequence[str], control: Mapping[str, Any]) -> str:
    """Means over seeds with 95% intervals, and the mean paired differences from the control."""
    measures = attacks_in(table, axes)
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(json.dumps([row.get(name) for name in axes]), []).append(row)
    done = sum(row["state"] == "done" for row in table)
    lines = [
        f"{done} of {len(table)} cells are measured. Accuracy in %: mean over seeds ± 95% interval (Student's t).",
        "",
    ]
    lines += _head([*axes, "seeds", *measures])
    for group in groups.values():
        measured = [[row[name] for row in group if row.get(name) is not None] for name in measures]
        lines.append(_line(group[0], axes, max(map(len, measured), default=0), measured))
    if control:
        lines += ["", f"Differences from the control ({_pattern(control, table)}) with the same seed, in points.", ""]
        lines += _head([*axes, "pairs", *measures])
        for group in groups.values():
            if not matches(group[0], control):
                pairs = [(row, control_of(row, control, table, axes)) for row in group]
                gains = [[_gain(row, other, name) for row, other in pairs] for name in measures]
                kept = [[gain for gain in each if gain is not None] for each in gains]
                lines.append(_line(group[0], axes, max(map(len, kept), default=0), kept, "+"))
    if left_out := sum(bool(row.get("left_out")) for row in table):
        lines += ["", f"{left_out} cells were trained without images that attribution could not explain (left_out)."]
    return "\n".join(lines) + "\n"


def _gain(row: Row, other: Row | None, name: str) -> float | None:
    if other is None or row.get(name) is None or other.get(name) is None:
        return None
    return float(row[name] - other[name])


def _pattern(control: Mapping[str, Any], table: Sequence[Row]) -> str:
    """The control as the table's rows have it: YAML reads a label on as a truth value."""
    row = next((row for row in table if matches(row, control)), control)
    return ", ".join(f"{name}={shown(row[name])}" for name in control)


def _head(names: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _line(row: Row, axes: Sequence[str], count: int, measured: Sequence[Sequence[float]], sign: str = "") -> str:
    told = ["" if row.get(name) is None else shown(row[name]) for name in axes]
    return f"| {' | '.join([*told, str(count), *(_figure(values, sign) for values in measured)])} |"


def _figure(values: Sequence[float], sign: str) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{100 * mean:{sign}.1f}" + ("" if math.isnan(half) else f" ± {100 * half:.1f}")
