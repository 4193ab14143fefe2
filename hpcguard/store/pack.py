"""Packed files: verified shards copied into few large files, in chunks and widths made for training."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import digest_file, digest_json, publish, to_disk
from hpcguard.store.schema import COLUMN, COLUMNS, COMPRESSION, attributes, packed_chunk_rows
from hpcguard.store.shard import LIBVER, row_blocks
from hpcguard.store.sink import Sink, new_file

PACKED_BYTES = 256 << 20  # of a packed file, about
FEWEST = 4  # packed files, so that several ranks have something to do; fewer where there are fewer shards
CACHE = 16 << 20  # bytes: a chunk that two shards share is compressed once


def group_shards(sizes: Sequence[int]) -> list[range]:
    """Which shards each packed file holds, by the bytes of the shards alone."""
    count = min(len(sizes), max(FEWEST, -(-sum(sizes) // PACKED_BYTES)))
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * k / count)) for k in range(1, count)), len(sizes)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start]


def generation(manifests: Sequence[Mapping[str, Any]]) -> str:
    """A name for the packed files of these shards: of others, or by another HDF5, there are others beside them."""
    return digest_json([h5py.version.hdf5_version, *(manifest["sha256"] for manifest in manifests)])[:12]


def pack_shards(
    target: Path,
    shards: Mapping[Path, str],
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    fingerprint: str,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Publish one packed file, compared with its shards; its digest, size, rows and columns.

    shards: their digests. shapes: a row of each column, see view.store_shapes. Memory: a block of rows and a chunk of
    each column. Raises OSError where the disk is full, InputError if a shard has changed since it was verified, or if
    what was written is not what was read.
    """
    total = sum(_rows(shard) for shard in shards)
    with publish(target) as temporary:
        with new_file(temporary, target, libver=LIBVER, rdcc_nbytes=CACHE) as (file, sink):
            file.attrs.update(attributes(fingerprint, identity))
            _create(file, shapes, total)
            _copy(file, sink, shards)
        to_disk(temporary)
        with h5py.File(temporary, "r", rdcc_nbytes=CACHE) as file:
            if problem := _difference(file, list(shards)):
                raise InputError(f"{target}: written and read back, but {problem}; check the disk, and run it again")
        for shard, digest in shards.items():  # after they were read twice, and the same both times
            if digest_file(shard) != digest:
                raise InputError(f"{shard}: changed since it was verified; run `python -m hpcguard.attribute` again")
        packed = {"sha256": digest_file(temporary), "bytes": temporary.stat().st_size, "rows": total}
    columns = {name: [dtype.str, [total, *rest]] for name, (dtype, rest) in shapes.items()}
    return {**packed, "columns": columns}


def _rows(shard: Path) -> int:
    with h5py.File(shard, "r") as file:
        return len(file["image_id"])


def _create(file: h5py.File, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], total: int) -> None:
    chunks = packed_chunk_rows(shapes, total)
    for column in COLUMNS:
        dtype, rest = shapes[column.name]
        file.create_dataset(
            column.name, (total, *rest), dtype, chunks=(chunks[column.name], *rest),
            fillvalue=np.array(column.fill).astype(dtype), **COMPRESSION,
        )  # fmt: skip


def _copy(file: h5py.File, sink: Sink, shards: Iterable[Path]) -> None:
    start, sets = 0, _sets(file)
    for shard in shards:
        with h5py.File(shard, "r") as source:
            for rows in row_blocks(_sets(source)):
                stop = start + len(rows["image_id"])
                for name, values in rows.items():
                    sets[name][start:stop, *(slice(size) for size in values.shape[1:])] = values
                sink.check()
                start = stop


def _difference(file: h5py.File, shards: Sequence[Path]) -> str | None:
    start, sets = 0, _sets(file)
    for shard in shards:
        with h5py.File(shard, "r") as source:
            for rows in row_blocks(_sets(source)):
                stop = start + len(rows["image_id"])
                for name, values in rows.items():
                    written = sets[name][start:stop]
                    if not np.array_equal(written, _widened(name, values, written.shape), equal_nan=_is_float(values)):
                        return f"{name} differs from {shard.name}"
                start = stop
    return None if start == len(file["image_id"]) else f"it has {len(file['image_id'])} rows, {start} were copied"


def _sets(file: h5py.File) -> dict[str, h5py.Dataset]:
    return {name: file[name] for name in COLUMN}


def _widened(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if values.shape == shape:
        return values
    wide = np.full(shape, np.array(COLUMN[name].fill).astype(values.dtype), values.dtype)
    wide[tuple(slice(size) for size in values.shape)] = values
    return wide


def _is_float(values: np.ndarray) -> bool:
    return values.dtype.kind == "f"
