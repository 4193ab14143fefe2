"""Consolidation: the same bytes by any number of ranks, statistics, packed files, and everything that is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from stored_rows import make_rows

from hpcguard.cluster.plan import Plan, agree_on_plan, make_plan, read_plan
from hpcguard.cluster.ranks import SingleProcess, mpi_command
from hpcguard.config import SpuriousConfig
from hpcguard.consolidate import consolidate
from hpcguard.errors import InputError
from hpcguard.refinement.spurious import flag_segments
from hpcguard.runs import RunFolder, read_sealed
from hpcguard.store import ShardWriter, Unit, generation, open_rows, read_manifest, view_problem

CLASSES = [f"class {k}" for k in range(10)]
IDS = np.arange(90) * 3 + 7
RANK = """
import sys, numpy as np
from pathlib import Path
from hpcguard import consolidate as stage
from hpcguard.cluster.plan import read_plan
from hpcguard.cluster.ranks import communicator
from hpcguard.config import SpuriousConfig
from hpcguard.runs import RunFolder
stage.GROUPS = 4  # so that a group has several shards
folder, world = RunFolder(Path(sys.argv[1])), communicator()
ids = np.arange(90) * 3 + 7
classes = [f"class {k}" for k in range(10)]
"""
WORK = "stage.consolidate(folder, read_plan(folder.plan), ids, classes, SpuriousConfig(), world, True, 0.1)"


def write_run(path: Path) -> RunFolder:
    """Nine shards of ten images, of different widths; one image of the third is quarantined."""
    folder = RunFolder(path)
    folder.create()
    plan = agree_on_plan(folder.plan, make_plan(IDS, 10, 9, {"data": {"sha256": "d"}}))
    for index in range(plan.num_shards):
        write_shard(folder, plan, index)
    return folder


def write_shard(folder: RunFolder, plan: Plan, index: int) -> None:
    own = plan.shard_ids(index, IDS)
    kept = own[1:] if index == 2 else own
    unit = Unit(make_rows(kept, 4 + index % 3), 1.5, {int(image): "cannot be read" for image in own[:1] if index == 2})
    shard, manifest = folder.shard(index), folder.manifest(index)
    ShardWriter(shard, manifest, plan.fingerprint, "u1", plan.identity).publish(own, [unit], shard=index)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.fixture
def run(written: RunFolder, tmp_path: Path) -> RunFolder:
    shutil.copytree(written.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def join(folder: RunFolder, repack: bool = False, quarantine: float = 0.1) -> dict[str, Any]:
    plan = read_plan(folder.plan)
    consolidate(folder, plan, IDS, CLASSES, SpuriousConfig(), SingleProcess(), repack, quarantine)
    assert view_problem(folder.store, folder.store_manifest, plan.fingerprint) is None
    return read_sealed(folder.store_manifest, "")


def in_ranks(folder: RunFolder, ranks: int, code: str) -> subprocess.CompletedProcess[str]:
    command = mpi_command(ranks, [sys.executable, "-c", RANK + code, str(folder.path)])
    assert command
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}  # fmt: skip
    return subprocess.run(command, env={**os.environ, **allowed}, capture_output=True, text=True, timeout=300)


def test_one_two_and_four_ranks_give_equal_bytes(run: RunFolder, tmp_path: Path) -> None:
    """View, manifest and packed files."""
    found = []
    for ranks in (1, 2, 4):
        folder = RunFolder(tmp_path / str(ranks))
        shutil.copytree(run.path, folder.path)
        done = in_ranks(folder, ranks, WORK)
        assert done.returncode == 0, done.stderr
        assert f"{ranks} rank(s)" in done.stdout
        names = [folder.store, folder.store_manifest, *sorted(folder.packed.iterdir())]
        found.append({str(path.relative_to(folder.path)): path.read_bytes() for path in names})
    assert len(found[0]) == 2 + 4
    assert found[0] == found[1] == found[2]


def test_statistics_are_those_of_all_rows(run: RunFolder) -> None:
    recorded = join(run)
    rows = open_rows(run.store)
    assert (recorded["images"], recorded["quarantined"]) == (89, [67])
    names = ("weight", "sensitivity", "instability", "irrelevant", "misleading")
    flagged = {name: flag_segments(rows, SpuriousConfig(criteria=[name], share=1), 3) for name in names}
    assert all(mask.any() and not mask.all() for mask in flagged.values())
    assert recorded["spurious"]["z"] == 1 and recorded["spurious"]["weight"]["quantile"] == 0.8
    for label, own in [(None, np.ones(89, bool)), *((k, rows["label"] == k) for k in range(10))]:
        means = recorded["statistics"] if label is None else recorded["classes"][CLASSES[label]]
        magnitude = np.abs(rows["coefficients"][own, 0].astype(float))
        assert means["images"] == own.sum()
        assert means["mean_abs_coefficient"] == pytest.approx(np.nanmean(magnitude, axis=1).mean())
        assert means["score"] == pytest.approx(rows["score"][own, 0].mean())
        assert means["segments"] == pytest.approx(rows["num_segments"][own].mean())
        assert means["samples"] == 64
        for name, mask in flagged.items():
            shares = mask[own].sum(1) / rows["num_segments"][own]
            assert means[f"flagged_{name}"] == pytest.approx(shares.mean()), name


def test_packed_files_hold_the_same_rows_and_the_shards_stay(run: RunFolder) -> None:
    join(run)
    before, shards = open_rows(run.store), sorted(run.shards.iterdir())
    recorded = join(run, repack=True)
    name = generation([read_manifest(run.manifest(index)) for index in range(9)])
    assert list(recorded["sources"]) == [f"packed/{name}-{k:03d}.h5" for k in range(4)]
    assert sorted(run.shards.iterdir()) == shards
    for column, values in open_rows(run.store).items():
        assert values.dtype == before[column].dtype
        assert values.tobytes() == before[column].tobytes(), column
    with h5py.File(run.packed_file(name, 0)) as file:
        assert file["coefficients"].shape[1:] == (2, 6)  # as wide as the widest shard of all
        assert file.attrs["data_sha256"] == "d"
        assert all(file[each].fletcher32 and file[each].compression == "gzip" for each in before)
    packed = run.packed_file(name, 3)
    packed.write_bytes(packed.read_bytes()[:-1] + b"!")
    assert f"packed/{name}-003.h5 has changed" in str(
        view_problem(run.store, run.store_manifest, recorded["fingerprint"])
    )
    assert next(iter(join(run)["sources"])) == "shards/00000.h5"
    assert not list(run.packed.iterdir())  # no view lies over them any more


def test_a_full_disk_ends_repacking_with_one_clear_error(run: RunFolder, small_disk: Path) -> None:
    join(run)
    plan, store = read_plan(run.plan), run.store.read_bytes()
    (small_disk / "fill").write_bytes(bytes(100_000))
    run.packed.symlink_to(small_disk)
    with pytest.raises(OSError, match="No space left") as caught:
        consolidate(run, plan, IDS, CLASSES, SpuriousConfig(), SingleProcess(), True, 0.1)
    assert Path(caught.value.filename).parent == run.packed
    assert [path.name for path in small_disk.iterdir()] == ["fill"]
    assert run.store.read_bytes() == store
    assert view_problem(run.store, run.store_manifest, plan.fingerprint) is None


def test_every_shard_that_cannot_be_used_is_named(run: RunFolder) -> None:
    for index in (1, 2, 3):
        run.shard(index).unlink()
    run.manifest(5).unlink()
    run.shard(6).write_bytes(run.shard(6).read_bytes()[:-1])
    for suffix in ("h5", "json"):
        shutil.copy(run.shards / f"00000.{suffix}", run.shards / f"00008.{suffix}")
    with pytest.raises(InputError) as caught:
        join(run)
    assert str(caught.value) == (
        f"6 of 9 shards in {run.shards} cannot be used: 00001-00003 (missing), 00005 (its manifest is missing), "
        "00006 (its bytes differ from the manifest's digest), 00008 (a duplicate of 00000.h5); "
        f"run `python -m hpcguard.attribute {run.path}` to redo them"
    )
    assert not run.store.exists()
    assert not run.store_manifest.exists()


def test_a_shard_that_is_in_no_plan_is_named(run: RunFolder) -> None:
    shutil.copy(run.shard(0), run.shards / "00009.h5")
    with pytest.raises(InputError, match=r"1 files beside the plan's shards.* 00009\.h5; run `rm`"):
        join(run)
    assert not run.store.exists()


def test_too_many_quarantined_images_are_refused(run: RunFolder) -> None:
    with pytest.raises(InputError, match="1 of 90 images could not be explained"):
        join(run, quarantine=0.01)


@pytest.mark.parametrize("where", ["shard_problem", "pack_shards"])
def test_a_rank_that_dies_ends_the_job_without_a_store(run: RunFolder, where: str) -> None:
    """kill -9 of rank 1 in the middle of its shards, or of its packed files."""
    die = f"""
import os
true = stage.{where}
def mortal(path, *arguments, **options):
    if world.rank == 1 and (path == folder.shard(4) or path.name.endswith('-001.h5')):
        os.kill(os.getpid(), 9)
    return true(path, *arguments, **options)
stage.{where} = mortal
"""
    done = in_ranks(run, 2, die + WORK)
    assert done.returncode != 0
    assert "rank 1" in done.stderr + done.stdout
    assert not run.store.exists()
    assert not run.store_manifest.exists()
    assert json.loads(run.plan.read_text())
