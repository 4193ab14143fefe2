"""The journal of an attempt: what was finished is there, whatever was cut off behind it."""

from pathlib import Path

import numpy as np
import pytest

from hpcguard.store import Journal, Unit, read_journal


def make_unit(seed: int) -> Unit:
    generator = np.random.default_rng(seed)
    rows = {
        "image_id": np.arange(3, dtype=np.int64),
        "segments": generator.integers(0, 9, (3, 4, 4)),
        "coefficients": np.array([[1.0, np.nan], [-0.0, 5e-324], [np.inf, 1 / 3]]),
    }
    return Unit(rows, 1.25, {7: 'NaN, of "course"\n'} if seed else {}, 128)


def same(one: Unit, other: Unit) -> bool:
    equal = all(
        one.rows[name].dtype == other.rows[name].dtype and one.rows[name].tobytes() == other.rows[name].tobytes()
        for name in one.rows | other.rows
    )
    return equal and (one.seconds, one.quarantined, one.batch_size) == (
        other.seconds, other.quarantined, other.batch_size
    )  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "00001.a-1.units"
    journal = Journal(path, "print")
    for number in (0, 1, 4):
        journal.append(number, make_unit(number))
    return path


def test_units_come_back_to_the_bit(path: Path) -> None:
    found = read_journal(path, "print")
    assert list(found) == [0, 1, 4]
    assert all(same(unit, make_unit(number)) for number, unit in found.items())


def test_a_file_cut_anywhere_gives_the_whole_units_before_the_cut(path: Path) -> None:
    whole = path.read_bytes()
    ends = [0]
    for number in (0, 1, 4):  # sizes of one record each, written alone
        alone = path.with_name("alone")
        alone.unlink(missing_ok=True)
        Journal(alone, "print").append(number, make_unit(number))
        ends.append(ends[-1] + alone.stat().st_size)
    assert ends[-1] == len(whole)
    for cut in {0, 1, 47, 48, *(end + step for end in ends for step in (-1, 0, 1, 40, 60)), len(whole) // 2}:
        if 0 <= cut <= len(whole):
            path.write_bytes(whole[:cut])
            assert len(read_journal(path, "print")) == sum(end <= cut for end in ends[1:]), cut


def test_a_flipped_bit_ends_the_reading(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        for number, unit in read_journal(path, "print").items():
            assert same(unit, make_unit(number))
    assert len(read_journal(path, "print")) < 3


def test_a_flipped_bit_of_a_header_asks_for_no_memory(path: Path) -> None:
    """The length is eight bytes behind the mark: one bit of it may stand for exbibytes."""
    whole = path.read_bytes()
    for position in range(48):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            assert read_journal(path, "print") == {}, (position, bit)


def test_another_plan_and_no_file_give_nothing(path: Path) -> None:
    assert read_journal(path, "other") == {}
    path.unlink()
    assert read_journal(path, "print") == {}


def test_units_of_another_schema_are_left_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lack columns, though the plan is the same."""
    monkeypatch.setattr("hpcguard.store.journal.SCHEMA_VERSION", 1)
    Journal(path, "print").append(5, make_unit(5))
    assert list(read_journal(path, "print")) == [5]
    monkeypatch.undo()
    assert list(read_journal(path, "print")) == [0, 1, 4]
