"""Packed layouts: full disks, kills over a published store, two consolidations at once, and what keeps the layout."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_consolidate import CLASSES, IDS, join, write_run, write_shard

from hpcguard import consolidate as stage
from hpcguard.cli import run_stage
from hpcguard.cluster.plan import read_plan
from hpcguard.cluster.ranks import SingleProcess, mpi_command
from hpcguard.config import SpuriousConfig
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, exclusive, read_sealed
from hpcguard.store import (
    ShardWriter,
    StoreReader,
    Unit,
    open_rows,
    pack_shards,
    read_manifest,
    store_shapes,
    view_problem,
    write_plain,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def run(written: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(written.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def copy(attributed: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(attributed, tmp_path / "run")))


def redo_shards(run: RunFolder) -> None:
    """The same images with other values."""
    plan = read_plan(run.plan)
    for index in range(plan.num_shards):
        old = open_rows(run.shard(index))
        rows = {**old, "intercept": old["intercept"] + 1}
        ids = plan.shard_ids(index, IDS)
        absent = {int(image): "cannot be read" for image in ids if image not in rows["image_id"]}
        writer = ShardWriter(run.shard(index), run.manifest(index), plan.fingerprint, "u1", plan.identity)
        writer.publish(ids, [Unit(rows, 1.0, absent)], shard=index)


def fill(disk: Path, free: int) -> None:
    space = os.statvfs(disk)
    (disk / "fill").write_bytes(bytes(max(0, space.f_bavail * space.f_frsize - free)))


def command(*arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(copy: RunFolder, small_disk: Path) -> None:
    """HDF5 that cannot flush a file ends the process: it never sees that the disk is full."""
    fill(small_disk, 8192)
    copy.packed.symlink_to(small_disk)
    before = {path: path.read_bytes() for path in (copy.store, copy.store_manifest)}
    for arguments in (
        ("hpcguard.export", copy.path, small_disk / "out.h5"),
        ("hpcguard.consolidate", copy.path, "--repack"),
    ):
        done = command(*arguments)
        assert done.returncode == 2, (arguments, done.returncode, done.stderr)
        assert len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr, done.stderr
        assert [path.name for path in small_disk.iterdir()] == ["fill"]
    assert before == {path: path.read_bytes() for path in before}


def test_wherever_the_disk_ends_the_error_is_the_same(run: RunFolder, small_disk: Path) -> None:
    """In a child, for HDF5 would take the tests with it."""
    join(run)
    reader, manifests = StoreReader(run.store), [read_manifest(run.manifest(index)) for index in range(9)]
    shards = {run.shard(index): manifests[index]["sha256"] for index in range(9)}
    out = small_disk / "out.h5"
    child = os.fork()
    if child == 0:
        try:
            for free in range(0, 16385, 4096):
                fill(small_disk, free)
                for write in (
                    lambda: write_plain(out, reader, np.arange(len(reader)), CLASSES),
                    lambda: pack_shards(out, shards, store_shapes(manifests), "print", {}),
                ):
                    with pytest.raises(OSError, match="No space left"):
                        write()
                assert [path.name for path in small_disk.iterdir()] == ["fill"]
                (small_disk / "fill").unlink()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    write_plain(out, reader, np.arange(len(reader)), CLASSES)
    assert open_rows(out)["image_id"].tolist() == reader.column("image_id").tolist()


def test_a_view_that_does_not_fit_leaves_the_former_store(run: RunFolder, small_disk: Path) -> None:
    shutil.copy(run.plan, small_disk)
    folder = RunFolder(small_disk)
    folder.shards.symlink_to(run.shards)
    join(folder)
    before = {path.name: path.read_bytes() for path in (folder.store, folder.store_manifest)}
    fill(small_disk, 4096)
    with pytest.raises(OSError, match="No space left") as caught:
        join(folder)
    assert caught.value.filename == str(folder.store)
    (small_disk / "fill").unlink()
    assert before == {name: (small_disk / name).read_bytes() for name in before}
    assert view_problem(folder.store, folder.store_manifest, read_plan(folder.plan).fingerprint) is None
    assert not list(small_disk.glob(".*.tmp"))


@pytest.mark.parametrize("packed_before_the_kill", range(4))
def test_a_repacking_killed_over_a_packed_store_changes_no_row_of_it(
    run: RunFolder, packed_before_the_kill: int
) -> None:
    """Rows under the published view are the old ones until store.json names the new files."""
    join(run, repack=True)
    before, sources = open_rows(run.store), set(run.packed.iterdir())
    redo_shards(run)
    child = os.fork()
    if child == 0:
        true, packed = stage.pack_shards, []

        def mortal(target: Path, *arguments: object, **options: object) -> object:
            if len(packed) == packed_before_the_kill:
                os.kill(os.getpid(), signal.SIGKILL)
            packed.append(target)
            return true(target, *arguments, **options)  # type: ignore[arg-type]

        stage.pack_shards = mortal  # type: ignore[assignment]
        join(run, repack=True)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert view_problem(run.store, run.store_manifest, read_plan(run.plan).fingerprint) is None
    assert all(open_rows(run.store)[name].tobytes() == before[name].tobytes() for name in before)
    (run.packed / ".0-000.h5.1-a.tmp").touch()
    join(run, repack=True)
    assert (open_rows(run.store)["intercept"] == before["intercept"] + 1).all()
    left = set(run.packed.iterdir())
    assert left == {run.path / name for name in read_sealed(run.store_manifest, "")["sources"]}
    assert not left & sources


def test_packed_files_that_go_before_the_view_is_made_are_no_store(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without locks another consolidation may delete them."""
    join(run)
    true, before = stage._publish, run.store.read_bytes()

    def late(folder: RunFolder, *arguments: object) -> None:
        next(iter(folder.packed.glob("*.h5"))).unlink()
        true(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "_publish", late)
    with pytest.raises(InputError, match="has changed or gone since it was verified"):
        join(run, repack=True)
    assert run.store.read_bytes() == before


def test_a_shard_that_changes_while_it_is_packed_is_refused(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    true = stage._pack

    def late(*arguments: object) -> object:
        write_shard_again(run)
        return true(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "_pack", late)
    with pytest.raises(InputError, match=r"00004\.h5: changed since it was verified"):
        join(run, repack=True)
    assert not run.store.exists()
    assert not list(run.packed.iterdir())


def write_shard_again(run: RunFolder) -> None:
    plan = read_plan(run.plan)
    write_shard(run, plan, 5)
    shutil.copy(run.shard(5), run.shard(4))


def test_one_consolidation_at_a_time(copy: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    with exclusive(copy.path):
        assert run_stage("consolidate", [str(copy.path), "--repack"]) == 2
    assert "another process is writing it" in capfd.readouterr().err
    assert not copy.packed.exists()


def in_ranks(copy: RunFolder, *options: str) -> "subprocess.CompletedProcess[str]":
    asked = mpi_command(2, [sys.executable, "-m", "hpcguard.consolidate", str(copy.path), *options])
    assert asked
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    return subprocess.run(asked, env={**os.environ, **allowed}, capture_output=True, text=True, timeout=300)


def sources(copy: RunFolder) -> list[str]:
    return list(read_sealed(copy.store_manifest, "")["sources"])


def test_a_packed_layout_stays_until_one_asks_alone_and_in_ranks(
    copy: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_stage("consolidate", [str(copy.path), "--repack"]) == 0
    assert "copied into" in capsys.readouterr().out
    packed = sources(copy)
    assert all(name.startswith("packed/") for name in packed)
    shutil.move(copy.shards, copy.path / "elsewhere")  # the packed files are enough
    for options in ([], ["--repack"]):
        assert run_stage("consolidate", [str(copy.path), *options]) == 0
        assert "is there and fits" in capsys.readouterr().out
    assert "is there and fits" in in_ranks(copy).stdout
    assert run_stage("consolidate", [str(copy.path), "--no-repack"]) == 2  # that needs the shards
    assert sources(copy) == packed
    shutil.move(copy.path / "elsewhere", copy.shards)
    damaged = copy.path / packed[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert run_stage("consolidate", [str(copy.path)]) == 0  # made again, and laid out as it was
    assert sources(copy) == packed
    assert run_stage("consolidate", [str(copy.path), "--no-repack"]) == 0
    assert all(name.startswith("shards/") for name in sources(copy))
    assert not list(copy.packed.iterdir())


def test_tasks_of_srun_that_mpi_does_not_know_of_are_refused(
    copy: RunFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert run_stage("consolidate", [str(copy.path)]) == 2
    assert "srun started 4 tasks, and MPI knows of one" in capfd.readouterr().err


def test_a_label_of_no_class_is_a_line_that_names_the_shard(run: RunFolder) -> None:
    plan = read_plan(run.plan)
    with pytest.raises(InputError, match=r"cannot be used: 00000-00008 \(label is no class: it lies outside 0 to 2\)"):
        stage.consolidate(run, plan, IDS, CLASSES[:3], SpuriousConfig(), SingleProcess(), False, 0.1)
    assert np.isin(IDS, open_rows(run.shard(0))["image_id"]).any()
