"""The bound of each image's smallest distortion, in its grades, for all pixels and split into flagged and others."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.config import Config, EvaluationConfig
from hpcguard.data import ImageSet
from hpcguard.evaluation.case import Case, Measured, spread
from hpcguard.evaluation.flags import explained
from hpcguard.evaluation.subject import Subject
from hpcguard.metrics.bound import Distortion, assert_sound, certified, constant_shares, estimated, measured, summarise
from hpcguard.metrics.bound.certified import check_certifiable
from hpcguard.metrics.bound.grades import Grade, Group
from hpcguard.metrics.vulnerability import pixels_of
from hpcguard.models import load_model
from hpcguard.refinement.spurious import flag_segments
from hpcguard.store import ImageTable


def measure_bound(case: Case) -> Measured:
    """Columns GRADE/GROUP, float64 [B]: 0 for images that are wrong; of flagged and unflagged pixels NaN for images
    that have none. constant_share: see `constant_shares`.

    Raises UnsoundBoundError if a certified distortion lies above a measured one.
    """
    answered, which = case.answered()
    wanted = case.config.evaluation.bound
    flagged = _flagged(answered) if wanted.split and which.any() else None
    columns: dict[str, np.ndarray] = {}
    for group in groups(case.config.evaluation):
        for name, values in _distances(answered, flagged, group).items():
            columns |= spread(which, {f"{name}/{group}": values}, fill=0.0)
    if wanted.certified and wanted.split:  # of the bound for all pixels
        shares = columns.pop("share/all")
        columns["constant_share"] = np.where(which, shares, np.nan)
    return Measured({name: column for name, column in columns.items() if not name.startswith("share/")})


def _distances(case: Case, flagged: Tensor | None, group: Group) -> dict[str, np.ndarray]:
    """Of each grade a distance an image, and the flagged share of the constant."""
    config = case.config.evaluation
    wanted = config.bound
    rows = _with_pixels(case.x, flagged, group)
    some, own = rows.to(case.x.device), None if flagged is None else flagged[rows]
    found: dict[str, np.ndarray] = {}
    if rows.any():
        x, y = case.x[some], case.y[some]
        reached = measured(case.model, x, y, config.norm, own, group, wanted.steps, seed=config.seed)
        found["measured"] = reached.values
        found["estimated"] = estimated(case.model, x, y, config.norm, own, group, seed=config.seed).values
        case.report()
        if wanted.certified:
            proven = certified(case.model, x, y, config.norm, own, group, wanted.evaluations)
            assert_sound(proven, reached, case.ids[rows.numpy()])
            found |= {"certified": proven.values, "share": constant_shares(proven)}
            case.report()
    names = ("measured", "estimated", *(("certified", "share") if wanted.certified else ()))
    return spread(rows.numpy(), {name: found.get(name, np.zeros(0)) for name in names})


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
    """Of each group medians over the right images, the same in every grade (None: infinite), and the figures of
    `summarise`; gain: median of certified over the plain bound's. The grades are never mixed."""
    out: dict[str, Any] = {"norm": config.norm, "images": len(table)}
    for group in groups(config):
        found = table.columns[f"measured/{group}"]
        used = ~np.isnan(found)
        right = used & (found > 0)
        figures: dict[str, float] = {"images": float(used.sum()), "right": float(right.sum())}
        if right.any():
            figures["estimated_median"] = float(np.median(table.columns[f"estimated/{group}"][right]))
            figures["measured_median"] = float(np.median(found[right]))
        if config.bound.certified and used.any():
            grades = {grade: _graded(table, config, grade, group, used) for grade in ("certified", "measured")}
            figures |= summarise(grades["certified"], grades["measured"], table.image_id[used])
            if right.any() and group != "all":
                gain = table.columns[f"certified/{group}"][right] / table.columns["certified/all"][right]
                figures["gain"] = float(np.median(gain))
        out[group] = {name: value if np.isfinite(value) else None for name, value in figures.items()}
    shares = table.columns.get("constant_share")
    if shares is not None and not np.isnan(shares).all():
        out["flagged_constant_share"] = float(np.nanmedian(shares))
    return out


def _graded(table: ImageTable, config: EvaluationConfig, grade: Grade, group: Group, used: np.ndarray) -> Distortion:
    return Distortion(grade, config.norm, group, table.columns[f"{grade}/{group}"][used])


def check_bounded(config: Config, test: ImageSet, subject: Subject) -> None:
    """InputError, before anything is measured, for a model or images that have no certified bound."""
    model = load_model(config.model, len(test.classes), test.shape[0], subject.weights, torch.device("cpu"))
    check_certifiable(model, test.shape)
