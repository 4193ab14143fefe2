"""Alarm: one row of the table."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from hpcguard.metrics.accuracy import wilson_interval


@dataclass(frozen=True)
class Alarm:
    """One row. Of a share, measured["low"] is the lower end of its 95% interval (Wilson), and red means that even this
    exceeds the limit. red is None, and measured empty, where it was not measured."""

    name: str
    measured: dict[str, float]
    limit: float
    red: bool | None
    meaning: str


def trusted(rows: Iterable[Alarm]) -> bool:
    """Whether no alarm is red."""
    return not any(row.red for row in rows)


def share_alarm(name: str, found: Tensor | None, limit: float, meaning: str, **more: float) -> Alarm:
    """The row of a share of images: `found` is bool [B], None if it was not measured; no image is
    no measurement either."""
    if found is None or not len(found):
        return Alarm(name, {}, limit, None, meaning)
    count, of = int(found.sum()), len(found)
    low, _ = wilson_interval(count, of)
    measured = {"images": count, "of": of, "share": count / of, "low": low, **more}
    return Alarm(name, measured, limit, low > limit, meaning)


def finite(value: float) -> float:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else 1e30
