"""Shards that cannot lie: flipped bits, cut files, killed writers, full disks, two writers, and any shape of rows."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_rows import make_rows

from hpcguard.runs import digest_json, remove_temporaries
from hpcguard.store import ShardWriter, Unit, open_rows, shard_problem
from hpcguard.store.schema import COLUMN

IDENTITY = {"data": {"sha256": "da7a"}, "model": {"weights_sha256": "3e1947"}, "attribution": {"num_samples": 1e-05}}
PRINT = digest_json(IDENTITY)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(one[name], other[name], equal_nan=one[name].dtype.kind == "f") for name in COLUMN)


def writer(folder: Path, name: str = "0") -> ShardWriter:
    return ShardWriter(folder / f"{name}.h5", folder / f"{name}.json", PRINT, identity=IDENTITY)


def problem(folder: Path, ids: np.ndarray, name: str = "0") -> str | None:
    return shard_problem(folder / f"{name}.h5", folder / f"{name}.json", ids, PRINT)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    writer(folder).publish(np.arange(40), [Unit(make_rows(np.arange(40)), 1e-05, {}, 64)])
    assert problem(folder, np.arange(40)) is None
    return folder


def test_a_thousand_flipped_bits_are_all_found(sound: Path, tmp_path: Path) -> None:
    """Half of them in the shard, half in its manifest."""
    generator = random.Random(5)
    for name in ("0.h5", "0.json"):
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
        whole = (sound / name).read_bytes()
        for _ in range(500):
            position, bit = generator.randrange(len(whole)), generator.randrange(8)
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            (tmp_path / name).write_bytes(damaged)
            assert problem(tmp_path, np.arange(40)), (name, position, bit)


def test_every_cut_is_found(sound: Path, tmp_path: Path) -> None:
    generator = random.Random(6)
    for name in ("0.h5", "0.json"):
        shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
        whole = (sound / name).read_bytes()
        for length in [0, len(whole) - 1, *(generator.randrange(len(whole)) for _ in range(98))]:
            (tmp_path / name).write_bytes(whole[:length])
            assert problem(tmp_path, np.arange(40)), (name, length)


def test_a_killed_writer_leaves_no_shard_that_is_wrong(tmp_path: Path) -> None:
    """A child publishes two shards again and again, with rows of another seed each time, and is killed 100 times."""
    generator = random.Random(7)
    ids = np.arange(12)
    versions = [make_rows(ids, seed=seed) for seed in range(50)]
    verified = 0
    for _ in range(100):
        told, tells = os.pipe()
        child = os.fork()
        if child == 0:
            while True:
                for seed, rows in enumerate(versions):
                    writer(tmp_path, str(seed % 2)).publish(ids, [Unit(rows, 1.0)])
                    os.write(tells, b".")
        started = time.monotonic()
        os.read(told, 1)  # the first is published: a slow machine is killed at the same places as a fast one
        time.sleep(generator.uniform(0, 1.5) * (time.monotonic() - started))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tells)
        for name in "01":
            if problem(tmp_path, ids, name) is None:
                verified += 1
                found = open_rows(tmp_path / f"{name}.h5")
                assert any(same(found, rows) for rows in versions)
    assert verified > 20, verified  # the test has seen whole shards
    left = list(tmp_path.glob(".*.tmp"))
    assert left  # and torn files, under names that nobody reads
    writer(tmp_path).publish(ids, [Unit(versions[0], 1.0)])
    assert problem(tmp_path, ids) is None


def test_a_writer_killed_between_shard_and_manifest_leaves_what_does_not_verify(tmp_path: Path) -> None:
    """The one moment in which the two files do not fit: both are on the disk, one is renamed."""
    ids = np.arange(12)
    writer(tmp_path).publish(ids, [Unit(make_rows(ids, seed=1), 1.0)])
    child = os.fork()
    if child == 0:
        rename, renamed = Path.replace, []

        def mortal(self: Path, target: Path) -> Path:
            if renamed:
                os.kill(os.getpid(), signal.SIGKILL)
            renamed.append(target)
            return rename(self, target)

        Path.replace = mortal  # type: ignore[method-assign,assignment]
        writer(tmp_path).publish(ids, [Unit(make_rows(ids, seed=2), 1.0)])
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert same(open_rows(tmp_path / "0.h5"), make_rows(ids, seed=2))
    assert problem(tmp_path, ids) == "its bytes differ from the manifest's digest"
    writer(tmp_path).publish(ids, [Unit(make_rows(ids, seed=2), 1.0)])
    assert problem(tmp_path, ids) is None
    remove_temporaries(tmp_path / "0.h5", tmp_path / "0.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h5", "0.json"]


def test_a_manifest_that_does_not_fit_on_the_disk_leaves_the_former_shard(small_disk: Path) -> None:
    ids = np.arange(10)
    writer(small_disk).publish(ids, [Unit(make_rows(ids), 1.0)])
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    space = os.statvfs(small_disk)
    free = space.f_bavail * space.f_frsize
    # Room for another shard, and not for its manifest.
    (small_disk / "fill").write_bytes(bytes(free - -(-len(before["0.h5"]) // space.f_frsize) * space.f_frsize))
    with pytest.raises(OSError, match="No space left"):
        writer(small_disk).publish(ids, [Unit(make_rows(ids, seed=3), 1.0)])
    (small_disk / "fill").unlink()
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    assert problem(small_disk, ids) is None


def test_a_writer_whose_shard_is_replaced_each_time_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardWriter, "_is_published", lambda self: False)
    with pytest.raises(RuntimeError, match="published 10 times"):
        writer(tmp_path).publish(np.arange(5), [Unit(make_rows(np.arange(5)), 1.0)])


def test_a_full_disk_is_one_clear_error_and_damages_nothing(small_disk: Path) -> None:
    small, large = np.arange(10), np.arange(300)
    writer(small_disk).publish(small, [Unit(make_rows(small), 1.0)])
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    rows = make_rows(large, 40, size=32)
    for name in ("0", "1"):  # over a published one, and beside it
        with pytest.raises(OSError, match="No space left") as caught:
            writer(small_disk, name).publish(large, [Unit(rows, 1.0)])
        assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    assert problem(small_disk, small) is None


def test_two_writers_of_one_shard_end_with_one_valid_shard(tmp_path: Path) -> None:
    """On a file system without locks two may compute the same shard; their rows differ here, at worst."""
    ids = np.arange(12)
    versions = [make_rows(ids, seed=seed) for seed in (0, 1)]
    for _ in range(20):
        children = []
        for rows in versions:
            child = os.fork()
            if child == 0:
                writer(tmp_path).publish(ids, [Unit(rows, 1.0)])
                os._exit(0)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        assert problem(tmp_path, ids) is None
        assert sum(same(open_rows(tmp_path / "0.h5"), rows) for rows in versions) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.h5", "0.json"]


def test_a_file_says_what_it_was_made_from_and_has_the_same_bytes_again(sound: Path, tmp_path: Path) -> None:
    with h5py.File(sound / "0.h5") as file:
        assert dict(file.attrs) == {
            "schema": 2, "fingerprint": PRINT, "weights_sha256": "3e1947", "data_sha256": "da7a",
            "configuration": '{"attribution": {"num_samples": 1e-05}, "data": {"sha256": "da7a"}, '
                             '"model": {"weights_sha256": "3e1947"}}',
        }  # fmt: skip
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import numpy as np; from pathlib import Path\n"
        "from test_trust import *; time.sleep(1.1)  # HDF5 keeps times in seconds\n"
        "writer(Path(sys.argv[3])).publish(np.arange(40), [Unit(make_rows(np.arange(40)), 2.0)])"
    )
    perturbed = {**os.environ, "MALLOC_PERTURB_": "170"}  # bytes that HDF5 leaves unset would differ
    here = Path(__file__).parent
    command = [sys.executable, "-c", code, str(here), str(here.parent), str(tmp_path)]
    subprocess.run(command, check=True, env=perturbed)
    assert (tmp_path / "0.h5").read_bytes() == (sound / "0.h5").read_bytes()


def test_a_shard_of_schema_1_is_refused_as_such(sound: Path, tmp_path: Path) -> None:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (tmp_path / "0.json").write_text('{"schema": 1, "file": "0.h5", "fingerprint": "%s"}' % PRINT)  # noqa: UP031
    assert problem(tmp_path, np.arange(40)) == "has schema 1, this hpcguard reads 2"


def test_a_copy_under_another_name_is_a_duplicate(sound: Path, tmp_path: Path) -> None:
    for suffix in ("h5", "json"):
        shutil.copy(sound / f"0.{suffix}", tmp_path / f"1.{suffix}")
    assert problem(tmp_path, np.arange(40), "1") == "a duplicate of 0.h5"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    gaps=st.lists(st.integers(1, 10**12), min_size=1, max_size=70),
    segments=st.integers(1, 40),
    labels=st.integers(1, 4),
    size=st.integers(1, 40),
    cut=st.integers(0, 70),
    left_out=st.sets(st.integers(0, 69), max_size=5),
    narrow=st.booleans(),
)
def test_whatever_the_shapes_a_shard_reads_back(
    tmp_path: Path, gaps: list[int], segments: int, labels: int, size: int, cut: int, left_out: set[int], narrow: bool
) -> None:
    """Ids with gaps, two units of different widths, quarantined images, any numbers of rows, labels, segments."""
    ids = np.cumsum(gaps)
    good = np.array([k not in left_out for k in range(len(ids))])
    if not good.any():
        return
    parts = [part for part in (ids[good][:cut], ids[good][cut:]) if len(part)]
    widths = [segments, max(1, segments // 2)]
    units = [Unit(make_rows(part, width, labels, size), 0.5) for part, width in zip(parts, widths, strict=False)]
    units.append(Unit({}, 0.0, {int(image): "cannot be read" for image in ids[~good]}))
    path, manifest = tmp_path / "0.h5", tmp_path / "0.json"
    ShardWriter(path, manifest, PRINT, "u1" if narrow else "u2", IDENTITY).publish(ids, units)
    seen: list[int] = []
    visited = shard_problem(path, manifest, ids, PRINT, visit=lambda rows: seen.extend(rows["image_id"].tolist()))
    assert visited is None
    assert seen == ids[good].tolist()
    rows = open_rows(path)
    start = 0
    for unit in units[: len(parts)]:
        stop = start + len(unit.rows["image_id"])
        for name, values in unit.rows.items():
            stored = rows[name][start:stop]
            inside = stored[..., : values.shape[-1]] if "S" in COLUMN[name].axes else stored
            assert np.array_equal(inside, values, equal_nan=values.dtype.kind == "f")
            if "S" in COLUMN[name].axes:
                assert np.isnan(stored[..., values.shape[-1] :]).all()
        start = stop
    assert start == len(rows["image_id"])
