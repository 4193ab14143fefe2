"""What the result of a model says: figures of its tables, and how they were come by."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcguard.config import Config
from hpcguard.evaluation.attacks import pgd_names
from hpcguard.evaluation.bound import summarise_bound
from hpcguard.evaluation.subject import Kind, Subject
from hpcguard.evaluation.vulnerability import summarise_claim
from hpcguard.metrics.accuracy import wilson_interval
from hpcguard.metrics.corruption import summarise_corruptions
from hpcguard.metrics.resampling import summarise_figures
from hpcguard.runs import RunFolder, code_revision, digest_file
from hpcguard.store import ImageTable, Outcomes, outcomes_of

Notes = Mapping[Kind, Mapping[str, Any]]
Tables = Mapping[Kind, ImageTable]


def describe_result(
    config: Config, folder: RunFolder, subject: Subject, tables: Tables, notes: Notes
) -> dict[str, Any]:
    """The content of ARM.json; the tables are published already."""
    attacks = tables["attacks"]
    outcomes = outcomes_of(attacks)
    alarms, explained = notes["alarms"]["rows"], notes.get("explanations")
    files: dict[str, str] = {kind: digest_file(folder.figures(subject.arm, kind)) for kind in tables}
    return {
        "arm": subject.arm,
        "weights": os.path.relpath(subject.weights, folder.path),
        "trusted": not any(row["red"] for row in alarms),
        "identity": subject.identity,
        "images": len(outcomes),
        "split": config.evaluation.split,
        "attacks": {
            name: {**accuracy(right), "seconds": attacks.seconds[name]} for name, right in outcomes.right.items()
        },
        "worst": accuracy(np.logical_and.reduce(list(outcomes.right.values()))),
        "curve": curve(tables["curve"], config) if "curve" in tables else None,
        "alarms": alarms,
        **_summaries(config, subject, tables, outcomes),
        "explanation_jaccard5": explained["jaccard5"] if explained else None,
        "seconds": round(sum(_seconds(tables, notes).values()), 1),
        "seconds_by_kind": _seconds(tables, notes),
        "config": {
            "data": config.data.identity(), "model": config.model.identity(),
            "evaluation": config.evaluation.model_dump(mode="json"), "attribution": config.attribution.identity(),
        },
        "seeds": {
            "attacks": config.evaluation.seed, "images": config.data.seed, "explanations": config.attribution.seed,
        },
        "hardware": _hardware(tables, notes),
        "outcomes_sha256": files.pop("attacks"),
        "tables_sha256": files,
        "revision": code_revision(),
    }  # fmt: skip


def _summaries(config: Config, subject: Subject, tables: Tables, outcomes: Outcomes) -> dict[str, Any]:
    """Of corruptions, explanations, the claim and bounds; None of what was not asked for."""
    wanted, out = config.evaluation, dict[str, Any]()
    corrupted = tables.get("corruptions")
    if corrupted is not None:
        right = np.moveaxis(corrupted.columns["right"], 0, 2)
        clean = outcomes.right["clean"][: len(corrupted)]
        summary = summarise_corruptions(wanted.corruptions.names, right, clean, wanted.seed)
        out["corruptions"] = {"name": subject.identity["corrupted"]["name"], **summary}
    if "quality" in tables:
        out["explanations"] = summarise_figures(tables["quality"].columns, wanted.seed)
    if "vulnerability" in tables:
        rows = summarise_claim(tables["vulnerability"], wanted)
        out["vulnerability"] = {"images": len(tables["vulnerability"]), "rows": rows}
    if "bound" in tables:
        out["bound"] = summarise_bound(tables["bound"], wanted)
    return {name: out.get(name) for name in ("corruptions", "explanations", "vulnerability", "bound")}


def _seconds(tables: Tables, notes: Notes) -> dict[str, float]:
    found = {kind: sum(table.seconds.values()) for kind, table in tables.items()}
    found |= {kind: note["seconds"] for kind, note in notes.items()}
    return {kind: round(seconds, 1) for kind, seconds in found.items()}


def _hardware(tables: Tables, notes: Notes) -> dict[str, Any]:
    """The machine that measured it; others too, if there were several."""
    used = [dict(each) for table in tables.values() for each in table.machines]
    used += [dict(note["machine"]) for note in notes.values()]
    machines = [each for place, each in enumerate(used) if each not in used[:place]]
    return {**machines[0], **({"others": machines[1:]} if machines[1:] else {})}


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """A share of images, bool [N], with Wilson's 95% interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    share = float(right.sum()) / len(right)
    return {"right": int(right.sum()), "of": len(right), "accuracy": share, "low": low, "high": high}


def curve(table: ImageTable, config: Config) -> dict[str, Any]:
    """Accuracy under PGD by radius, 0 first."""
    radii = [0.0, *config.evaluation.curve]
    rows = [accuracy(table.columns["falls_at"] > radius) for radius in radii]
    columns = {key: [row[key] for row in rows] for key in ("right", "accuracy", "low", "high")}
    return {
        "attack": pgd_names(config.evaluation)[-1], "norm": config.evaluation.norm, "of": len(table), "radii": radii,
        "seconds": sum(table.seconds.values()), **columns,
    }  # fmt: skip
