"""The Pareto front against its definition."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hpcguard.sweeps.pareto import main_of, on_front

SHARES = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, math.nan])  # few, so that there are ties


@given(st.lists(st.tuples(SHARES, SHARES), max_size=12))
def test_the_front_is_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    known = [point for point in points if not any(map(math.isnan, point))]
    expected = [point in known and not any(beats(other, point) for other in known) for point in points]
    assert on_front(points) == expected


def test_many_points() -> None:
    clean = np.linspace(0, 1, 20_000)
    assert all(on_front(list(zip(clean.tolist(), (1 - clean).tolist(), strict=True))))
    assert sum(on_front(list(zip(clean.tolist(), clean.tolist(), strict=True)))) == 1


def test_robust_is_the_last_attack() -> None:
    assert main_of(["clean", "fgsm", "autoattack"]) == ["clean", "autoattack"]
    assert main_of(["clean"]) == ["clean"] and main_of([]) == []
