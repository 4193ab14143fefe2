"""Publishing by rename, digests, differences."""

import hashlib
import stat
from pathlib import Path

import numpy as np
import pytest

from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, differences, digest_arrays, digest_file, publish, read_json, write_json


def test_publish_leaves_the_old_file_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), publish(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_publish_replaces_whole_and_shows_nothing_before(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    with publish(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_digests(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert digest_file(path) == hashlib.sha256(b"abc").hexdigest()
    numbers = np.arange(6, dtype=np.int32)
    assert digest_arrays(numbers) != digest_arrays(numbers.reshape(2, 3))
    assert digest_arrays(numbers) != digest_arrays(numbers.astype(np.int64))
    assert digest_arrays(numbers[::2]) == digest_arrays(numbers[::2].copy())


def test_differences_name_every_leaf() -> None:
    then = {"a": {"b": 1, "c": [1, 2]}, "d": "x"}
    now = {"a": {"b": 2, "c": [1, 2]}, "e": None, "d": "y"}
    text = differences(then, now)
    assert "a.b was 1 (now 2)" in text
    assert "d was x (now y)" in text
    assert "a.c" not in text
    assert differences(then, dict(then)) == ""


def test_torn_json_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    path.write_text(path.read_text()[:4])
    with pytest.raises(InputError, match=r"a\.json: damaged.*do this"):
        read_json(path, "do this")
    path.write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object, found list"):
        read_json(path, "do this")


def test_a_run_folder_is_private(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "deep" / "run")
    folder.create()
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.shards.stat().st_mode) == 0o700
