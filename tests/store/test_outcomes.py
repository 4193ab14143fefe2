"""Figures of images on disk: what is written is read, what is damaged or of others is refused."""

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcguard.errors import InputError
from hpcguard.store import ImageTable, Outcomes, join_tables, read_outcomes, read_table, table_problem, write_table


def make(first: int = 0, count: int = 300, identity: str = "digest") -> ImageTable:
    generator = np.random.default_rng(first)
    ids = np.arange(first, first + count)
    right = {name: generator.random(count) < share for name, share in (("clean", 0.9), ("pgd-20", 0.5), ("a+b", 0.4))}
    columns = Outcomes(ids, ids % 10, right).columns()
    return ImageTable(ids, columns, identity, {"clean": 0.5, "pgd-20": 2.0}, [{"device": "cpu", "cores": 2}])


def same(one: ImageTable, other: ImageTable) -> bool:
    return (
        one.image_id.tobytes() == other.image_id.tobytes()
        and list(one.columns) == list(other.columns)
        and all(one.columns[name].tobytes() == other.columns[name].tobytes() for name in one.columns)
        and (one.identity, one.seconds, list(one.machines)) == (other.identity, other.seconds, list(other.machines))
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_table(tmp_path / "a.h5", make())
    assert same(read_table(tmp_path / "a.h5"), make())
    found = read_outcomes(tmp_path / "a.h5")
    assert list(found.right) == ["clean", "pgd-20", "a+b"]
    assert np.array_equal(found.right["a+b"], make().columns["right/a+b"])
    with h5py.File(tmp_path / "a.h5") as file:  # as others read it
        assert file["right/pgd-20"].dtype == bool and file["image_id"].dtype == np.int64
        assert all(file[name].fletcher32 for name in ("image_id", "label", "right/clean"))


def test_columns_of_any_shape_and_none(tmp_path: Path) -> None:
    table = ImageTable(np.arange(3), {"a": np.ones((3, 2, 5)), "none": np.ones((3, 0))})
    write_table(tmp_path / "a.h5", table)
    assert same(read_table(tmp_path / "a.h5"), table)


def test_parts_are_joined_in_their_order() -> None:
    one, two = make(0, 100), replace(make(100, 40), machines=[{"device": "other"}])
    whole = join_tables([one, two])
    assert whole.image_id.tolist() == list(range(140))
    parts = [each.columns["right/a+b"] for each in (one, two)]
    assert np.array_equal(whole.columns["right/a+b"], np.concatenate(parts))
    assert whole.seconds == {"clean": 1.0, "pgd-20": 4.0}
    assert whole.machines == [{"device": "cpu", "cores": 2}, {"device": "other"}]
    fewer = {"label": two.columns["label"]}
    for stranger in (make(100, 40, "other"), replace(two, columns=fewer)):
        with pytest.raises(ValueError, match="different identities"):
            join_tables([one, stranger])
    with pytest.raises(ValueError, match="several rows"):
        join_tables([one, one])


def test_columns_must_fit(tmp_path: Path) -> None:
    good = make()
    with pytest.raises(ValueError, match="expected int64"):
        replace(good, image_id=good.image_id.astype(np.int32))
    with pytest.raises(ValueError, match="expected 300 rows"):
        replace(good, columns={"label": good.columns["label"][:-1]})
    right = good.columns["right/clean"]
    for change in (
        {"right/clean": right.astype(np.uint8)}, {"right/clean": right[:, None]},
        {"label": right}, {"label": None}, {"right/clean": None},
    ):  # fmt: skip
        columns = {name: column for name, column in {**good.columns, **change}.items() if column is not None}
        write_table(tmp_path / "a.h5", replace(good, columns=columns))
        with pytest.raises(InputError, match=r"a.h5: cannot be read as outcomes of attacks"):
            read_outcomes(tmp_path / "a.h5")


def test_why_a_file_cannot_be_used(tmp_path: Path) -> None:
    path, ids = tmp_path / "a.h5", np.arange(300)
    assert table_problem(path, ids, "digest") == "missing"
    write_table(path, make())
    assert table_problem(path, ids, "digest") is None
    assert "other images" in (table_problem(path, ids + 1, "digest") or "")
    assert "other weights" in (table_problem(path, ids, "another") or "")
    path.write_bytes(path.read_bytes()[:-1])
    assert "cannot be read" in (table_problem(path, ids, "digest") or "")


def test_a_flipped_outcome_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_table(path, make())
    with h5py.File(path) as file:
        place = file["right/pgd-20"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a.h5: cannot be read as figures .*again"):
        read_outcomes(path)


@pytest.mark.parametrize("damage", ["attack", "attribute", "version", "column", "text", "absent"])
def test_damaged_files_are_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.h5"
    if damage != "absent":
        write_table(path, make())
    if damage == "text":
        path.write_text("no HDF5")
    elif damage != "absent":
        with h5py.File(path, "r+") as file:
            if damage == "attack":
                del file["right/a+b"]
            elif damage == "attribute":
                file.attrs["seconds"] = "{"
            elif damage == "version":
                file.attrs["image_table"] = 99
            else:
                del file["label"]
    with pytest.raises(InputError, match=r"a.h5: .*evaluate` again") as caught:
        read_outcomes(path)
    assert "\n" not in str(caught.value)
