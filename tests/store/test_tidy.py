"""A tidy table through HDF5 and back, read with h5py alone too."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcguard.errors import InputError
from hpcguard.store.tidy import read_tidy, write_tidy

COLUMNS: dict[str, list[Any]] = {
    "rule": ["größer", None, "<b>"],
    "samples": [64, 128, -3],
    "refinement.masking.weight": [0, 0.25, None],
    "criteria": [["weight"], None, True],
    "never": [None, None, None],
    "long": [2**70, 1, 2],
    "clean": [1 / 3, None, 0.1],
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    write_tidy(path, COLUMNS, {"clean": "share of images"}, "abc")
    columns, units, digest = read_tidy(path)
    assert list(columns) == list(COLUMNS) and digest == "abc"
    assert columns["rule"].tolist() == ["größer", "", "<b>"]
    assert columns["samples"].dtype == np.int64 and columns["samples"].tolist() == [64, 128, -3]
    np.testing.assert_array_equal(columns["refinement.masking.weight"], [0, 0.25, np.nan])
    assert columns["criteria"].tolist() == ['["weight"]', "", "true"]
    assert np.isnan(columns["never"]).all()
    assert columns["long"].tolist() == [2.0**70, 1, 2]
    np.testing.assert_array_equal(columns["clean"], [1 / 3, np.nan, 0.1])  # to the last bit
    assert units["clean"] == "share of images" and units["rule"] == ""


def test_others_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "table.h5"
    write_tidy(path, COLUMNS, {"clean": "share of images"}, "abc")
    with h5py.File(path) as file:
        assert file.attrs["rows"] == 3
        assert {name: (each.shape, each.attrs["type"]) for name, each in file.items()} == {
            "rule": ((3,), "text"), "samples": ((3,), "integer"), "refinement.masking.weight": ((3,), "real"),
            "criteria": ((3,), "text"), "never": ((3,), "real"), "long": ((3,), "real"), "clean": ((3,), "real"),
        }  # fmt: skip
        assert h5py.check_string_dtype(file["rule"].dtype).encoding == "utf-8"


def test_the_same_table_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_tidy(tmp_path / name, COLUMNS, {}, "abc")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_is_no_tidy_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there"):
        read_tidy(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("no")
    with pytest.raises(InputError, match="cannot be read as a tidy table"):
        read_tidy(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    with pytest.raises(InputError, match="no tidy table of version 1"):
        read_tidy(tmp_path / "other.h5")
