"""Pictures of a sweep: figures with captions, words for those who cannot see them, and their numbers as CSV."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.pictures import Picture
from hpcguard.reporting.sweep_plots import Point, effects_figure, forest_figure, trade_off_figure
from hpcguard.reporting.sweep_tables import factor_name, level_name, short_names, signed_points, value_text
from hpcguard.reporting.tables import rows_csv
from hpcguard.sweeps.effects import Effect
from hpcguard.sweeps.grid import matches
from hpcguard.sweeps.means import Estimate, Line

NAMES = ("trade_off.png", "effects.png", "differences.png")
FEW = 12  # settings that are all numbered
MOST_LINES = 60
ESTIMATE = ("mean", "half", "lowest", "highest")


def numbered(lines: Sequence[Line], front: Sequence[bool], control: Mapping[str, Any]) -> list[int | None]:
    """Numbers for the settings that a picture and the table beside it name: few, or the front and the control."""
    wanted = [each or len(lines) <= FEW or is_control(line, control) for line, each in zip(lines, front, strict=True)]
    return [sum(wanted[: place + 1]) if each else None for place, each in enumerate(wanted)]


def is_control(line: Line, control: Mapping[str, Any]) -> bool:
    return bool(control) and matches(line.values, control)


def trade_off_picture(
    lines: Sequence[Line], front: Sequence[bool], clean: str, robust: str, control: Mapping[str, Any]
) -> Picture:
    """Lines: settings that are measured under both."""
    numbers = numbered(lines, front, control)
    points = [
        Point(number, line.estimates[clean], line.estimates[robust], ahead, is_control(line, control))
        for line, ahead, number in zip(lines, front, numbers, strict=True)
    ]  # fmt: skip
    best = [
        f"{name_of_line(line)} {_percent(line.estimates[clean])} clean, {_percent(line.estimates[robust])} robust"
        for line, ahead in zip(lines, front, strict=True)
        if ahead
    ]
    rows = [
        {**_texts(line), "seeds": line.count, **_numbers(line.estimates[clean], "clean_"),
         **_numbers(line.estimates[robust], "robust_"), "on_front": int(ahead)}
        for line, ahead in zip(lines, front, strict=True)
    ]  # fmt: skip
    columns = [*lines[0].values, "seeds", *(f"{kind}_{name}" for kind in ("clean", "robust") for name in ESTIMATE)]
    alt = f"Clean accuracy against accuracy under {attack_title(robust)}; on the Pareto front: {'; '.join(best)}"
    caption = "Means over seeds; bars reach from the lowest to the highest seed. The line is the Pareto front."
    text = rows_csv([*columns, "on_front"], rows)
    return Picture(NAMES[0], trade_off_figure(points, robust), alt, text, caption)


def effects_picture(effects: Sequence[Effect], measures: Sequence[str]) -> Picture:
    rows = [
        {
            "axis": factor_name(effect.factor), "level": level_name(effect.factor, level.values),
            "measure": effect.measure, "reference": int(place == effect.reference), "balanced": int(effect.balanced),
            "cells": level.cells, "seeds": level.mean.count, **_numbers(level.mean, ""),
            **_numbers(level.gain, "difference_"),
        }
        for effect in effects
        for place, level in enumerate(effect.levels)
    ]  # fmt: skip
    columns = ["axis", "level", "measure", "reference", "balanced", "cells", "seeds", *ESTIMATE]
    columns += [f"difference_{name}" for name in ESTIMATE]
    said = [
        f"{factor_name(effect.factor)}, {attack_title(effect.measure)}: "
        + ", ".join(f"{level_name(effect.factor, level.values)} {_percent(level.mean)}" for level in effect.levels)
        for effect in effects
    ]
    caption = "Means over all other axes, with 95% intervals over seeds; one scale along each row."
    figure = effects_figure(effects, measures)
    return Picture(NAMES[1], figure, f"Main effects. {'; '.join(said)}", rows_csv(columns, rows), caption)


def forest_picture(lines: Sequence[Line], measures: Sequence[str]) -> Picture | None:
    """Of many settings, those with the highest difference under the last measure; None if no pair is measured."""
    known = [line for line in lines if any(line.estimates[name].count for name in measures)]
    if not known:
        return None
    drawn = known
    if len(known) > MOST_LINES:
        ranked = sorted(known, key=lambda line: _mean(line.estimates[measures[-1]]), reverse=True)[:MOST_LINES]
        drawn = [line for line in known if line in ranked]
    rows = [
        {**_texts(line), "measure": name, "pairs": line.estimates[name].count, **_numbers(line.estimates[name], "")}
        for line in lines
        for name in measures
    ]
    caption = "Differences from the control with the same seed, in points, with 95% intervals."
    if len(drawn) < len(known):
        caption += (
            f" The {len(drawn)} of {len(known)} settings with the highest one under {attack_title(measures[-1])}."
        )
    names = [name_of_line(line) for line in drawn]
    said = [
        f"{name} " + ", ".join(f"{attack_title(each)} {_points(line.estimates[each])}" for each in measures)
        for name, line in zip(names, drawn, strict=True)
    ]
    figure = forest_figure(names, {name: [line.estimates[name] for line in drawn] for name in measures})
    text = rows_csv([*lines[0].values, "measure", "pairs", *ESTIMATE], rows)
    return Picture(NAMES[2], figure, f"Differences from the control: {'; '.join(said)}", text, caption)


def name_of_line(line: Line) -> str:
    """A setting in one line; what it does not have is left out."""
    short = short_names(list(line.values))
    told = [f"{short[name]}={value_text(value)}" for name, value in line.values.items() if value is not None]
    return ", ".join(told) or "the base"


def _texts(line: Line) -> dict[str, str]:
    return {name: "" if value is None else value_text(value) for name, value in line.values.items()}


def _numbers(estimate: Estimate, prefix: str) -> dict[str, float | None]:
    if not estimate.count:
        return {}
    found = (estimate.mean, estimate.half, min(estimate.values), max(estimate.values))
    return {prefix + name: None if math.isnan(value) else value for name, value in zip(ESTIMATE, found, strict=True)}


def _mean(estimate: Estimate) -> float:
    return estimate.mean if estimate.count else -math.inf


def _percent(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%}" if estimate.count else "not measured"


def _points(estimate: Estimate) -> str:
    if not estimate.count:
        return "not measured"
    return signed_points(estimate.mean) + ("" if math.isnan(estimate.half) else f" ± {100 * estimate.half:.1f}")
