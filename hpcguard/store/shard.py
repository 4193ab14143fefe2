"""One shard: its units joined, written aside, verified, published by rename, its manifest last."""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import digest_arrays, digest_file, publish, read_json, write_json
from hpcguard.store.journal import Unit
from hpcguard.store.schema import CHUNK_ROWS, COLUMN, COLUMNS, SCHEMA_VERSION, rows_problem


class ShardWriter:
    """Publishes the units of one shard as one HDF5 file and one JSON manifest."""

    def __init__(self, path: Path, manifest: Path, fingerprint: str, segments_dtype: str = "u2") -> None:
        self.path, self.manifest, self.fingerprint, self.segments_dtype = path, manifest, fingerprint, segments_dtype

    def publish(self, ids: np.ndarray, units: Sequence[Unit], **details: Any) -> dict[str, Any]:
        """Write, read back, compare, rename; returns the manifest. An OSError or RuntimeError publishes nothing.

        ids: the planned ones; every one of them has a row, or is quarantined in its unit.
        """
        quarantined = {image: why for unit in units for image, why in unit.quarantined.items()}
        if len(quarantined) == len(ids):
            raise RuntimeError(f"{self.path.name}: none of its images could be explained: {quarantined[int(ids[0])]}")
        rows = _join([unit.rows for unit in units if unit.rows])
        if problem := rows_problem(rows):
            raise RuntimeError(f"{self.path.name}: refused to publish: {problem}")
        kept = without(ids, quarantined)
        if not np.array_equal(rows["image_id"], kept):
            raise RuntimeError(f"{self.path.name}: refused to publish: rows are not those of the planned image ids")
        with publish(self.path) as temporary:
            write_rows(temporary, rows, self.fingerprint, self.segments_dtype)
            if problem := _read_back_problem(temporary, rows):
                raise RuntimeError(f"{self.path.name}: written and read back, but {problem}")
            digest, size = digest_file(temporary), temporary.stat().st_size
        manifest = {
            "schema": SCHEMA_VERSION,
            "file": self.path.name,
            "sha256": digest,
            "bytes": size,
            "fingerprint": self.fingerprint,
            "rows": len(kept),
            "ids_sha256": digest_arrays(kept),
            "quarantined": [{"image": image, "why": why} for image, why in quarantined.items()],
            "columns": {name: [array.dtype.str, list(array.shape)] for name, array in rows.items()},
            "seconds": round(sum(unit.seconds for unit in units), 3),
            "batch_size": min((unit.batch_size for unit in units if unit.batch_size), default=None),
            "published": round(time.time(), 3),
            "host": os.uname().nodename,
            **details,
        }
        write_json(self.manifest, manifest)
        return manifest


def without(ids: np.ndarray, quarantined: Iterable[int]) -> np.ndarray:
    """The ids that are not quarantined, in their order."""
    return ids[~np.isin(ids, np.fromiter(quarantined, np.int64))]


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


def shard_problem(path: Path, manifest: Path, ids: np.ndarray, fingerprint: str, values: bool = True) -> str | None:
    """Why a shard cannot be used, or None: file and manifest there, digest right, planned ids, sound rows.

    values=False leaves out the rows: they were sound when the digest was taken.
    """
    if not manifest.is_file() or not path.is_file():
        return "missing" if not path.is_file() else "its manifest is missing"
    try:
        recorded = read_json(manifest, "the shard will be redone")
        quarantined = [entry["image"] for entry in recorded.get("quarantined", [])]
    except (InputError, TypeError, KeyError) as error:
        return str(error)
    if recorded.get("fingerprint") != fingerprint:
        return "made by another plan"
    if recorded.get("schema") != SCHEMA_VERSION:
        return f"has schema {recorded.get('schema')}, this hpcguard writes {SCHEMA_VERSION}"
    if recorded.get("ids_sha256") != digest_arrays(without(ids, quarantined)):
        return "holds other image ids than planned"
    if recorded.get("sha256") != digest_file(path):
        return "its bytes differ from the manifest's digest"
    return values_problem(path) if values else None


def values_problem(path: Path) -> str | None:
    """What is wrong with a shard's rows, or None."""
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("schema") != SCHEMA_VERSION:
                return f"has schema {file.attrs.get('schema')}, this hpcguard writes {SCHEMA_VERSION}"
            return rows_problem({name: file[name][:] for name in COLUMN})
    except (OSError, KeyError) as error:
        return f"unreadable ({error})"


def unit_problem(rows: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the rows of one unit as they will be stored, or None."""
    return rows_problem({column.name: np.asarray(rows[column.name]).astype(column.dtype) for column in COLUMNS})
