"""Axes to cells: products, ranges, labels, zipped groups, exclusions, explicit cells, seeds."""

import itertools
from typing import Any

import numpy as np
import pytest

from hpcguard.config.sweep import SweepConfig
from hpcguard.errors import InputError
from hpcguard.sweeps.axes import spread
from hpcguard.sweeps.grid import expand

MASKING, SENSITIVITY, EPOCHS = "refinement.masking.weight", "refinement.sensitivity.weight", "refinement.epochs"


def sweep(**values: Any) -> SweepConfig:
    return SweepConfig.model_validate({"config": {"device": "cpu"}, **values})


def test_cells_are_the_product_of_axes_groups_and_seeds() -> None:
    cells = expand(
        sweep(
            axes={EPOCHS: [1, 2, 3], "terms": {"on": {}, "off": {"refinement": {"masking": {"weight": 0}}}}},
            zip=[{SENSITIVITY: [0.1, 0.2], "refinement.seed": [7, 8]}],
            seeds=[0, 1],
            seed_keys=["data.seed", "attribution.seed"],
        )
    )
    found = {
        (cell.values[EPOCHS], cell.values["terms"], cell.values[SENSITIVITY], cell.values["refinement.seed"], cell.seed)
        for cell in cells
    }
    groups = itertools.product([1, 2, 3], ["on", "off"], [(0.1, 7), (0.2, 8)], [0, 1])
    assert found == {(epochs, terms, *pair, seed) for epochs, terms, pair, seed in groups}
    assert len(cells) == 24
    off = next(cell for cell in cells if cell.values["terms"] == "off" and cell.seed == 1)
    assert off.changes == {
        EPOCHS: 1, MASKING: 0, SENSITIVITY: 0.1, "refinement.seed": 7, "data.seed": 1, "attribution.seed": 1
    }  # fmt: skip


def test_a_label_read_as_a_truth_value_is_the_label() -> None:
    """YAML 1.1 reads on and off as true and false, in labels and where they are named."""
    cells = expand(
        sweep(
            axes={"masking": {True: {}, False: {MASKING: 0}}, EPOCHS: [1, 2]},
            exclude=[{"masking": False, EPOCHS: 2}],
            cells=[{"masking": False, EPOCHS: 9}],
        )
    )
    assert [(cell.values["masking"], cell.values[EPOCHS]) for cell in cells] == [
        ("on", 1), ("on", 2), ("off", 1), ("off", 9)
    ]  # fmt: skip
    assert cells[-1].changes == {MASKING: 0, EPOCHS: 9}


def test_a_mapping_as_value_changes_what_it_names() -> None:
    (cell,) = expand(sweep(axes={"refinement.masking": [{"weight": 1, "fill": "swap"}]}))
    assert cell.changes == {MASKING: 1, "refinement.masking.fill": "swap"}


def test_ranges() -> None:
    def numbers(**given: Any) -> list[Any]:
        return spread(given, "axes.x")

    assert numbers(start=0, stop=1, step=0.1) == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert numbers(start=4, stop=0, step=-2) == [4, 2, 0]
    assert numbers(start=0, stop=0.5, step=0.2) == [0, 0.2, 0.4]  # no further than stop
    whole = numbers(start=2, stop=10, count=3)
    assert whole == [2, 6, 10] and all(type(value) is int for value in whole)
    np.testing.assert_allclose(
        numbers(start=0.001, stop=1, count=7, scale="log"), np.geomspace(0.001, 1, 7), rtol=1e-11
    )
    seeded = expand(sweep(axes={EPOCHS: [1]}, seeds={"range": {"start": 3, "stop": 5, "step": 1}}))
    assert [cell.seed for cell in seeded] == [3, 4, 5]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "no cell is left"),
    ({"axes": {EPOCHS: 3}}, r"axes.refinement.epochs = 3: write a list"),
    ({"axes": {EPOCHS: []}}, r"axes.refinement.epochs: has no values"),
    ({"axes": {EPOCHS: [1, 2, 1]}}, r"axes.refinement.epochs: 1 is there twice"),
    ({"axes": {EPOCHS: {"range": {"start": 1, "stop": 3}}}}, "give step .* or count"),
    ({"axes": {EPOCHS: {"range": {"start": 1, "stop": 3, "step": -1}}}}, "gives 0 values"),
    ({"axes": {EPOCHS: {"range": {"start": 1, "end": 3, "step": 1}}}}, "range.*unknown key|stop"),
    ({"axes": {EPOCHS: {"range": {"start": 0, "stop": 3, "count": 3, "scale": "log"}}}}, "above 0"),
    ({"axes": {"refinment.epochs": [1]}}, "refinment.epochs is no key of data, model"),
    ({"axes": {"evaluation.eps": [0.1, 0.2]}}, "evaluation.eps is no axis, for results .* cannot be compared"),
    ({"axes": {"cluster.workers": [1, 2]}}, "cluster.workers is no axis, for no result depends on it"),
    ({"axes": {"seed": [1, 2]}}, "for seeds write seeds"),
    ({"axes": {"terms": {"none": 0}}}, "axes.terms.none = 0: write what the label changes"),
    ({"axes": {"terms": {"none": {"masking.weight": 0}}}}, "axes.terms.none: masking.weight is no key"),
    ({"axes": {EPOCHS: [1]}, "zip": [{EPOCHS: [2]}]}, "axes and zip: .*is there twice"),
    ({"zip": [{EPOCHS: [1, 2], MASKING: [0]}]}, "refinement.epochs has 2, refinement.masking.weight has 1"),
    ({"zip": [{}]}, r"zip\[0\].*it is empty"),
    ({"axes": {MASKING: [0, 1], "terms": {"a": {"refinement.masking": {"weight": 0}}}}}, "is set by .* and by terms"),
    ({"axes": {"refinement.seed": [0, 1]}, "seeds": [0, 1]}, "refinement.seed is set by refinement.seed and by seeds"),
    ({"axes": {EPOCHS: [1]}, "seeds": [0, 0]}, "seeds: 0 is there twice"),
    ({"axes": {EPOCHS: [1]}, "seeds": [0], "seed_keys": ["evaluation.seed"]}, "seed_keys: evaluation.seed is no axis"),
    ({"axes": {EPOCHS: [1, 2]}, "exclude": [{EPOCHS: 1}, {EPOCHS: 2}]}, "no cell is left"),
    ({"axes": {EPOCHS: [1, 2]}, "exclude": [{EPOCHS: 3}]}, r"exclude\[0\] = .* fits no cell"),
    ({"axes": {EPOCHS: [1, 2]}, "exclude": [{}]}, r"exclude\[0\]"),
    ({"axes": {"terms": {"a": {}}}, "cells": [{"terms": "b"}]}, r"cells\[0\].terms = b: one of a"),
    ({"cells": [{EPOCHS: 1}, {EPOCHS: 1}]}, "the cell refinement.epochs=1 is there twice"),
    ({"axes": {EPOCHS: list(range(1, 1001)), MASKING: list(range(1000))}}, "1,000,000 cells are more than"),
]


@pytest.mark.parametrize(("values", "expected"), WRONG, ids=[str(place) for place in range(len(WRONG))])
def test_what_is_no_sweep(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        expand(sweep(**values))
