"""Shards that verify or are refused, views over them, and the Dataset that joins them with images."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest

from hpcguard.config import DataConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.runs import digest_file, read_json, read_sealed, write_sealed
from hpcguard.store import AttributionDataset, ShardWriter, Unit, build_view, open_rows, shard_problem, view_problem
from hpcguard.store.schema import COLUMN, rows_from


def make_rows(ids: np.ndarray, segments: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plausible rows; the last image has one segment less than the others."""
    generator = np.random.default_rng([seed, int(ids[0])])
    count = np.full(len(ids), segments)
    count[-1] -= 1
    maps = generator.integers(0, count[:, None, None], (len(ids), 8, 8))
    coefficients = generator.normal(size=(len(ids), 2, segments))
    coefficients[-1, :, -1] = np.nan
    flat = {name: generator.random((len(ids), 2)) for name in ("probability", "intercept", "score")}
    return {
        "image_id": ids, "label": ids % 10, "predicted": ids % 7, "segments": maps, "num_segments": count,
        "target": np.stack([ids % 10, (ids + 1) % 10], 1), "coefficients": coefficients,
        "standard_error": np.abs(coefficients), "interval": 2 * np.abs(coefficients),
        "sensitivity": np.abs(coefficients[:, 0]), "instability": np.full((len(ids), segments), np.nan),
        "effective_samples": generator.uniform(1, 64, len(ids)), "num_samples": np.full(len(ids), 64), **flat,
    }  # fmt: skip


def write(folder: Path, index: int, ids: np.ndarray, segments: int = 5) -> tuple[Path, Path]:
    path, manifest = folder / f"shards/{index}.h5", folder / f"shards/{index}.json"
    writer = ShardWriter(path, manifest, "print")
    writer.publish(ids, [Unit(make_rows(unit, segments), 1.5) for unit in np.array_split(ids, 2)])
    return path, manifest


def test_a_shard_reads_back_in_the_types_of_the_schema(tmp_path: Path) -> None:
    ids = np.arange(10, 20)
    path, manifest = write(tmp_path, 0, ids)
    assert shard_problem(path, manifest, ids, "print") is None
    rows = open_rows(path)
    expected = [make_rows(unit, 5) for unit in np.array_split(ids, 2)]
    for name, column in COLUMN.items():
        assert rows[name].dtype == np.dtype(column.dtype)
        joined = np.concatenate([unit[name] for unit in expected]).astype(column.dtype)
        assert np.array_equal(rows[name], joined, equal_nan=column.dtype.startswith("f"))
    with h5py.File(path) as file:
        assert all(file[name].fletcher32 and file[name].compression == "gzip" for name in COLUMN)
    assert sorted(p.name for p in path.parent.iterdir()) == ["0.h5", "0.json"]


def test_units_of_different_width_are_padded_with_nan(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print")
    writer.publish(np.arange(6), [Unit(make_rows(np.arange(3), 4), 1.5), Unit(make_rows(np.arange(3, 6), 6), 1.5)])
    coefficients = open_rows(tmp_path / "0.h5", ["coefficients"])["coefficients"]
    assert coefficients.shape == (6, 2, 6)
    assert np.isnan(coefficients[:3, :, 4:]).all()
    assert np.isfinite(coefficients[:2, :, :4]).all()


@pytest.mark.parametrize("column", ["image_id", "segments", "coefficients", "num_segments"])
def test_every_flipped_bit_is_found(tmp_path: Path, column: str) -> None:
    ids = np.arange(10)
    path, manifest = write(tmp_path, 0, ids)
    whole = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk = file[column].id.get_chunk_info(0)
    for position in (0, 8, chunk.byte_offset + chunk.size // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        assert shard_problem(path, manifest, ids, "print") == "its bytes differ from the manifest's digest"


def test_a_wrong_or_torn_shard_says_why(tmp_path: Path) -> None:
    ids = np.arange(10)
    path, manifest = write(tmp_path, 0, ids)
    assert shard_problem(path, manifest, ids, "other") == "made by another plan"
    assert shard_problem(path, manifest, ids + 1, "print") == "holds other image ids than planned"
    path.write_bytes(path.read_bytes()[:-100])
    assert "differ" in str(shard_problem(path, manifest, ids, "print"))
    # Even with a digest that fits, a file that HDF5 cannot read is refused.
    write_sealed(manifest, {**read_sealed(manifest, ""), "sha256": digest_file(path)})
    assert shard_problem(path, manifest, ids, "print") is not None
    manifest.write_text(manifest.read_text()[:20])
    assert "damaged" in str(shard_problem(path, manifest, ids, "print"))
    manifest.unlink()
    assert shard_problem(path, manifest, ids, "print") == "its manifest is missing"
    path.unlink()
    assert shard_problem(path, manifest, ids, "print") == "missing"


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [("coefficients", np.nan, "NaN"), ("probability", np.inf, "NaN or infinite"), ("num_segments", 0, "outside"),
     ("segments", 5, "labels past"), ("sensitivity", np.nan, "sensitivity holds NaN"),
     ("instability", 0.5, "instability holds NaN"), ("standard_error", -1, "standard_error lies outside 0"),
     ("interval", -1, "interval lies outside 0"), ("probability", 1.1, "probability lies outside"),
     ("score", 1.1, "score lies outside"), ("label", 1, "does not begin with the true class"),
     ("label", -1, "label is no class"), ("predicted", -1, "predicted is no class"),
     ("target", -9, "target is no class"), ("num_samples", 0, "num_samples is 0")],
)  # fmt: skip
def test_impossible_rows_are_never_published(tmp_path: Path, column: str, value: float, reason: str) -> None:
    ids = np.arange(4)
    rows = make_rows(ids, 5)
    rows[column].reshape(-1)[0] = value
    writer = ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print")
    with pytest.raises(RuntimeError, match=reason):
        writer.publish(ids, [Unit(rows, 1.5)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("column", ["coefficients", "standard_error", "interval", "sensitivity"])
def test_values_past_the_last_segment_are_refused(tmp_path: Path, column: str) -> None:
    """A mean over them would count segments that are not there."""
    rows = make_rows(np.arange(4), 5)
    assert np.isnan(rows[column][-1, ..., -1]).all()
    rows[column][-1, ..., -1] = 1
    with pytest.raises(RuntimeError, match=f"{column} has values past num_segments"):
        ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print").publish(np.arange(4), [Unit(rows, 1.5)])


def test_a_label_of_no_class_is_a_problem_where_the_classes_are_known(tmp_path: Path) -> None:
    path, manifest = write(tmp_path, 0, np.arange(10))
    assert shard_problem(path, manifest, np.arange(10), "print", classes=10) is None
    found = shard_problem(path, manifest, np.arange(10), "print", classes=9)
    assert found == "label is no class: it lies outside 0 to 8"


def test_what_was_not_computed_is_nan_everywhere_and_what_was_is_padded(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print")
    units = [make_rows(np.arange(3), 4), make_rows(np.arange(3, 5), 6)]
    writer.publish(np.arange(5), [Unit(unit, 1.5) for unit in units])
    assert shard_problem(tmp_path / "0.h5", tmp_path / "0.json", np.arange(5), "print") is None
    rows = open_rows(tmp_path / "0.h5")
    assert rows["sensitivity"].shape == rows["instability"].shape == (5, 6)
    assert np.isnan(rows["instability"]).all()
    assert np.isnan(rows["sensitivity"][:3, 4:]).all()
    assert np.array_equal(rows["sensitivity"][:3, :4], units[0]["sensitivity"].astype("f4"), equal_nan=True)
    assert np.array_equal(rows["sensitivity"][3:], units[1]["sensitivity"].astype("f4"), equal_nan=True)


def test_labels_that_do_not_fit_eight_bits_are_not_published(tmp_path: Path) -> None:
    ids = np.arange(2)
    rows = make_rows(ids, 300)
    rows["segments"][0, 0, 0] = 298
    writer = ShardWriter(tmp_path / "0.h5", tmp_path / "0.json", "print", segments_dtype="u1")
    with pytest.raises(RuntimeError, match="segments differs"):
        writer.publish(ids, [Unit(rows, 1.5)])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two shards, the second wider than the first, under a view."""
    run = tmp_path / "run"
    parts = [write(run, 0, np.arange(6), 4), write(run, 1, np.arange(6, 10), 7)]
    shards, manifests = [part[0] for part in parts], [read_json(part[1], "") for part in parts]
    build_view(run / "store.h5", shards, manifests, "print")
    sources = {f"shards/{k}.h5": manifests[k]["sha256"] for k in range(2)}
    record = {"schema": 2, "sha256": digest_file(run / "store.h5"), "sources": sources, "fingerprint": "print"}
    write_sealed(run / "store.json", record)
    return run / "store.h5"


def test_the_view_joins_shards_of_different_width_and_survives_a_move(store: Path, tmp_path: Path) -> None:
    shutil.move(store.parent, tmp_path / "moved")
    rows = open_rows(tmp_path / "moved/store.h5")
    assert rows["image_id"].tolist() == list(range(10))
    assert rows["coefficients"].shape == (10, 2, 7)
    assert np.isnan(rows["coefficients"][:6, :, 4:]).all()
    narrow = open_rows(tmp_path / "moved/shards/0.h5")
    assert np.array_equal(rows["coefficients"][:6, :, :4], narrow["coefficients"], equal_nan=True)
    assert np.array_equal(rows["segments"][:6], narrow["segments"])


def test_a_view_over_a_missing_or_changed_shard_is_refused(store: Path) -> None:
    manifest = store.with_suffix(".json")
    assert view_problem(store, manifest, "print") is None
    assert "another plan" in str(view_problem(store, manifest, "other"))
    shard = store.parent / "shards/1.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "has changed" in str(view_problem(store, manifest, "print"))
    shard.unlink()
    # The reason for the check: HDF5 itself reads fill values without a word.
    assert (open_rows(store, ["image_id"])["image_id"][6:] == -1).all()
    assert "shards/1.h5 is missing" in str(view_problem(store, manifest, "print"))


def test_the_dataset_joins_by_image_id(store: Path) -> None:
    images = load_images(DataConfig(), "train").subset([8, 2, 5])
    dataset = AttributionDataset(store, images)
    rows = open_rows(store)
    dataset.flagged[1] = [True, False, False, False, False, False, True]
    assert len(dataset) == 3
    for position, image_id in enumerate([2, 5, 8]):
        item = dataset[position]
        assert np.array_equal(item["segments"], rows["segments"][image_id])
        assert np.array_equal(item["image"], images.images([image_id])[0])
        assert int(item["label"]) == images.labels_of([image_id])[0]
    assert dataset.batch(np.array([2, 1]))["flagged"].tolist()[1] == dataset.flagged[1].tolist()


def test_an_image_without_a_row_is_refused(store: Path) -> None:
    images = load_images(DataConfig(), "train").subset([3, 11])
    with pytest.raises(InputError, match=r"no row for 1 of 2 images \(first id 11\)"):
        AttributionDataset(store, images)


def test_manifests_describe_the_file(tmp_path: Path) -> None:
    path, manifest = write(tmp_path, 0, np.arange(10))
    recorded = json.loads(manifest.read_text())
    assert recorded["sha256"] == digest_file(path)
    assert recorded["rows"] == 10
    assert recorded["columns"]["coefficients"] == ["<f4", [10, 2, 5]]


def test_estimates_of_spread_keep_twelve_bits() -> None:
    """And what is written as coefficients and errors is exact."""
    values = np.array([[[1.0, 1 / 3, 1e-20, 7e9, np.nan, 0.0]]], np.float32)
    explained = SimpleNamespace(
        **{name: np.zeros(1) for name in COLUMN}, image_ids=np.zeros(1), targets=np.zeros((1, 1))
    )
    explained.coefficients = explained.standard_error = explained.interval = values
    rows = rows_from(explained, np.zeros(1), sensitivity=values[:, 0], instability=None)  # type: ignore[arg-type]
    assert rows["coefficients"] is values and rows["standard_error"] is values
    for kept in (rows["interval"][0, 0], rows["sensitivity"][0]):
        assert kept[[0, 4, 5]].tolist() == pytest.approx([1.0, np.nan, 0.0], nan_ok=True, abs=0)
        assert kept[1:4] == pytest.approx(values[0, 0, 1:4], rel=2.0**-12)
        assert kept[1] != values[0, 0, 1]
        assert not (np.ascontiguousarray(kept).view(np.uint32) & 0xFFF).any()
    assert np.isnan(rows["instability"]).all()
