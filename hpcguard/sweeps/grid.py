"""Axes to cells."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hpcguard.config.sweep import SweepConfig, check_plain
from hpcguard.errors import InputError
from hpcguard.sweeps.axes import (
    MOST,
    Option,
    check_key,
    check_once,
    joined,
    label,
    leaves,
    options_of,
    ranged,
    shown,
    zipped,
)

Group = list[Option]  # an axis, or several that move together


@dataclass(frozen=True)
class Cell:
    """One point of a sweep: what it changes in the base."""

    values: dict[str, Any]  # by axis: its value, or its label
    changes: dict[str, Any]  # by dotted key, the seed's included
    seed: int | None

    @property
    def name(self) -> str:
        return name_of(self.values, self.seed)


def name_of(values: Mapping[str, Any], seed: int | None) -> str:
    named = {**values, **({} if seed is None else {"seed": seed})}
    return ", ".join(f"{key}={shown(value)}" for key, value in named.items()) or "the base"


def expand(sweep: SweepConfig) -> list[Cell]:
    """All cells, in the order of axes, zipped groups and explicit cells, and of the seeds within each.

    Raises InputError for axes that cannot be read, that set one key twice, or that leave no cell.
    """
    groups = [options_of(name, given, f"axes.{name}") for name, given in sweep.axes.items()]
    groups += [zipped(group, f"zip[{place}]") for place, group in enumerate(sweep.zip)]
    seeds = _seeds(sweep)
    _check_apart(groups, sweep.seed_keys if seeds else [])
    count = ((math.prod(map(len, groups)) if groups else 0) + len(sweep.cells)) * max(1, len(seeds))
    if count > MOST:
        raise InputError(f"axes: {count:,} cells are more than {MOST:,}; make several sweeps of them")
    points = [joined(options) for options in itertools.product(*groups)] if groups else []
    points = _without(points, sweep.exclude)
    explicit = [_explicit(cell, groups, f"cells[{place}]") for place, cell in enumerate(sweep.cells)]
    for place, cell in enumerate(explicit if seeds else []):
        _check_no_overlap(cell.changes, sweep.seed_keys, f"cells[{place}]", "seeds")
    points += explicit
    if not points:
        raise InputError("no cell is left: write axes or cells, and exclude fewer of them")
    cells = [
        Cell(point.values, {**point.changes, **({} if seed is None else dict.fromkeys(sweep.seed_keys, seed))}, seed)
        for point in points
        for seed in (seeds or [None])
    ]
    _check_distinct(cells)
    return cells


def same(held: Any, asked: Any) -> bool:
    """Whether a cell's value is what a person wrote for it; labels may have been read as truth values."""
    return bool(held == asked or (isinstance(held, str) and held == label(asked)))


def _seeds(sweep: SweepConfig) -> list[Any]:
    if isinstance(sweep.seeds, list):
        seeds: list[Any] = list(sweep.seeds)
    else:
        seeds = ranged(sweep.seeds, "seeds")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise InputError(f"seeds: {seed!r} is no seed; write whole numbers from 0 to {2**32 - 1}, as in [0, 1, 2]")
    check_once(seeds, "seeds")
    return seeds


def _check_apart(groups: list[Group], seed_keys: list[str]) -> None:
    """InputError where two axes have one name or set one key, for then their order would decide."""
    owners = [({key for option in group for key in option.changes}, ", ".join(group[0].values)) for group in groups]
    for key in seed_keys:
        check_key(key, "seed_keys")
    owners += [(set(seed_keys), "seeds")] if seed_keys else []
    check_once([name for group in groups for name in group[0].values], "axes and zip")
    for (one, first), (other, second) in itertools.combinations(owners, 2):
        _check_no_overlap(one, other, first, second)


def _check_no_overlap(one: Iterable[str], other: Iterable[str], first: str, second: str) -> None:
    for key, against in itertools.product(one, other):
        if key == against or key.startswith(f"{against}.") or against.startswith(f"{key}."):
            raise InputError(f"{key} is set by {first} and by {second}; let one of them set it")


def _without(points: list[Option], excluded: list[dict[str, Any]]) -> list[Option]:
    known = {name for point in points for name in point.values}
    for place, pattern in enumerate(excluded):
        if unknown := sorted(pattern.keys() - known):
            raise InputError(f"exclude[{place}]: {unknown[0]} is none of the axes {', '.join(sorted(known))}")
        kept = [point for point in points if not matches(point.values, pattern)]
        if not pattern or len(kept) == len(points):
            raise InputError(f"exclude[{place}] = {pattern}: fits no cell; write axes and values as they are above")
        points = kept
    return points


def matches(values: Mapping[str, Any], pattern: Mapping[str, Any]) -> bool:
    """Whether a cell has all values that a pattern names; null is what a cell has that does not name an axis."""
    return all(same(values.get(name), value) for name, value in pattern.items())


def _explicit(given: Mapping[str, Any], groups: list[Group], where: str) -> Option:
    values: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        options = [option for group in groups for option in group if name in option.values]
        labelled = options and all(name not in option.changes for option in options)
        if name == "name":
            check_plain(value, f"{where}.name")
            values[name] = value
        elif labelled and (fitting := [option for option in options if same(option.values[name], value)]):
            values[name] = fitting[0].values[name]
            changes |= fitting[0].changes
        elif labelled:
            labels = ", ".join(dict.fromkeys(shown(option.values[name]) for option in options))
            raise InputError(f"{where}.{name} = {value}: one of {labels}")
        else:
            values[name] = value
            changes |= leaves(name, value, where)
    return Option(values, changes)


def _check_distinct(cells: list[Cell]) -> None:
    seen: set[str] = set()
    for cell in cells:
        key = json.dumps([cell.values, cell.seed], sort_keys=True)
        if key in seen:
            raise InputError(f"the cell {cell.name} is there twice; write it once, or give each a name")
        seen.add(key)
