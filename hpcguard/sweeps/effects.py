"""Main effects: what one axis does, averaged over all others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcguard.sweeps.grid import same
from hpcguard.sweeps.means import Estimate, key_of
from hpcguard.sweeps.table import Row

NAME = "name"  # of explicit cells
Factor = tuple[str, ...]
"""Axes that always change together, which no result can tell apart; mostly one."""


@dataclass(frozen=True)
class Level:
    """One value of a factor."""

    values: tuple[Any, ...]
    cells: int  # that the mean is of
    mean: Estimate  # over seeds, each the mean over the cells
    gain: Estimate  # over seeds, each the mean difference from the reference level in cells that are alike otherwise


@dataclass(frozen=True)
class Effect:
    """What a factor does to a measure. Balanced: every level's mean is over the same other axes and seeds."""

    factor: Factor
    measure: str
    levels: list[Level]
    reference: int  # among the levels
    balanced: bool


def factors(table: Sequence[Row], axes: Sequence[str]) -> list[Factor]:
    """Axes that vary. What another axis determines is no factor of its own; those that determine each other are one."""
    varied = [name for name in axes if len({key_of(row, [name]) for row in table}) > 1]
    by_axis = {name: [key_of(row, [name]) for row in table] for name in varied}
    finer = {
        (one, other)
        for one in varied
        for other in varied
        if one != other and len(set(zip(by_axis[one], by_axis[other], strict=True))) == len(set(by_axis[one]))
    }  # one determines other
    found: list[Factor] = []
    for name in varied:
        above = [other for other in varied if (other, name) in finer]
        if all((name, other) in finer for other in above):
            factor = tuple(each for each in varied if each == name or each in above)
            if factor not in found:
                found.append(factor)
    return found


def main_effects(
    table: Sequence[Row], axes: Sequence[str], measures: Sequence[str], control: Mapping[str, Any]
) -> list[Effect]:
    """Of every factor on every measure. The reference level is the control's, else the first.

    Cells with a name of their own are left out where others have none: they stand outside the grid.
    """
    table = [row for row in table if row.get(NAME) is None] or table
    found = factors(table, axes)
    effects = []
    for factor in found:
        others = [name for other in found if other != factor for name in other]
        for measure in measures:
            measured = [row for row in table if row.get(measure) is not None]
            if effect := _effect(measured, factor, others, measure, control):
                effects.append(effect)
    return effects


Context = tuple[Any, str]
"""A seed and the values of all other factors."""


def _effect(
    table: Sequence[Row], factor: Factor, others: Sequence[str], measure: str, control: Mapping[str, Any]
) -> Effect | None:
    """None with fewer than two levels measured."""
    first: dict[str, Row] = {}
    at: dict[str, dict[Context, float]] = {}
    for row in table:
        level = key_of(row, factor)
        first.setdefault(level, row)
        at.setdefault(level, {})[row["seed"], key_of(row, others)] = row[measure]
    if len(at) < 2:
        return None
    common = set.intersection(*(set(cells) for cells in at.values()))
    chosen = next((level for level, row in first.items() if _is_control(row, factor, control)), next(iter(at)))
    levels = []
    for level, cells in at.items():
        used = {context: value for context, value in cells.items() if not common or context in common}
        base = at[chosen]
        gained = {context: value - base[context] for context, value in cells.items() if context in base}
        levels.append(
            Level(
                tuple(first[level].get(name) for name in factor), len(used), _over_seeds(used),
                Estimate(()) if level == chosen else _over_seeds(gained),
            )
        )  # fmt: skip
    return Effect(factor, measure, levels, list(at).index(chosen), bool(common))


def _is_control(row: Row, factor: Factor, control: Mapping[str, Any]) -> bool:
    named = [name for name in factor if name in control]
    return bool(named) and all(same(row.get(name), control[name]) for name in named)


def _over_seeds(cells: Mapping[Context, float]) -> Estimate:
    """Cells of one seed share its luck, so their mean is one value."""
    by_seed: dict[Any, list[float]] = {}
    for (seed, _), value in cells.items():
        by_seed.setdefault(seed, []).append(value)
    return Estimate(tuple(sum(values) / len(values) for values in by_seed.values()))
