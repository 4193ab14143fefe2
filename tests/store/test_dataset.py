"""Reading a store to train from: joined by id, shuffled in blocks, shared by ranks and workers, disk or memory."""

import itertools
import os
import pickle
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hpcguard.data.image_set import ArrayPixels, ImageSet
from hpcguard.errors import InputError
from hpcguard.refinement.masking import flagged_pixels
from hpcguard.runs import read_json
from hpcguard.store import (
    AttributionDataset,
    BlockShuffled,
    ShardWriter,
    StoreReader,
    Unit,
    build_view,
    pack_shards,
    store_shapes,
)
from hpcguard.store import dataset as dataset_module
from hpcguard.store.schema import COLUMN

SIZES, WIDTHS = (70, 33, 97), (5, 9, 7)  # rows and segments of three shards: 200 rows, ids with gaps


def make_rows(ids: np.ndarray, segments: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(int(ids[0]))
    shape = {"N": len(ids), "L": 2, "S": segments, "H": 6, "W": 5}
    rows = {name: random.random([shape[axis] for axis in column.axes]) for name, column in COLUMN.items()}
    count = random.integers(2, segments + 1, len(ids))
    past = np.arange(segments) >= count[:, None]
    for name, column in COLUMN.items():
        if column.axes in ("NLS", "NS"):
            hidden = past[:, None] if column.axes == "NLS" else past
            rows[name][np.broadcast_to(hidden, rows[name].shape)] = np.nan
        elif column.dtype[0] in "iu":
            rows[name] = random.integers(0, 10, rows[name].shape)
    maps = random.integers(0, count[:, None, None], (len(ids), 6, 5))
    rows["target"][:, 0] = ids % 10
    rows["num_samples"] += 1
    return {**rows, "image_id": ids, "label": ids % 10, "num_segments": count, "segments": maps}


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.sort(np.random.default_rng(1).permutation(1000)[: sum(SIZES)])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, ids: np.ndarray) -> Path:
    run = tmp_path_factory.mktemp("run")
    shards, manifests, start = [], [], 0
    for index, (size, width) in enumerate(zip(SIZES, WIDTHS, strict=True)):
        own = ids[start : start + size]
        start += size
        path, manifest = run / f"shards/{index}.h5", run / f"shards/{index}.json"
        ShardWriter(path, manifest, "print", "u1").publish(own, [Unit(make_rows(own, width), 1.0)])
        shards.append(path)
        manifests.append(read_json(manifest, ""))
    build_view(run / "store.h5", shards, manifests, "print")
    return run / "store.h5"


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Image i has i in every pixel."""
    array = np.broadcast_to(np.arange(1000)[:, None, None, None] % 256, (1000, 1, 6, 5)).astype(np.uint8)
    every = np.arange(1000)
    return ImageSet("own", "train", tuple("0123456789"), every, every % 10, (1, 6, 5), ArrayPixels(array, 255))


@pytest.fixture(scope="module")
def plain(store: Path) -> dict[str, np.ndarray]:
    """What h5py alone reads through the view."""
    with h5py.File(store) as file:
        return {name: file[name][:] for name in COLUMN}


def equals_plain(batch: dict[str, torch.Tensor], plain: dict[str, np.ndarray]) -> bool:
    rows = np.searchsorted(plain["image_id"], batch["image_id"].numpy())
    same = [np.array_equal(batch["image_id"].numpy(), plain["image_id"][rows])]
    for name in ("segments", "coefficients", "label"):
        same.append(np.array_equal(batch[name].numpy(), plain[name][rows], equal_nan=name == "coefficients"))
    shown = (batch["image"][:, 0, 0, 0] * 255).round().long()
    return all(same) and torch.equal(shown, batch["image_id"] % 256)


def test_the_reader_gives_what_h5py_gives(store: Path, plain: dict[str, np.ndarray]) -> None:
    reader = StoreReader(store)
    random = np.random.default_rng(0)
    for rows in (np.arange(200), np.arange(60, 80), random.permutation(200), random.integers(0, 200, 50), rows_none()):
        for name in COLUMN:
            assert np.array_equal(reader.rows(name, rows), plain[name][rows], equal_nan=COLUMN[name].dtype[0] == "f")
    assert all(np.array_equal(reader.column(n), plain[n], equal_nan=COLUMN[n].dtype[0] == "f") for n in COLUMN)
    starts = list(reader.blocks(32))
    assert sum(stop - start for start, stop in starts) == 200 and (64, 70) in starts and (70, 102) in starts


def rows_none() -> np.ndarray:
    return np.zeros(0, np.int64)


def test_few_files_are_open_at_a_time(
    store: Path, plain: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcguard.store import reading

    monkeypatch.setattr(reading, "MOST_OPEN", 1)
    reader = StoreReader(store)
    rows = np.random.default_rng(0).permutation(200)
    for chosen in np.array_split(rows, 20):
        assert np.array_equal(reader.rows("segments", chosen), plain["segments"][chosen])
    held = {os.path.realpath(each) for each in Path("/proc/self/fd").iterdir()}
    assert sum(str(store.parent) in path for path in held) <= 1


@pytest.mark.parametrize("memory", [False, True])
def test_batches_hold_the_rows_of_their_images(
    store: Path, images: ImageSet, ids: np.ndarray, plain: dict[str, np.ndarray], memory: bool
) -> None:
    own = images.subset(ids[::3])
    dataset = AttributionDataset(store, own, memory=memory)
    dataset.flagged[:, 0] = True
    chosen = np.array([5, 2, 40, 41, 66, 2])
    batch = dataset.batch(chosen)
    assert equals_plain(batch, plain)
    assert batch["image_id"].tolist() == ids[::3][chosen].tolist()
    assert all(values.is_contiguous() for values in batch.values())
    assert batch["segments"].dtype == torch.uint8 and batch["coefficients"].dtype == torch.float32
    expected = torch.from_numpy(plain["segments"][::3][chosen] == 0)
    assert torch.equal(flagged_pixels(batch["flagged"], batch["segments"])[:, 0], expected)
    assert torch.equal(dataset[40]["segments"], batch["segments"][2])
    assert np.array_equal(dataset[-1]["image_id"], ids[::3][-1])
    assert np.array_equal(dataset.rows["standard_error"], plain["standard_error"][::3], equal_nan=True)
    for name in ("interval", "sensitivity", "instability", "segments"):  # read where asked for
        column = dataset.rows[name]
        assert column.shape == plain[name][::3].shape and len(column) == len(dataset)
        assert np.array_equal(column[3:20], plain[name][::3][3:20], equal_nan=name != "segments")
    assert set(AttributionDataset(store, own, [], memory).batch(chosen)) == set(batch) - {"segments", "coefficients"}


def test_small_stores_are_held_and_large_ones_are_not(
    store: Path, images: ImageSet, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = images.subset(ids)
    bytes_of_all = 200 * (30 + 2 * 9 * 4)
    for limit, held in ((bytes_of_all, True), (bytes_of_all - 1, False)):
        monkeypatch.setattr(dataset_module, "HELD_BYTES", limit)
        assert AttributionDataset(store, own).memory is held
    assert len(pickle.dumps(AttributionDataset(store, own, memory=True))) < len(pickle.dumps(own)) + 20_000


def test_more_than_256_segments_are_sixteen_bits(tmp_path: Path, images: ImageSet) -> None:
    ids = np.arange(4)
    rows = make_rows(ids, 300)
    rows["num_segments"][0], rows["segments"][0, 0, 0] = 300, 299
    for name, column in COLUMN.items():
        if column.axes in ("NLS", "NS"):
            rows[name][0] = 1.0
    ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print").publish(ids, [Unit(rows, 1.0)])
    dataset = AttributionDataset(tmp_path / "0.h5", images.subset(ids))
    dataset.flagged[0, 299] = True
    loaded = next(iter(DataLoader(dataset, batch_size=4)))
    assert loaded["segments"].dtype == torch.uint16
    pixels = flagged_pixels(loaded["flagged"], loaded["segments"])
    assert pixels.sum() == (rows["segments"][0] == 299).sum() and pixels[0, 0, 0, 0]


def test_a_missing_or_damaged_source_is_an_error_and_never_fill_values(
    store: Path, images: ImageSet, ids: np.ndarray, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(store.parent, run)
    shard = run / "shards/1.h5"
    with h5py.File(shard) as file:
        chunk = file["segments"].id.get_chunk_info(0)
    whole = bytearray(shard.read_bytes())
    whole[chunk.byte_offset + chunk.size // 2] ^= 1
    shard.write_bytes(whole)
    dataset = AttributionDataset(run / "store.h5", images.subset(ids), memory=False)
    assert len(dataset.batch(np.arange(20))["segments"]) == 20
    with pytest.raises(InputError, match=r"shards/1\.h5: segments cannot be read .*--verify"):
        dataset.batch(np.array([70]))
    shard.unlink()
    with pytest.raises(InputError, match=r"1\.h5: image_id cannot be read"):
        AttributionDataset(run / "store.h5", images.subset(ids))


def test_rows_of_other_images_are_not_joined(store: Path, images: ImageSet, ids: np.ndarray, tmp_path: Path) -> None:
    own = images.subset(ids)
    with pytest.raises(InputError, match=r"200 of 200 images have another class .* \(image \d+: \d, there \d\)"):
        AttributionDataset(store, replace(own, labels=(own.labels + 1) % 10))
    larger = ArrayPixels(np.zeros((1000, 1, 8, 8), np.uint8), 255)
    with pytest.raises(InputError, match=r"explains images of 6x5, own has 8x8"):
        AttributionDataset(store, replace(own, shape=(1, 8, 8), pixels=larger))
    twice = np.array([4, 4])
    writer = ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print")
    writer.publish(twice, [Unit(make_rows(twice, 3), 1.0)])
    with pytest.raises(InputError, match="image 4 has several rows"):
        AttributionDataset(tmp_path / "0.h5", images.subset([4]))


@pytest.mark.parametrize("changed", ["fingerprint", "schema", "rows"])
def test_a_source_that_was_replaced_is_an_error(
    store: Path, images: ImageSet, ids: np.ndarray, tmp_path: Path, changed: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(store.parent, run)
    shard = run / "shards/1.h5"
    if changed == "rows":
        shutil.copy(run / "shards/2.h5", shard)
    else:
        with h5py.File(shard, "r+") as file:
            file.attrs[changed] = "other" if changed == "fingerprint" else 3
    with pytest.raises(InputError, match=r"1\.h5: not the file that .*store\.h5 was made over"):
        AttributionDataset(run / "store.h5", images.subset(ids))


# ------------------------------------------------------------------------------------------------ block-shuffled
def epoch_of(dataset: AttributionDataset, workers: int, world: int, epoch: int, **options: Any) -> list[list[int]]:
    """Ids of every batch, rank after rank."""
    found = []
    for rank in range(world):
        blocks = BlockShuffled(dataset, rank=rank, world=world, **options)
        blocks.set_epoch(epoch)
        batches = [batch["image_id"].tolist() for batch in DataLoader(blocks, batch_size=None, num_workers=workers)]
        assert len(batches) == len(blocks)
        found += batches
    return found


def joined(batches: Iterable[Iterable[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


class Worker:
    """What torch tells a DataLoader's worker."""

    def __init__(self, number: int, workers: int) -> None:
        self.id, self.num_workers = number, workers


@settings(max_examples=60, deadline=None)
@given(
    taken=st.integers(1, 200), world=st.integers(1, 9), workers=st.integers(1, 5), batch=st.integers(1, 70),
    block=st.integers(1, 80), shuffled=st.integers(1, 300), epoch=st.integers(0, 3), memory=st.booleans(),
)  # fmt: skip
def test_every_row_comes_once_an_epoch(
    store: Path, images: ImageSet, ids: np.ndarray, taken: int, world: int, workers: int, batch: int, block: int,
    shuffled: int, epoch: int, memory: bool,
) -> None:  # fmt: skip
    own = np.sort(np.random.default_rng(taken).permutation(ids)[:taken])
    dataset = AttributionDataset(store, images.subset(own), ["segments"], memory)
    counts, batches, alone = [], [], []
    for rank in range(world):
        blocks = BlockShuffled(dataset, batch, 7, rank, world, shuffled_rows=shuffled, block_rows=block)
        blocks.set_epoch(epoch)
        mine = [each for number in range(workers) for each in as_worker(blocks, number, workers)]
        assert len(mine) == len(blocks)
        assert all(len(each) == batch for each in mine[:-1])
        alone += as_worker(blocks, 0, 1)
        batches += mine
        counts.append(sum(map(len, mine)))
    assert sorted(joined(batches)) == own.tolist()
    assert max(counts) - min(counts) <= 1
    assert sorted(batches) == sorted(alone)  # the number of workers changes no batch
    for rank in range(world):
        whole = BlockShuffled(dataset, batch, 7, rank, world, True, shuffled, block)
        kept = [each for number in range(workers) for each in as_worker(whole, number, workers)]
        assert [len(each) for each in kept] == [batch] * (taken // world // batch)


def as_worker(blocks: BlockShuffled, number: int, workers: int) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpcguard.store.blocks.get_worker_info", lambda: Worker(number, workers))
        return [batch["image_id"].tolist() for batch in blocks]


def test_order_depends_on_seed_and_epoch_alone_and_is_shuffled(store: Path, images: ImageSet, ids: np.ndarray) -> None:
    disk, held = (AttributionDataset(store, images.subset(ids), memory=memory) for memory in (False, True))
    options = {"batch_size": 16, "block_rows": 16, "shuffled_rows": 64}
    first = epoch_of(disk, 0, 1, 0, **options)
    assert first == epoch_of(held, 0, 1, 0, **options) == epoch_of(pickle.loads(pickle.dumps(disk)), 0, 1, 0, **options)
    assert first != epoch_of(disk, 0, 1, 1, **options) and first != epoch_of(disk, 0, 1, 0, seed=1, **options)
    order = np.searchsorted(ids, joined(first))
    assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.6
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.1


def test_each_chunk_is_decoded_once(
    store: Path, images: ImageSet, ids: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = AttributionDataset(store, images.subset(ids), ["segments"], memory=False)
    read: list[tuple[int, int]] = []
    original = StoreReader._read

    def counted(self: StoreReader, name: str, piece: Any, start: int, stop: int, out: np.ndarray) -> None:
        read.append((start, stop))
        original(self, name, piece, start, stop, out)

    monkeypatch.setattr(StoreReader, "_read", counted)
    list(BlockShuffled(dataset, 7, shuffled_rows=50))
    covered = np.concatenate([np.arange(start, stop) for start, stop in read])
    assert sorted(covered.tolist()) == list(range(200))


SORTED = 12_288


@pytest.fixture(scope="module")
def sorted_store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, ImageSet]:
    """Six shards of many chunks, images in the order of 80 classes as folders give them; and the same packed."""
    run, every = tmp_path_factory.mktemp("sorted"), np.arange(SORTED)
    labels = every * 80 // SORTED
    some = make_rows(every[:2048], 4)
    maps = np.random.default_rng(0).integers(0, 2, (2048, 16, 16))
    shards, manifests = [], []
    for start in range(0, SORTED, 2048):
        own = every[start : start + 2048]
        rows = {**some, "segments": maps, "image_id": own, "label": labels[own]}
        rows["target"] = np.stack([labels[own], labels[own] + 1], 1)
        shards.append(run / f"shards/{start}.h5")
        writer = ShardWriter(shards[-1], shards[-1].with_suffix(".json"), "print", "u1")
        manifests.append(writer.publish(own, [Unit(rows, 1.0)]))
    build_view(run / "store.h5", shards, manifests, "print")
    digests = {shard: manifest["sha256"] for shard, manifest in zip(shards, manifests, strict=True)}
    packed = [pack_shards(run / "packed.h5", digests, store_shapes(manifests), "print", {})]
    build_view(run / "over.h5", [run / "packed.h5"], packed, "print")
    pixels = ArrayPixels(np.zeros((SORTED, 1, 16, 16), np.uint8), 255)
    return (
        run / "store.h5",
        run / "over.h5",
        ImageSet("sorted", "train", tuple(map(str, range(80))), every, labels, (1, 16, 16), pixels),
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_of_images_sorted_by_class_has_nearly_as_many_classes_as_of_shuffled_ones(
    sorted_store: tuple[Path, Path, ImageSet], packed: bool
) -> None:
    images = sorted_store[2]
    dataset = AttributionDataset(sorted_store[packed], images, memory=False)
    found = np.mean([len(batch["label"].unique()) for batch in BlockShuffled(dataset, 64)])
    whole = np.random.default_rng(0).permutation(images.labels).reshape(-1, 64)
    shuffled = np.mean([len(set(row)) for row in whole.tolist()])
    assert 42 < shuffled < 46
    assert found > 0.7 * shuffled


@pytest.mark.parametrize(("world", "workers"), [(1, 1), (1, 3), (2, 2), (4, 1)])
def test_a_chunk_is_decoded_again_only_where_a_reader_ends(
    sorted_store: tuple[Path, Path, ImageSet], monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    """Shards of 16 chunks of 128 rows; blocks of one chunk; parts of 1,024 rows, more than there are readers."""
    dataset = AttributionDataset(sorted_store[0], sorted_store[2], ["segments"], memory=False)
    assert dataset.reader.chunk_rows("segments") == 128
    decoded: list[tuple[Path, int]] = []
    original = StoreReader._read

    def counted(self: StoreReader, name: str, piece: Any, start: int, stop: int, out: np.ndarray) -> None:
        chunks = range((start - piece.start) // 128, -(-(stop - piece.start) // 128))
        decoded.extend((piece.path, chunk) for chunk in chunks)
        original(self, name, piece, start, stop, out)

    monkeypatch.setattr(StoreReader, "_read", counted)
    seen = []
    for rank in range(world):
        blocks = BlockShuffled(dataset, 60, rank=rank, world=world, shuffled_rows=1000, block_rows=128)
        seen += [image for number in range(workers) for each in as_worker(blocks, number, workers) for image in each]
    assert sorted(seen) == list(range(SORTED))
    assert len(set(decoded)) == SORTED // 128
    assert len(decoded) <= SORTED // 128 + world * workers - 1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_four_workers_read_the_same_rows_at_once(
    store: Path, images: ImageSet, ids: np.ndarray, plain: dict[str, np.ndarray], start: str
) -> None:
    dataset = AttributionDataset(store, images.subset(ids), memory=False)
    dataset.batch(np.arange(0, 200, 9))  # files are open in the parent
    dataset.flagged[:] = np.arange(9) < (ids % 5)[:, None]
    blocks = BlockShuffled(dataset, 12, seed=3, block_rows=16, shuffled_rows=64)
    alone = {tuple(batch["image_id"].tolist()) for batch in blocks}
    loader = DataLoader(blocks, batch_size=None, num_workers=4, multiprocessing_context=start, persistent_workers=True)
    orders = []
    for epoch in (0, 1):
        blocks.set_epoch(epoch)
        batches = list(loader)
        assert all(equals_plain(batch, plain) for batch in batches)
        assert all(torch.equal(b["flagged"], torch.arange(9) < (b["image_id"] % 5)[:, None]) for b in batches)
        orders.append({tuple(batch["image_id"].tolist()) for batch in batches})
        assert sorted(joined(orders[-1])) == ids.tolist()
    assert orders[0] == alone != orders[1]
    # At the same time the parent goes on with its own files, and map-style workers read too.
    mapped = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=4, multiprocessing_context=start)
    seen = []
    for batch in mapped:
        assert equals_plain(batch, plain) and equals_plain(dataset.batch(np.arange(8)), plain)
        seen += batch["image_id"].tolist()
    assert sorted(seen) == ids.tolist()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 4, "rank": 2, "world": 2}])
def test_impossible_sizes_are_refused(store: Path, images: ImageSet, ids: np.ndarray, wrong: dict[str, int]) -> None:
    dataset = AttributionDataset(store, images.subset(ids))
    with pytest.raises(InputError, match="sizes are at least 1"):
        BlockShuffled(dataset, **wrong)
    with pytest.raises(InputError, match="columns score are not decoded"):
        AttributionDataset(store, images.subset(ids), ["score"])
