"""Means over seeds with 95% intervals, and paired differences from the control."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from hpcguard.sweeps.grid import matches
from hpcguard.sweeps.table import Row


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    values: tuple[float, ...]  # one a seed

    @property
    def count(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @cached_property
    def half(self) -> float:
        """Half the width of the 95% interval by Student's t; nan for a single value, which has none."""
        if self.count < 2:
            return math.nan
        squares = math.fsum((value - self.mean) ** 2 for value in self.values)
        return _quantile(self.count - 1) * math.sqrt(squares / (self.count - 1) / self.count)


@dataclass(frozen=True)
class Line:
    """The cells that differ in their seed alone: values by axis, and an estimate of each measure."""

    values: dict[str, Any]
    estimates: dict[str, Estimate]

    @property
    def count(self) -> int:
        """Seeds, or pairs, that there is anything of."""
        return max((each.count for each in self.estimates.values()), default=0)


@cache
def _quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def key_of(row: Mapping[str, Any], axes: Iterable[str]) -> str:
    """The values of some axes; equal for equal ones."""
    return json.dumps([row.get(name) for name in axes], sort_keys=True)


def settings(table: Sequence[Row], axes: Sequence[str]) -> list[list[Row]]:
    """Rows that differ in their seed alone, together, in the order of the table."""
    found: dict[str, list[Row]] = {}
    for row in table:
        found.setdefault(key_of(row, axes), []).append(row)
    return list(found.values())


def means(table: Sequence[Row], axes: Sequence[str], measures: Sequence[str]) -> list[Line]:
    """A line a setting; cells that are not measured count for nothing."""
    return [
        Line(
            {name: group[0].get(name) for name in axes},
            {name: Estimate(tuple(row[name] for row in group if row.get(name) is not None)) for name in measures},
        )
        for group in settings(table, axes)
    ]


def gains(table: Sequence[Row], axes: Sequence[str], measures: Sequence[str], control: Mapping[str, Any]) -> list[Line]:
    """A line a setting beside the control's: differences from the control with the same seed."""
    control_of = pairing(table, axes, control)
    lines = []
    for group in settings(table, axes):
        if not matches(group[0], control):
            pairs = [(row, control_of(row)) for row in group]
            estimates = {name: Estimate(tuple(differences(pairs, name))) for name in measures}
            lines.append(Line({name: group[0].get(name) for name in axes}, estimates))
    return lines


def differences(pairs: Iterable[tuple[Row, Row | None]], measure: str) -> Iterable[float]:
    """Of the pairs that are both measured."""
    for row, other in pairs:
        if other is not None and row.get(measure) is not None and other.get(measure) is not None:
            yield row[measure] - other[measure]


def pairing(table: Sequence[Row], axes: Sequence[str], control: Mapping[str, Any]) -> Callable[[Row], Row | None]:
    """A function that gives the control's row of the same seed and, of several, of the same other axes; or None."""
    others = [name for name in axes if name not in control]
    of_seed: dict[Any, list[Row]] = {}
    alike: dict[tuple[Any, str], Row] = {}
    for row in table:
        if matches(row, control):
            of_seed.setdefault(row["seed"], []).append(row)
            alike.setdefault((row["seed"], key_of(row, others)), row)

    def control_of(row: Row) -> Row | None:
        fitting = of_seed.get(row["seed"], [])
        return alike.get((row["seed"], key_of(row, others))) or (fitting[0] if len(fitting) == 1 else None)

    return control_of


def as_held(control: Mapping[str, Any], table: Sequence[Row]) -> dict[str, Any]:
    """The control as the table's rows have it: YAML reads a label on as a truth value."""
    row = next((row for row in table if matches(row, control)), control)
    return {name: row.get(name) for name in control}
