"""Outcomes on disk: what is written is read, what is damaged or of others is refused."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcguard.errors import InputError
from hpcguard.store import Outcomes, join_outcomes, outcomes_problem, read_outcomes, write_outcomes


def make(first: int = 0, count: int = 300, identity: str = "digest") -> Outcomes:
    generator = np.random.default_rng(first)
    ids = np.arange(first, first + count)
    right = {name: generator.random(count) < share for name, share in (("clean", 0.9), ("pgd-20", 0.5), ("a+b", 0.4))}
    falls = generator.choice([0.0, 0.1, np.inf, np.nan], count)
    seconds = {"clean": 0.5, "pgd-20": 2.0, "a+b": 3.0}
    return Outcomes(ids, ids % 10, right, falls, identity, seconds, [{"device": "cpu", "cores": 2}])


def same(one: Outcomes, other: Outcomes) -> bool:
    columns = ("image_id", "label", "falls_at")
    return (
        all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in columns)
        and list(one.right) == list(other.right)
        and all(np.array_equal(one.right[name], other.right[name]) for name in one.right)
        and (one.identity, one.seconds, list(one.machines)) == (other.identity, other.seconds, list(other.machines))
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_outcomes(tmp_path / "a.h5", make())
    assert same(read_outcomes(tmp_path / "a.h5"), make())
    with h5py.File(tmp_path / "a.h5") as file:  # as others read it
        assert file["right/pgd-20"].dtype == bool and file["image_id"].dtype == np.int64
        assert all(file[name].fletcher32 for name in ("image_id", "label", "falls_at", "right/clean"))


def test_parts_are_joined_in_their_order(tmp_path: Path) -> None:
    one, two = make(0, 100), replace(make(100, 40), machines=[{"device": "other"}])
    whole = join_outcomes([one, two])
    assert whole.image_id.tolist() == list(range(140))
    assert np.array_equal(whole.right["a+b"], np.concatenate([one.right["a+b"], two.right["a+b"]]))
    assert whole.seconds == {"clean": 1.0, "pgd-20": 4.0, "a+b": 6.0}
    assert whole.machines == [{"device": "cpu", "cores": 2}, {"device": "other"}]
    for stranger in (make(100, 40, "other"), replace(two, right={"clean": two.right["clean"]})):
        with pytest.raises(ValueError, match="different identities"):
            join_outcomes([one, stranger])
    with pytest.raises(ValueError, match="several rows"):
        join_outcomes([one, one])


def test_columns_must_fit() -> None:
    good = make()
    for change in (
        {"label": good.label[:-1]}, {"image_id": good.image_id.astype(np.int32)},
        {"right": {"clean": good.right["clean"].astype(np.uint8)}}, {"falls_at": good.falls_at[:, None]},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            replace(good, **change)


def test_why_a_file_cannot_be_used(tmp_path: Path) -> None:
    path, ids = tmp_path / "a.h5", np.arange(300)
    assert outcomes_problem(path, ids, "digest") == "missing"
    write_outcomes(path, make())
    assert outcomes_problem(path, ids, "digest") is None
    assert "other images" in (outcomes_problem(path, ids + 1, "digest") or "")
    assert "other weights" in (outcomes_problem(path, ids, "another") or "")
    path.write_bytes(path.read_bytes()[:-1])
    assert "cannot be read" in (outcomes_problem(path, ids, "digest") or "")


def test_a_flipped_outcome_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_outcomes(path, make())
    with h5py.File(path) as file:
        place = file["right/pgd-20"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.h5: cannot be read as outcomes .*again"):
        read_outcomes(path)


@pytest.mark.parametrize("damage", ["attack", "attribute", "version", "column", "text", "absent"])
def test_damaged_files_are_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.h5"
    if damage != "absent":
        write_outcomes(path, make())
    if damage == "text":
        path.write_text("no HDF5")
    elif damage != "absent":
        with h5py.File(path, "r+") as file:
            if damage == "attack":
                del file["right/a+b"]
            elif damage == "attribute":
                file.attrs["seconds"] = "{"
            elif damage == "version":
                file.attrs["outcomes"] = 99
            else:
                del file["label"]
    with pytest.raises(InputError, match=r"a.h5: .*evaluate` again") as caught:
        read_outcomes(path)
    assert "\n" not in str(caught.value)
