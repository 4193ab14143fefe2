"""Packing, against what a task list and Slurm's rules say."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcguard.cluster.packing import Chunk, chunks, pack, shards_per_task
from hpcguard.errors import InputError


def test_pack_by_hand() -> None:
    assert pack([0, 1, 2, 5, 9], 2) == [[0, 1], [2, 5], [9]]
    assert pack(range(3), 5) == [[0, 1, 2]]
    assert pack([], 3) == []


def test_chunks_by_hand() -> None:
    assert chunks(6, 6, 4) == [Chunk(0, 6, 4, None)]
    assert chunks(7, 6, 4) == [Chunk(0, 3, 2, None), Chunk(3, 4, 2, None)]
    assert chunks(13, 5, 2) == [Chunk(0, 4, 1, None), Chunk(4, 4, 1, None), Chunk(8, 5, 1, 0)]
    assert chunks(10, 5, 1) == [Chunk(0, 5, 1, None), Chunk(5, 5, 1, 0)]
    assert chunks(1, 1001, 100) == [Chunk(0, 1, 1, None)]
    assert chunks(0, 1001, 100) == []


def most_at_once(result: list[Chunk]) -> int:
    """Run the arrays with tasks of equal length, each as soon as the one that it waits for has ended."""
    left = [chunk.tasks for chunk in result]
    most = 0
    while any(left):
        may_run = [k for k, chunk in enumerate(result) if left[k] and (chunk.after is None or not left[chunk.after])]
        running = {k: min(left[k], result[k].parallel) for k in may_run}
        assert running, "arrays that wait for ever"
        most = max(most, sum(running.values()))
        for k, count in running.items():
            left[k] -= count
    return most


@given(tasks=st.integers(1, 400), largest=st.integers(1, 60), at_once=st.integers(1, 50))
def test_chunks_hold_every_task_once_and_keep_both_limits(tasks: int, largest: int, at_once: int) -> None:
    result = chunks(tasks, largest, at_once)
    assert [chunk.first + index for chunk in result for index in range(chunk.tasks)] == list(range(tasks))
    sizes = [chunk.tasks for chunk in result]
    assert max(sizes) <= largest
    assert max(sizes) - min(sizes) <= 1
    assert len(result) == -(-tasks // largest)
    assert all(1 <= chunk.parallel <= chunk.tasks for chunk in result)
    assert most_at_once(result) <= at_once
    lanes = [chunk.parallel for chunk in result if chunk.after is None]
    if min(sizes) >= at_once:
        assert sum(lanes) == at_once


@given(shards=st.integers(1, 500), wanted=st.integers(1, 20), room=st.integers(1, 60))
def test_shards_per_task_is_the_smallest_that_fits(shards: int, wanted: int, room: int) -> None:
    fits = [n for n in range(wanted, max(wanted, shards) + 1) if len(pack(range(shards), n)) <= room]
    assert shards_per_task(shards, wanted, room) == fits[0]


def test_no_room_at_all_is_one_line() -> None:
    with pytest.raises(InputError, match=re.escape("no room for another job")) as caught:
        shards_per_task(10, 1, 0)
    assert "\n" not in str(caught.value)
