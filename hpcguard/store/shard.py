"""One shard: rows gathered unit by unit, written aside, verified, published by rename, its manifest last."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import digest_arrays, digest_file, publish, read_json, write_json
from hpcguard.store.schema import CHUNK_ROWS, COLUMN, COLUMNS, SCHEMA_VERSION, rows_problem


class ShardWriter:
    """Gathers rows in memory and publishes them as one HDF5 file and one JSON manifest.

    A shard's rows are small (about 1 KiB at 32x32) and the widest segment axis is known only at the end, so nothing
    touches the disk before `publish`; a process killed earlier leaves nothing behind that could be mistaken for data.
    """

    def __init__(self, path: Path, manifest: Path, fingerprint: str, segments_dtype: str = "u2") -> None:
        self.path, self.manifest, self.fingerprint, self.segments_dtype = path, manifest, fingerprint, segments_dtype
        self.started = time.time()
        self._units: list[dict[str, np.ndarray]] = []

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add the rows of one unit: every column of the schema."""
        self._units.append(dict(rows))

    def publish(self, ids: np.ndarray, **details: Any) -> dict[str, Any]:
        """Write, read back, compare, rename; returns the manifest. An OSError or RuntimeError publishes nothing."""
        rows = _join(self._units)
        if problem := rows_problem(rows):
            raise RuntimeError(f"{self.path.name}: refused to publish: {problem}")
        if not np.array_equal(rows["image_id"], ids):
            raise RuntimeError(f"{self.path.name}: refused to publish: rows are not those of the planned image ids")
        with publish(self.path) as temporary:
            write_rows(temporary, rows, self.fingerprint, self.segments_dtype)
            if problem := _read_back_problem(temporary, rows):
                raise RuntimeError(f"{self.path.name}: written and read back, but {problem}")
            digest = digest_file(temporary)
        manifest = {
            "schema": SCHEMA_VERSION,
            "file": self.path.name,
            "sha256": digest,
            "fingerprint": self.fingerprint,
            "rows": len(ids),
            "ids_sha256": digest_arrays(ids),
            "columns": {name: [array.dtype.str, list(array.shape)] for name, array in rows.items()},
            "seconds": round(time.time() - self.started, 3),
            "host": os.uname().nodename,
            **details,
        }
        write_json(self.manifest, manifest)
        return manifest


def write_rows(path: Path, rows: Mapping[str, np.ndarray], fingerprint: str, segments_dtype: str = "u2") -> None:
    """Write columns of the schema to one HDF5 file: chunked, compressed, checksummed."""
    with h5py.File(path, "w") as file:
        file.attrs["schema"] = SCHEMA_VERSION
        file.attrs["fingerprint"] = fingerprint
        for column in COLUMNS:
            data = np.asarray(rows[column.name])
            dtype = segments_dtype if column.name == "segments" else column.dtype
            chunks = (min(CHUNK_ROWS, len(data)), *data.shape[1:])
            file.create_dataset(
                column.name, data=data.astype(dtype), chunks=chunks, compression="gzip", compression_opts=1,
                shuffle=True, fletcher32=True,
            )  # fmt: skip


def _join(units: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate units along N, padding the segment axis to the widest; in the schema's types."""
    widest = max(unit["coefficients"].shape[2] for unit in units)
    joined = {}
    for column in COLUMNS:
        parts = [np.asarray(unit[column.name]).astype(column.dtype) for unit in units]
        if "S" in column.axes:
            parts = [
                np.pad(part, ((0, 0), (0, 0), (0, widest - part.shape[2])), constant_values=column.fill)
                for part in parts
            ]
        joined[column.name] = np.concatenate(parts)
    return joined


def _read_back_problem(path: Path, rows: Mapping[str, np.ndarray]) -> str | None:
    with h5py.File(path, "r") as file:
        for name, expected in rows.items():
            if not np.array_equal(file[name][:], expected, equal_nan=expected.dtype.kind == "f"):
                return f"{name} differs from what was written"
    return None


def shard_problem(path: Path, manifest: Path, ids: np.ndarray, fingerprint: str) -> str | None:
    """Why a shard cannot be used, or None: file and manifest there, digest right, planned ids, sound rows."""
    if not manifest.is_file() or not path.is_file():
        return "missing" if not path.is_file() else "its manifest is missing"
    try:
        recorded = read_json(manifest, "the shard will be redone")
    except InputError as error:
        return str(error)
    if recorded.get("fingerprint") != fingerprint:
        return "made by another plan"
    if recorded.get("ids_sha256") != digest_arrays(ids):
        return "holds other image ids than planned"
    if recorded.get("sha256") != digest_file(path):
        return "its bytes differ from the manifest's digest"
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("schema") != SCHEMA_VERSION:
                return f"has schema {file.attrs.get('schema')}, this hpcguard writes {SCHEMA_VERSION}"
            return rows_problem({name: file[name][:] for name in COLUMN})
    except (OSError, KeyError) as error:
        return f"unreadable ({error})"
