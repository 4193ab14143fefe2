"""Tables of a report, and their forms: CSV, Markdown, aligned text (HTML is the template's)."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """Accuracy of every arm under every attack and under all of them, and the time that it took to train."""
    worst = ["all attacks"] if all(arm.result.get("worst") for arm in arms) else []
    columns = ["arm", *(attack_title(name) for name in arms[0].attacks), *worst, "training time"]
    rows = [
        [
            arm.name + ("" if arm.trusted else " (not to be trusted)"),
            *(percent(row) for row in arm.attacks.values()),
            *(percent(arm.result["worst"]) for _ in worst),
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


def cost_table(arms: Sequence[Arm], store: Mapping[str, Any] | None) -> Table:
    """What the run took, by stage: GPU-hours where GPUs computed, else core-hours."""
    rows = []
    if store:
        seconds = store["worker_seconds"]
        rows.append(["attribution", "over all workers", duration(seconds), f"{seconds / 3600:.2f} worker-hours"])
    for arm in arms:
        if arm.training:
            processes, threads = arm.training["world_size"], arm.training.get("threads", 1)
            shape = f"{processes} × {threads} {'thread' if threads == 1 else 'threads'}"
            on_gpu = str(arm.training.get("device")).startswith("cuda")
            spent = _spent(arm.training["seconds"], processes, threads, on_gpu)
            rows.append([f"training {arm.name}", shape, duration(arm.training["seconds"]), spent])
    for arm in arms:
        seconds, hardware = arm.result["seconds"], arm.result["hardware"]
        spent = _spent(seconds, 1, hardware.get("threads", 1), hardware.get("gpu", False))
        rows.append([f"evaluation {arm.name}", "over all workers", duration(seconds), spent])
    return Table(["stage", "processes", "time", "cost"], rows)


def _spent(seconds: float, processes: int, threads: int, on_gpu: bool) -> str:
    hours = seconds * processes / 3600
    return f"{hours:.2f} GPU-hours" if on_gpu else f"{hours * threads:.2f} core-hours"


def rounds_table(rounds: Sequence[Mapping[str, Any]]) -> Table:
    """What each round of a closed loop gave, see loop.json."""

    def share(value: float | None) -> str:
        return MISSING if value is None else f"{value:.1%}"

    rows = [
        [
            str(each["number"]), share(each["spurious"]["flagged"]),
            MISSING if each["jaccard"] is None else f"{each['jaccard']:.3f}",
            share(each["validation_clean"]), share(each["validation_robust"]),
        ]
        for each in rounds
    ]  # fmt: skip
    return Table(["round", "flagged", "Jaccard with the one before", "validation clean", "validation PGD-10"], rows)


def results_csv(arms: Sequence[Arm]) -> str:
    """Unrounded, one line an arm and attack."""
    lines = []
    for arm in arms:
        seconds = arm.training["seconds"] if arm.training else ""
        for name, row in arm.attacks.items():
            eps = 0 if name == "clean" else arm.evaluation["eps"]
            lines.append({**row, "arm": arm.name, "role": role(arm.name), "attack": name, "eps": eps,
                          "training_seconds": seconds})  # fmt: skip
    columns = ["arm", "role", "attack", "eps", "right", "of", "accuracy", "low", "high", "training_seconds"]
    return rows_csv(columns, lines)


def training_csv(arms: Sequence[Arm]) -> str:
    """Every epoch of every arm."""
    lines = [{**entry, "arm": arm.name} for arm in arms for entry in arm.log]
    columns = ["arm", "epoch", "step", "loss", *LOSS_TERMS, "mask_share", "validation_clean", "validation_robust"]
    return rows_csv([*columns, "learning_rate", "seconds"], lines)


def explanation_csv(panels: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> str:
    """Of each (title, segments [H, W], coefficients [S]) every segment: its pixels and its coefficient."""
    lines = []
    for title, segments, coefficients in panels:
        pixels = np.bincount(segments.ravel().astype(np.int64), minlength=len(coefficients))
        known = np.flatnonzero(~np.isnan(coefficients))
        lines += [
            {"panel": title, "segment": segment, "pixels": pixels[segment], "coefficient": float(coefficients[segment])}
            for segment in known.tolist()
        ]
    return rows_csv(["panel", "segment", "pixels", "coefficient"], lines)


def rows_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV of these columns; what a row lacks, or is None, stays empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
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
