"""Tables of a report, and their forms: CSV, Markdown, aligned text (HTML is the template's)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcguard.reporting.arms import LOSS_TERMS, Arm, attack_title, role

MISSING = "–"


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]


def percent(row: Mapping[str, Any]) -> str:
    """An accuracy with its interval: 64.1% [55.5, 71.9]."""
    return f"{row['accuracy']:.1%} [{row['low'] * 100:.1f}, {row['high'] * 100:.1f}]"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def result_table(arms: Sequence[Arm]) -> Table:
    """Accuracy of every arm under every attack, and the time that it took to train."""
    columns = ["arm", *(attack_title(name) for name in arms[0].attacks), "training time"]
    rows = [
        [
            arm.name,
            *(percent(row) for row in arm.attacks.values()),
            duration(arm.training["seconds"]) if arm.training else MISSING,
        ]
        for arm in arms
    ]
    return Table(columns, rows)


def training_table(arms: Sequence[Arm]) -> Table:
    """How every arm was trained, and on what share of flagged superpixels."""
    columns = ["arm", "steps", "epochs", "processes", "device", "time", "flagged", "no mask", "all masked"]
    rows = []
    for arm in arms:
        if arm.training is None:
            continue
        last, shares = arm.training["last_epoch"], arm.training["spurious"]
        rows.append(
            [
                arm.name, str(arm.training["steps"]), str(last["epoch"]), str(arm.training["world_size"]),
                str(arm.training.get("device", MISSING)), duration(arm.training["seconds"]),
                *(f"{shares[name]:.1%}" if name in shares else MISSING for name in ("flagged", "empty", "full")),
            ]
        )  # fmt: skip
    return Table(columns, rows)


def loss_table(arms: Sequence[Arm]) -> Table:
    """The last epoch's loss. A term is shown only where it counts, as value × weight."""
    trained = [(arm.name, arm.training) for arm in arms if arm.training]
    rows = [[name, f"{training['last_epoch']['loss']:.4f}", *_terms(training)] for name, training in trained]
    return Table(["arm", "loss", *LOSS_TERMS], rows)


def attribution_table(store: Mapping[str, Any]) -> Table:
    """What the explained training set looks like as a whole."""
    means = store["statistics"]
    rows = [
        ["images explained", f"{store['images']}"],
        ["shards", f"{store['shards']}"],
        ["samples per image", f"{means['samples']:.0f}"],
        ["superpixels per image", f"{means['segments']:.1f}"],
        ["weighted R² of the surrogates", f"{means['score']:.3f}"],
        ["standard error / largest |coefficient|", f"{means['relative_error']:.3f}"],
        ["accuracy of the explained model there", f"{means['accuracy']:.1%}"],
        ["time summed over workers", duration(store["worker_seconds"])],
    ]
    return Table(["over the training images", "value"], rows)


def stability_table(arms: Sequence[Arm]) -> Table:
    values = [arm.result["explanation_jaccard5"] for arm in arms]
    shown = [MISSING if value is None else f"{value:.2f}" for value in values]
    return Table(["arm", "top-5 Jaccard"], [[arm.name, value] for arm, value in zip(arms, shown, strict=True)])


def hardware_table(arms: Sequence[Arm]) -> Table:
    """Where every arm was measured, with which code."""
    rows = []
    for arm in arms:
        hardware = arm.result["hardware"]
        known = [str(hardware.get(name, MISSING)) for name in ("device", "cores", "torch")]
        rows.append([arm.name, *known, str(arm.result.get("revision", MISSING)), duration(arm.result["seconds"])])
    return Table(["arm", "device", "cores", "torch", "revision", "evaluation time"], rows)


def results_csv(arms: Sequence[Arm]) -> str:
    """Unrounded, one line an arm and attack."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "role", "attack", "eps", "right", "of", "accuracy", "low", "high", "training_seconds"])
    for arm in arms:
        seconds = arm.training["seconds"] if arm.training else ""
        for name, row in arm.attacks.items():
            eps = 0 if name == "clean" else arm.evaluation["eps"]
            numbers = [row[key] for key in ("right", "of", "accuracy", "low", "high")]
            writer.writerow([arm.name, role(arm.name), name, eps, *numbers, seconds])
    return out.getvalue()


def to_markdown(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "".join(f"| {' | '.join(_markdown_cell(cell) for cell in line)} |\n" for line in lines)


def to_text(table: Table) -> str:
    """Aligned columns, for a terminal or a log."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def _markdown_cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _terms(training: Mapping[str, Any]) -> list[str]:
    """Loss terms of the last epoch with their weights; a term of weight 0 may be computed, but trains nothing."""
    wanted, last = training["identity"]["training"], training["last_epoch"]
    attacked = wanted.get("attack", {}).get("method") != "none"
    weights = (
        wanted["clean_weight"],
        wanted["adversarial_weight"] if attacked else 0,
        wanted.get("masking", {}).get("weight", 0),
        wanted.get("sensitivity", {}).get("weight", 0),
    )
    pairs = zip(LOSS_TERMS, weights, strict=True)
    return [f"{last[term]:.4f} × {weight:g}" if weight else MISSING for term, weight in pairs]
