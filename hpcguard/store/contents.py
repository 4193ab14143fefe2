"""What a store holds, in numbers; and whether its rows can be right."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from hpcguard.metrics.attribution import combine_statistics, row_statistics, summarise
from hpcguard.store.reading import StoreReader, open_file
from hpcguard.store.schema import COLUMN, rows_problem

NUMBERS = ("label", "predicted", "num_segments", "coefficients", "standard_error", "score", "num_samples")


def describe(reader: StoreReader, record: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of a whole store, read block by block; from record, its manifest or {}, what criteria flag."""
    files = reader.files()
    size = sum(path.stat().st_size for path in {*files, reader.store})
    height, width = reader.shapes["segments"][1:]
    about: dict[str, Any] = {
        "store": str(reader.store), "schema": reader.schema, "fingerprint": reader.fingerprint, "images": len(reader),
        "files": len(files), "bytes": size, "bytes_per_image": size / max(1, len(reader)), "height": height,
        "width": width, "explained_labels": reader.shapes["target"][1], "widest": reader.shapes["coefficients"][2],
    }  # fmt: skip
    if len(reader):
        ids, counts, samples = (reader.column(name) for name in ("image_id", "num_segments", "num_samples"))
        about |= {"image_id": _range(ids), "segments": _range(counts), "samples": _range(samples)}
        about |= _statistics(reader)
    return {**about, **_flagged(record), "columns": _columns(reader)}


def _flagged(record: Mapping[str, Any]) -> dict[str, Any]:
    """Share of segments that each criterion flags by itself, in all images and in those of each class."""

    def shares(means: Mapping[str, float]) -> dict[str, float]:
        return {key.removeprefix("flagged_"): value for key, value in means.items() if key.startswith("flagged_")}

    overall = shares(record.get("statistics", {}))
    classes = {name: shares(means) for name, means in record.get("classes", {}).items()}
    return {"spurious": {"thresholds": record["spurious"], "all": overall, "classes": classes}} if overall else {}


def _range(values: np.ndarray) -> dict[str, float]:
    return {"least": values.min().item(), "mean": float(values.mean()), "most": values.max().item()}


def _statistics(reader: StoreReader) -> dict[str, Any]:
    labels = reader.column("label")
    classes = int(max(labels.max(), reader.column("predicted").max())) + 1
    step = reader.block_rows(NUMBERS)
    parts = [
        row_statistics({name: reader.read(name, start, stop) for name in NUMBERS}, classes)
        for start, stop in reader.blocks(step)
    ]
    sums = combine_statistics(parts)
    return {
        "statistics": summarise(sums),
        "classes": {
            str(label): summarise({name: values[label : label + 1] for name, values in sums.items()})
            for label in np.unique(labels).tolist()
        },
    }


def _columns(reader: StoreReader) -> dict[str, Any]:
    stored = dict.fromkeys(reader.shapes, 0)
    filters = dict.fromkeys(reader.shapes, "")
    for path in reader.files():
        with open_file(path) as file:
            for name in stored:
                stored[name] += file[name].id.get_storage_size()
                filters[name] = _filters(file[name])
    return {
        name: {
            "dtype": reader.dtypes[name].name, "shape": list(shape), "bytes": len(reader) * reader.row_bytes([name]),
            "stored_bytes": stored[name], "filters": filters[name],
        }
        for name, shape in reader.shapes.items()
    }  # fmt: skip


def _filters(dataset: h5py.Dataset) -> str:
    """HDF5's own names: of those that are no part of it (zstd, blosc) h5py's attributes know nothing."""
    made = dataset.id.get_create_plist()
    named = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf", 32015: "zstd", 32026: "blosc2"}
    found = []
    for number in range(made.get_nfilters()):
        code, _, values, _ = made.get_filter(number)
        level = f"-{values[0]}" if code == 1 else ""
        found.append(f"{named.get(code, f'filter {code}')}{level}")
    chunks = f"chunks of {dataset.chunks[0]} rows" if dataset.chunks else "contiguous"
    return ", ".join([chunks, *found])


def stored_problem(reader: StoreReader, on_rows: Callable[[int], None] = lambda rows: None) -> str | None:
    """What is wrong with the rows of a store, or None: values that cannot be, an image that comes twice.

    Raises InputError where rows cannot be read.
    """
    if missing := [name for name in COLUMN if name not in reader.shapes]:
        return f"columns {', '.join(missing)} are missing"
    ids = np.sort(reader.column("image_id"))
    if twice := ids[1:][ids[1:] == ids[:-1]].tolist():
        return f"image {twice[0]} has several rows"
    step = max(1024, reader.block_rows(tuple(COLUMN)))
    for start, stop in reader.blocks(step):
        if problem := rows_problem({name: reader.read(name, start, stop) for name in COLUMN}):
            return f"rows {start} to {stop - 1}: {problem}"
        on_rows(stop - start)
    return None


def rows_of(reader: StoreReader, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Row numbers of images, ascending, and the ids that have no row."""
    held = reader.column("image_id")
    absent = sorted({int(each) for each in ids} - set(held[np.isin(held, ids)].tolist()))
    return np.flatnonzero(np.isin(held, ids)), absent
