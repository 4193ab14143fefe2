"""Clean against robust accuracy: which settings no other one beats in both."""

import math
from collections.abc import Sequence

from hpcguard.sweeps.table import CLEAN


def main_of(measures: Sequence[str]) -> list[str]:
    """Clean and the last column: results list attacks from the weakest to the strongest."""
    return list(dict.fromkeys(name for name in (CLEAN, *measures[-1:]) if name in measures))


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as good in both and better in one; a point with a nan is not on it."""
    front: set[int] = set()
    best, last = -math.inf, (math.nan, math.nan)
    known = [place for place, point in enumerate(points) if not any(map(math.isnan, point))]
    for place in sorted(known, key=lambda place: points[place], reverse=True):
        point = points[place]
        if point[1] > best or point == last:
            best, last = point[1], point
            front.add(place)
    return [place in front for place in range(len(points))]
