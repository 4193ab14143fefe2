"""Failures by class, from real exceptions, and what becomes of their records."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hpcguard.cluster.failures import Failure, equal_errors, forgive, problem_of, read_failures, record
from hpcguard.runs import RunFolder


def caught(action: object) -> BaseException:
    with pytest.raises(Exception) as info:
        action()  # type: ignore[operator]
    return info.value


def test_real_exhaustion_of_memory_is_told_from_errors() -> None:
    for action in (lambda: torch.empty(2**50), lambda: np.zeros(2**50), lambda: bytearray(2**62)):
        assert problem_of(caught(action)).kind == "out-of-memory"
    for action in (lambda: torch.ones(2) @ torch.ones(3), lambda: {}["key"], lambda: 1 / 0):
        assert problem_of(caught(action)).kind == "error"


def test_a_signature_is_the_place_and_not_the_text() -> None:
    def fail(number: int) -> None:
        raise ValueError(f"image {number}")

    one, two = problem_of(caught(lambda: fail(1))), problem_of(caught(lambda: fail(2)))
    assert one.signature == two.signature
    assert one.message == "ValueError: image 1"
    assert "fail" in one.tail
    assert problem_of(caught(lambda: 1 / 0)).signature != one.signature


def test_records_are_read_in_order_counted_and_forgiven(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for shard in (3, 1, 2, 1):
        record(run, Failure(shard, f"12_{shard}.r0.n0.{len(read_failures(run))}", "error", True, "m", f"s{shard == 2}"))
    found = read_failures(run)
    assert [failure.shard for failure in found] == [3, 1, 2, 1]
    count, example = equal_errors(found)
    assert (count, example and example.shard) == (2, 3)  # shards 3 and 1, the latter twice
    assert forgive(run, [1]) == 2
    assert [failure.shard for failure in read_failures(run)] == [3, 2]
    assert len(list(run.failures.iterdir())) == 4  # nothing is lost
    (run.failures / "00009.x.json").write_text("{")
    assert next((failure.shard, failure.kind) for failure in read_failures(run)) == (9, "unknown")
