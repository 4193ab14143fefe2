"""Figures of a sweep as PNG bytes. Colours that the colour-blind tell apart; markers say it once more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hpcguard.reporting.arms import attack_title
from hpcguard.reporting.plots import CONTROLS, FAINT, GUIDED, INK, plain, png
from hpcguard.reporting.sweep_tables import factor_name, level_name
from hpcguard.sweeps.effects import Effect
from hpcguard.sweeps.means import Estimate

CONTROL = CONTROLS[0]
REST = ("#8a8a8a", "o")
ACROSS = 4  # panels of effects
STYLES = (CONTROLS[1], GUIDED)  # clean, robust


@dataclass(frozen=True)
class Point:
    """A setting's clean and robust accuracy over seeds."""

    number: int | None  # as it is called in the table beside
    clean: Estimate
    robust: Estimate
    on_front: bool
    is_control: bool


def trade_off_figure(points: Sequence[Point], robust: str) -> bytes:
    """Clean against robust accuracy; bars from the lowest to the highest seed; the Pareto front as a line."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    front = sorted((each.clean.mean, each.robust.mean) for each in points if each.on_front)
    if front:
        axes.step(*zip(*front, strict=True), where="pre", color=GUIDED[0], linewidth=1.2, zorder=1)
    for label, (colour, marker), chosen in (
        ("beaten by another", REST, [each for each in points if not each.on_front and not each.is_control]),
        ("Pareto front", GUIDED, [each for each in points if each.on_front and not each.is_control]),
        ("control", CONTROL, [each for each in points if each.is_control]),
    ):
        if chosen:
            _scatter(axes, chosen, label, colour, marker)
    for each in points:
        if each.number is not None:
            axes.annotate(
                str(each.number), (each.clean.mean, each.robust.mean), (5, 5), textcoords="offset points",
                fontsize=9, color=INK, fontweight="bold",
            )  # fmt: skip
    axes.set_xlabel("clean accuracy", color=INK)
    axes.set_ylabel(f"accuracy under {attack_title(robust)}", color=INK)
    plain(axes)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    axes.margins(0.06)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    return png(figure)


def _scatter(axes: Axes, points: Sequence[Point], label: str, colour: str, marker: str) -> None:
    crowded = len(points) > 40
    x, y = ([getattr(each, name).mean for each in points] for name in ("clean", "robust"))
    axes.errorbar(
        x, y, _spread([each.robust for each in points]), _spread([each.clean for each in points]), fmt=marker,
        color=colour, ecolor=to_rgba(colour, 0.3 if crowded else 1), elinewidth=0.5 if crowded else 0.9,
        markersize=4 if crowded else 6.5, label=label, zorder=2,
    )  # fmt: skip


def _spread(estimates: Sequence[Estimate]) -> np.ndarray:
    """From the mean to the lowest and to the highest seed."""
    ends = [(each.mean - min(each.values), max(each.values) - each.mean) for each in estimates]
    return np.maximum(0, np.array(ends)).T


def forest_figure(names: Sequence[str], gains: Mapping[str, Sequence[Estimate]]) -> bytes:
    """A line a setting, a panel a measure: paired differences from the control with 95% intervals."""
    small = len(names) > 25
    figure = Figure(figsize=(8.4, 1.1 + len(names) * (0.2 if small else 0.32)), layout="constrained")
    panels = figure.subplots(1, len(gains), sharey=True, squeeze=False)[0]
    y = np.arange(len(names))
    for axes, (measure, estimates), (colour, marker) in zip(panels, gains.items(), _styles(len(gains)), strict=True):
        axes.axvline(0, color=INK, linewidth=1)
        known = [place for place, each in enumerate(estimates) if each.count]
        middle = [estimates[place].mean for place in known]
        half = [estimates[place].half for place in known]  # nan draws nothing
        axes.errorbar(
            middle, y[known], xerr=half, fmt=marker, color=colour, markersize=4 if small else 6,
            capsize=2 if small else 3, linewidth=1.3,
        )  # fmt: skip
        plain(axes)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.grid(axis="y", color="#efefef", linewidth=0.5)
        axes.set_xlabel(f"{attack_title(measure)}, points", color=INK)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda gain, _: f"{100 * gain:+.3g}".replace("-", "−") if gain else "0")
        )
    panels[0].set_yticks(y, names, fontsize=7 if small else 9, parse_math=False)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return png(figure)


def effects_figure(effects: Sequence[Effect], measures: Sequence[str]) -> bytes:
    """A column a factor, a row a measure: means by level with 95% intervals, on one scale along a row."""
    factors = list(dict.fromkeys(effect.factor for effect in effects))
    by_place = {(effect.factor, effect.measure): effect for effect in effects}
    blocks, across = -(-len(factors) // ACROSS), min(ACROSS, len(factors))
    rows = blocks * len(measures)
    figure = Figure(figsize=(8.4, 2.4 * rows), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False)
    for row in range(rows):
        measure, (colour, marker) = measures[row % len(measures)], _styles(len(measures))[row % len(measures)]
        drawn = factors[row // len(measures) * ACROSS :][:across]
        found = [by_place.get((factor, measure)) for factor in drawn]
        limits = _limits([each for each in found if each])
        for column in range(across):
            effect = found[column] if column < len(found) else None
            if effect is None:
                grid[row, column].set_axis_off()
                continue
            _effect_panel(grid[row, column], effect, colour, marker)
            grid[row, column].set_ylim(*limits)
            if column:
                grid[row, column].set_yticklabels([])
            else:
                grid[row, column].set_ylabel(attack_title(measure), color=INK)
    return png(figure)


def _effect_panel(axes: Axes, effect: Effect, colour: str, marker: str) -> None:
    means, halves = _with_halves([level.mean for level in effect.levels])
    x = np.arange(len(means))
    axes.errorbar(
        x, means, halves, fmt=marker, linestyle="-" if effect.balanced else "", color=colour, markersize=6, capsize=3,
        linewidth=1.2,
    )  # fmt: skip
    names = [level_name(effect.factor, level.values) for level in effect.levels]
    crowded = sum(map(len, names)) > 18
    turned: Mapping[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    axes.set_xticks(x, names, fontsize=7 if len(names) > 12 else 8.5, parse_math=False, **turned)
    axes.set_xlim(-0.5, len(x) - 0.5)
    axes.set_title(factor_name(effect.factor), fontsize=9.5, color=INK, parse_math=False)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
    plain(axes)


def _limits(effects: Sequence[Effect]) -> tuple[float, float]:
    means, halves = _with_halves([level.mean for effect in effects for level in effect.levels])
    low, high = (np.array(means) - halves).min(), (np.array(means) + halves).max()
    margin = 0.08 * (high - low) or 0.01
    return float(low - margin), float(high + margin)


def _with_halves(estimates: Sequence[Estimate]) -> tuple[list[float], np.ndarray]:
    """Means, and half widths with 0 where there is no interval."""
    return [each.mean for each in estimates], np.nan_to_num([each.half for each in estimates])


def _styles(count: int) -> list[tuple[str, str]]:
    """Of clean and robust; robust alone keeps its own."""
    return list(STYLES[-count:])
