"""Which GPU a job gets."""

from typing import Any

import pytest

from hpcguard.sweeps.jobs import Kind
from hpcguard.sweeps.local import on_gpu


@pytest.mark.parametrize(
    ("kind", "changes", "slot", "gpus", "expected"),
    [
        ("refine", {}, 0, 4, ["device=cuda:0"]),
        ("evaluate", {}, 6, 4, ["device=cuda:2"]),
        ("attribute", {}, 1, 2, ["device=cuda:1"]),
        ("refine", {}, 1, 1, []),
        ("refine", {}, 1, 0, []),
        ("refine", {"device": "cpu"}, 1, 4, []),
        ("refine", {"controls": {"a": {"processes": 4}}}, 1, 4, []),  # its ranks take one each
        ("attribute", {"cluster": {"workers": 4}}, 1, 4, []),
        ("evaluate", {"evaluation": {"workers": 2}}, 1, 4, []),
    ],
)
def test_a_job_of_one_process_gets_the_gpu_of_its_slot(
    kind: Kind, changes: dict[str, Any], slot: int, gpus: int, expected: list[str]
) -> None:
    one = {"workers": 1}
    config = {"device": "auto", "controls": {"a": {"processes": 1}}, "evaluation": one, "cluster": one, **changes}
    assert on_gpu(config, kind, slot, gpus) == expected
