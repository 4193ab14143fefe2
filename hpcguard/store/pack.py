"""Packed files: verified shards copied into few large files, in chunks and widths made for training."""

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.runs import digest_file, publish
from hpcguard.store.schema import COLUMN, COLUMNS, COMPRESSION, PACKED_CHUNK, attributes, chunk_rows
from hpcguard.store.shard import LIBVER, row_blocks

PACKED_BYTES = 256 << 20  # of a packed file, about
FEWEST = 4  # packed files, so that several ranks have something to do; fewer where there are fewer shards
CACHE = 16 << 20  # bytes: a chunk that two shards share is compressed once


def group_shards(sizes: Sequence[int]) -> list[range]:
    """Which shards each packed file holds, by the bytes of the shards alone."""
    count = min(len(sizes), max(FEWEST, -(-sum(sizes) // PACKED_BYTES)))
    ends = np.cumsum(sizes, dtype=np.int64)
    cuts = [0, *(int(np.searchsorted(ends, ends[-1] * k / count)) for k in range(1, count)), len(sizes)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts) if stop > start]


def pack_shards(
    target: Path,
    shards: Sequence[Path],
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    fingerprint: str,
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Publish one packed file, compared with its shards; its digest, rows and columns.

    shapes: a row of each column, see view.store_shapes. Memory: a block of rows and a chunk of each column.
    Raises OSError where the disk is full, RuntimeError if what was written is not what was read.
    """
    total = sum(_rows(shard) for shard in shards)
    with publish(target) as temporary:
        try:
            with h5py.File(temporary, "w", libver=LIBVER, rdcc_nbytes=CACHE) as file:
                file.attrs.update(attributes(fingerprint, identity))
                _create(file, shapes, total)
                _copy(file, shards)
        except (OSError, RuntimeError) as error:
            raise _plain(error, target) from error
        with h5py.File(temporary, "r", rdcc_nbytes=CACHE) as file:
            if problem := _difference(file, shards):
                raise RuntimeError(f"{target.name}: written and read back, but {problem}")
        digest = digest_file(temporary)
    columns = {name: [dtype.str, [total, *rest]] for name, (dtype, rest) in shapes.items()}
    return {"sha256": digest, "rows": total, "columns": columns}


def _rows(shard: Path) -> int:
    with h5py.File(shard, "r") as file:
        return len(file["image_id"])


def _create(file: h5py.File, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], total: int) -> None:
    for column in COLUMNS:
        dtype, rest = shapes[column.name]
        shape = (total, *rest)
        file.create_dataset(
            column.name, shape, dtype, chunks=(chunk_rows(shape, dtype, PACKED_CHUNK), *rest),
            fillvalue=np.array(column.fill).astype(dtype), **COMPRESSION,
        )  # fmt: skip


def _copy(file: h5py.File, shards: Sequence[Path]) -> None:
    start, sets = 0, _sets(file)
    for shard in shards:
        with h5py.File(shard, "r") as source:
            for rows in row_blocks(_sets(source)):
                stop = start + len(rows["image_id"])
                for name, values in rows.items():
                    sets[name][start:stop, *(slice(size) for size in values.shape[1:])] = values
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


def _plain(error: Exception, target: Path) -> OSError:
    """HDF5's paragraph about a failed write as one line."""
    text = " ".join(str(error).split())
    if "errno = 28" in text or os.strerror(errno.ENOSPC) in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    return OSError(errno.EIO, f"cannot be written ({text[:120]})", str(target))
