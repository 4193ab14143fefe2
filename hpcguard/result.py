"""What the result of a model says: accuracies from outcomes, and how they were come by."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from hpcguard.config import Config
from hpcguard.measure import Subject, pgd_names
from hpcguard.metrics.accuracy import wilson_interval
from hpcguard.runs import RunFolder, code_revision, digest_file
from hpcguard.store import Outcomes


def describe_result(
    config: Config, folder: RunFolder, subject: Subject, outcomes: Outcomes, explained: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of ARM.json; the outcomes are published already."""
    machines = list(outcomes.machines)
    rows = {
        name: {**accuracy(right), "seconds": outcomes.seconds[name]} for name, right in outcomes.right.items()
    }  # fmt: skip
    return {
        "arm": subject.arm,
        "weights": os.path.relpath(subject.weights, folder.path),
        "identity": subject.identity,
        "images": len(outcomes),
        "split": "test",
        "attacks": rows,
        "worst": accuracy(np.logical_and.reduce(list(outcomes.right.values()))),
        "curve": curve(outcomes, config) if config.evaluation.curve else None,
        "explanation_jaccard5": explained["jaccard5"] if explained else None,
        "seconds": round(sum(outcomes.seconds.values()) + (explained["seconds"] if explained else 0), 1),
        "config": {
            "data": config.data.identity(), "model": config.model.identity(),
            "evaluation": config.evaluation.model_dump(mode="json"), "attribution": config.attribution.identity(),
        },
        "seeds": {
            "attacks": config.evaluation.seed, "images": config.data.seed, "explanations": config.attribution.seed,
        },
        "hardware": {**machines[0], **({"others": machines[1:]} if machines[1:] else {})},
        "outcomes_sha256": digest_file(folder.outcomes(subject.arm)),
        "revision": code_revision(),
    }  # fmt: skip


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """A share of images, bool [N], with Wilson's 95% interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    share = float(right.sum()) / len(right)
    return {"right": int(right.sum()), "of": len(right), "accuracy": share, "low": low, "high": high}


def curve(outcomes: Outcomes, config: Config) -> dict[str, Any]:
    """Accuracy under PGD by radius, 0 first."""
    falls = outcomes.falls_at[~np.isnan(outcomes.falls_at)]
    radii = [0.0, *config.evaluation.curve]
    rows = [accuracy(falls > radius) for radius in radii]
    columns = {key: [row[key] for row in rows] for key in ("right", "accuracy", "low", "high")}
    return {
        "attack": pgd_names(config.evaluation)[-1], "norm": config.evaluation.norm, "of": len(falls), "radii": radii,
        "seconds": outcomes.seconds["curve"], **columns,
    }  # fmt: skip
