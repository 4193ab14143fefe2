"""The bound of each image's smallest distortion, in its grades, for all pixels and split into flagged and others."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.config import EvaluationConfig
from hpcguard.evaluation.case import Case, Measured
from hpcguard.evaluation.flags import explained
from hpcguard.metrics.bound import Distortion, assert_sound, certified, estimated, measured, summarise
from hpcguard.metrics.bound.grades import Grade, Group
from hpcguard.metrics.vulnerability import pixels_of
from hpcguard.refinement.spurious import flag_segments
from hpcguard.store import ImageTable


def measure_bound(case: Case) -> Measured:
    """Columns GRADE/GROUP, float64 [B]; of flagged and unflagged pixels NaN for images that have none.

    Raises UnsoundBoundError if a certified distortion lies above a measured one.
    """
    config = case.config.evaluation
    wanted = config.bound
    flagged = _flagged(case) if wanted.split else None
    columns: dict[str, np.ndarray] = {}
    for group in groups(config):
        rows = _with_pixels(case.x, flagged, group)
        some = rows.to(case.x.device)
        x, y = case.x[some], case.y[some]
        own = None if flagged is None else flagged[rows]
        found = measured(case.model, x, y, config.norm, own, group, wanted.steps, seed=config.seed)
        grades = {
            "estimated": estimated(case.model, x, y, config.norm, own, group, seed=config.seed),
            "measured": found,
        }
        case.report()
        if wanted.certified:
            grades["certified"] = certified(case.model, x, y, config.norm, own, group, wanted.evaluations)
            assert_sound(grades["certified"], found, case.ids[rows.numpy()])
            case.report()
        for name, distortion in grades.items():
            columns[f"{name}/{group}"] = np.full(len(case.ids), np.nan)
            columns[f"{name}/{group}"][rows.numpy()] = distortion.values
    return Measured(columns)


def groups(config: EvaluationConfig) -> tuple[Group, ...]:
    return ("all", "flagged", "unflagged") if config.bound.split else ("all",)


def _flagged(case: Case) -> Tensor:
    """Pixels of the segments that the model's own explanations flag, bool [B, 1, H, W]."""
    rows = explained(case.config, case.model, case.x, case.y, case.ids)
    flags = flag_segments(rows, case.config.evaluation.spurious, case.config.evaluation.seed)
    return torch.from_numpy(pixels_of(rows["segments"], flags))[:, None]


def _with_pixels(x: Tensor, flagged: Tensor | None, group: Group) -> Tensor:
    if group == "all" or flagged is None:
        return torch.ones(len(x), dtype=torch.bool)
    return (flagged if group == "flagged" else ~flagged).flatten(1).any(1)


def summarise_bound(table: ImageTable, config: EvaluationConfig) -> dict[str, Any]:
    """Of each group the figures of `summarise`, and the estimated median; the grades are never mixed."""
    out: dict[str, Any] = {"norm": config.norm, "images": len(table)}
    for group in groups(config):
        found = table.columns[f"measured/{group}"]
        used = ~np.isnan(found)
        right = used & (found > 0)
        figures: dict[str, float] = {"images": float(used.sum()), "right": float(right.sum())}
        if right.any():
            guess = table.columns[f"estimated/{group}"][right]
            figures |= {"estimated_median": float(np.median(guess)), "measured_median": _median(found[right])}
        if config.bound.certified and used.any():
            grades = {grade: _graded(table, config, grade, group, used) for grade in ("certified", "measured")}
            figures |= summarise(grades["certified"], grades["measured"], table.image_id[used])
        out[group] = figures
    return out


def _graded(table: ImageTable, config: EvaluationConfig, grade: Grade, group: Group, used: np.ndarray) -> Distortion:
    return Distortion(grade, config.norm, group, table.columns[f"{grade}/{group}"][used])


def _median(values: np.ndarray) -> float:
    """Over those that an attack broke; what it did not is none."""
    return float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else 0.0
