"""What the page of a sweep says, and its tables for a paper."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml
from markupsafe import Markup

from hpcguard.reporting.arms import attack_title, radius
from hpcguard.reporting.html import without_machine_paths
from hpcguard.reporting.pictures import Picture
from hpcguard.reporting.sweep_pictures import (
    effects_picture,
    forest_picture,
    is_control,
    name_of_line,
    numbered,
    trade_off_picture,
)
from hpcguard.reporting.sweep_tables import (
    Column,
    Sheet,
    as_table,
    cost_table,
    effects_sheet,
    explanations_sheet,
    gains_sheet,
    means_sheet,
    signed_points,
    value_text,
)
from hpcguard.reporting.tables import MISSING, to_text
from hpcguard.sweeps.analysis import Analysis
from hpcguard.sweeps.cost import CostLine
from hpcguard.sweeps.means import Estimate, Line, settings

MOST_SPOKEN = 40  # lines that a terminal shows without scrolling away what failed


def notes(analysis: Analysis) -> list[str]:
    """What a reader of any form must know."""
    total = len(analysis.table)
    told = [f"{analysis.measured} of {total} cells are measured."]
    if analysis.measured < total:
        states = Counter(row["state"] for row in analysis.table if row["state"] != "done")
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        told = [f"{analysis.measured} of {total} cells are measured; {counts}. They count for nothing here."]
    if analysis.measured and analysis.single:
        told.append("Every setting is measured with one seed, so nothing tells an effect from the luck of a training.")
    if doubtful := sum(bool(row.get("red_alarms")) for row in analysis.table):
        told.append(f"{doubtful} cells raise an alarm: their accuracy under attack is not to be trusted (red_alarms).")
    if left_out := sum(bool(row.get("left_out")) for row in analysis.table):
        told.append(f"{left_out} cells were trained without images that attribution could not explain (left_out).")
    return told


def sheets(analysis: Analysis) -> list[Sheet]:
    """The tables for a paper."""
    found = [means_sheet(analysis.lines, analysis.axes, analysis.measures, analysis.single)]
    if analysis.gains:
        pairless = all(line.count < 2 for line in analysis.gains)
        found.append(gains_sheet(analysis.gains, analysis.axes, analysis.measures, analysis.control, pairless))
    if analysis.effects:
        found.append(effects_sheet(analysis.effects, analysis.main))
    if analysis.qualities:
        found.append(explanations_sheet(analysis.lines, analysis.axes, analysis.qualities))
    return found


def spoken(analysis: Analysis) -> list[str]:
    """Means and notes for a terminal; of many settings only where they are."""
    if not analysis.measured:
        return notes(analysis)
    if len(analysis.lines) > MOST_SPOKEN:
        return [*notes(analysis), f"{len(analysis.lines)} settings: their means are in table.md"]
    plain = as_table(sheets(analysis)[0], str)
    what = "Accuracy in %" if analysis.single else "Accuracy in %, means over seeds ± 95% interval"
    return [f"{what}:", *to_text(plain).splitlines(), *notes(analysis)]


def pictures(analysis: Analysis) -> list[Picture]:
    """Those that there is anything to draw of."""
    found: list[Picture | None] = []
    if analysis.points and analysis.robust:
        clean, robust = analysis.main
        found.append(trade_off_picture(analysis.points, analysis.front, clean, robust, analysis.control))
    if analysis.gains:
        found.append(forest_picture(analysis.gains, analysis.main))
    if analysis.effects:
        found.append(effects_picture(analysis.effects, analysis.main))
    return [each for each in found if each]


def page_values(
    where: PurePath, analysis: Analysis, drawn: Sequence[Picture], cost: Sequence[CostLine],
    commands: Sequence[list[str]], sweep: Mapping[str, Any], alike: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """What sweep.html.j2 needs.

    where: the sweep's folder, as it is shown; commands: of each row of the table; sweep: as sweep.yaml has it.
    """
    told = notes(analysis)
    of = {sheet.name: (as_table(sheet, _bold, "−"), sheet.caption) for sheet in sheets(analysis)}
    return {
        "title": where.name,
        "subject": _subject(analysis, sweep, alike),
        "summary": summary(analysis),
        "cautions": told if analysis.measured < len(analysis.table) or len(told) > 1 else [],
        "pictures": {picture.name.partition(".")[0]: picture for picture in drawn},
        "robust": attack_title(analysis.robust) if analysis.robust else MISSING,
        "front": as_table(front_sheet(analysis), _bold) if analysis.points else None,
        "tables": of,
        "cost": cost_table(cost) if cost else None,
        "repeat": f"hpcguard sweep {shlex.quote(f'{where}/sweep.yaml')} {shlex.quote(f'run={where}-repeat')}",
        "settings": yaml.safe_dump(without_machine_paths(dict(sweep)), sort_keys=False) if sweep else "",
        "groups": _groups(analysis, commands),
    }


def front_sheet(analysis: Analysis) -> Sheet:
    """The numbered points of the picture of clean against robust accuracy."""
    numbers = numbered(analysis.points, analysis.front, analysis.control)
    lines = [
        (
            [str(number), name_of_line(line), _role(line, ahead, analysis.control)],
            [line.estimates[each] for each in analysis.main],
        )
        for line, ahead, number in zip(analysis.points, analysis.front, numbers, strict=True)
        if number is not None
    ]  # fmt: skip
    return Sheet(
        "front", "", ["no.", "setting", ""], [Column(attack_title(name), best=True) for name in analysis.main], lines
    )


def summary(analysis: Analysis) -> list[str]:
    """The result in sentences."""
    seeds = len({row["seed"] for row in analysis.table})
    said = [f"{len(analysis.lines)} settings, {seeds} seed{'s' if seeds > 1 else ''}."]
    if not analysis.points or not analysis.robust:
        return [*said, "Nothing is measured yet." if not analysis.measured else "No attack is measured."]
    best = max(analysis.points, key=lambda line: line.estimates[analysis.robust].mean)
    attack = attack_title(analysis.robust)
    clean, robust = (_share(best.estimates[name]) for name in analysis.main)
    said.append(f"Highest mean under {attack}: {name_of_line(best)}, {robust}; {clean} clean.")
    if analysis.control:
        gain = next((line for line in analysis.gains if line.values == best.values), None)
        said.append(_against_control(gain.estimates[analysis.robust] if gain else None))
    return said


def _against_control(gain: Estimate | None) -> str:
    if gain is None:
        return "That is the control itself."
    if not gain.count:
        return "No cell of the control with the same seed is measured."
    told = f"That is {signed_points(gain.mean)} points from the control".replace("-", "−")
    if gain.count == 1:
        return f"{told}, of one pair: whether by chance cannot be told."
    apart = "does not include" if abs(gain.mean) > gain.half else "includes"
    return f"{told}, ± {100 * gain.half:.1f} over {gain.count} pairs: the 95% interval {apart} 0."


def _share(estimate: Estimate) -> str:
    half = f" ± {100 * estimate.half:.1f}" if estimate.count > 1 else ""
    return f"{100 * estimate.mean:.1f}{half}%"


def _role(line: Line, ahead: bool, control: Mapping[str, Any]) -> str:
    return ", ".join(name for name, holds in (("Pareto front", ahead), ("control", is_control(line, control))) if holds)


def _subject(analysis: Analysis, sweep: Mapping[str, Any], alike: Mapping[str, Any]) -> str:
    config = sweep.get("config") or {}
    named = [(config.get(section) or {}).get("name") for section in ("model", "data")]
    what = f"{named[0]} on {named[1]}, " if all(named) else ""
    return f"{what}{len(analysis.table)} cells, eps {radius(alike['evaluation'])}"


def _groups(analysis: Analysis, commands: Sequence[list[str]]) -> list[dict[str, Any]]:
    """Cells with their commands, by setting."""
    by_row = {id(row): each for row, each in zip(analysis.table, commands, strict=True)}
    found = []
    for group, line in zip(settings(analysis.table, analysis.axes), analysis.lines, strict=True):
        counts = Counter(row["state"] for row in group)
        cells = [
            {"seed": value_text(row["seed"]), "state": row["state"], "figures": _figures(row, analysis.measures),
             "commands": by_row[id(row)]}
            for row in group
        ]  # fmt: skip
        states = ", ".join(f"{count} {state}" for state, count in counts.items())
        found.append({"name": name_of_line(line), "states": states, "cells": cells})
    return found


def _figures(row: Mapping[str, Any], measures: Sequence[str]) -> str:
    known = [name for name in measures if row.get(name) is not None]
    return ", ".join(f"{attack_title(name)} {row[name]:.1%}" for name in known)


def _bold(text: str) -> str:
    return Markup("<strong>{}</strong>").format(text)
