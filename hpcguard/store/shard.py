"""One shard: its units joined, written aside, verified, published by rename, its manifest last."""

import hashlib
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import (
    digest_arrays,
    digest_file,
    publish_together,
    read_json,
    read_sealed,
    sealed_text,
    to_disk,
)
from hpcguard.store.journal import Unit
from hpcguard.store.schema import (
    BLOCK,
    COLUMN,
    COLUMNS,
    COMPRESSION,
    SHARD_CHUNK,
    attributes,
    chunk_rows,
    rows_problem,
    schema_problem,
)

Rows = dict[str, np.ndarray]
LIBVER = ("v110", "v110")  # indices of chunks that take bytes, not kilobytes; read by HDF5 1.10 (2016) and later
MOST_COLLISIONS = 10
REDO = "the shard will be redone"


class ShardWriter:
    """Publishes the units of one shard as one HDF5 file and one JSON manifest."""

    def __init__(
        self,
        path: Path,
        manifest: Path,
        fingerprint: str,
        segments_dtype: str = "u2",
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """identity: what the fingerprint is the digest of; it goes into the file and the manifest."""
        self.path, self.manifest, self.fingerprint = path, manifest, fingerprint
        self.segments_dtype, self.identity = segments_dtype, identity

    def publish(self, ids: np.ndarray, units: Sequence[Unit], **details: Any) -> dict[str, Any]:
        """Write, read back, compare, rename; returns the manifest. An OSError or RuntimeError publishes nothing.

        ids: the planned ones; every one of them has a row, or is quarantined in its unit.
        """
        quarantined = {image: why for unit in units for image, why in unit.quarantined.items()}
        if len(quarantined) == len(ids):
            raise RuntimeError(f"{self.path.name}: none of its images could be explained: {quarantined[int(ids[0])]}")
        rows = _join([unit.rows for unit in units if unit.rows])
        kept = without(ids, quarantined)
        if problem := _unfit(rows, kept):
            raise RuntimeError(f"{self.path.name}: refused to publish: {problem}")
        image = file_image(rows, self.fingerprint, self.segments_dtype, self.identity)
        manifest = {
            **attributes(self.fingerprint, self.identity),
            "configuration": dict(self.identity or {}),
            "file": self.path.name,
            "sha256": hashlib.sha256(image).hexdigest(),
            "bytes": len(image),
            "rows": len(kept),
            "ids_sha256": digest_arrays(kept),
            "quarantined": [{"image": each, "why": why} for each, why in quarantined.items()],
            "columns": {name: [self._dtype(name), list(array.shape)] for name, array in rows.items()},
            "seconds": round(sum(unit.seconds for unit in units), 3),
            "batch_size": min((unit.batch_size for unit in units if unit.batch_size), default=None),
            "published": round(time.time(), 3),
            "host": os.uname().nodename,
            **details,
        }
        for _ in range(MOST_COLLISIONS):
            self._publish(image, rows, manifest)
            if self._is_published():
                return manifest
        raise RuntimeError(
            f"{self.path.name}: published {MOST_COLLISIONS} times, and each time another writer's shard or manifest "
            "was there; let one process at a time compute it"
        )

    def _publish(self, image: memoryview, rows: Rows, manifest: Mapping[str, Any]) -> None:
        """Both files are on the disk before either is renamed: where it is full, the former pair stays."""
        with publish_together(self.path, self.manifest) as (shard, description):
            shard.write_bytes(image)
            description.write_text(sealed_text(manifest), encoding="utf-8")
            to_disk(shard)  # what is compared has been on its way to the disk
            if problem := _read_back_problem(shard, rows):
                raise RuntimeError(f"{self.path.name}: written and read back, but {problem}")
            if digest_file(shard) != manifest["sha256"]:
                raise RuntimeError(f"{self.path.name}: written and read back, but its bytes differ")

    def _is_published(self) -> bool:
        """Whether file and manifest are of one writer: where there are no locks, two may have published in turns."""
        try:
            return read_sealed(self.manifest, "", sha256=str)["sha256"] == digest_file(self.path)
        except (InputError, OSError):
            return False

    def _dtype(self, name: str) -> str:
        return np.dtype(self.segments_dtype if name == "segments" else COLUMN[name].dtype).str


def _unfit(rows: Rows, ids: np.ndarray, classes: int | None = None) -> str | None:
    if problem := rows_problem(rows, classes):
        return problem
    return None if np.array_equal(rows["image_id"], ids) else "rows are not those of the planned image ids"


def without(ids: np.ndarray, quarantined: Iterable[int]) -> np.ndarray:
    """The ids that are not quarantined, in their order."""
    return ids[~np.isin(ids, np.fromiter(quarantined, np.int64))]


def write_rows(
    path: Path,
    rows: Mapping[str, np.ndarray],
    fingerprint: str,
    segments_dtype: str = "u2",
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Write columns of the schema to one HDF5 file: chunked, compressed, checksummed."""
    path.write_bytes(file_image(rows, fingerprint, segments_dtype, identity))


def file_image(
    rows: Mapping[str, np.ndarray], fingerprint: str, segments_dtype: str, identity: Mapping[str, Any] | None
) -> memoryview:
    """The bytes of an HDF5 file of these rows, the same for the same rows.

    Made in memory: HDF5 is not at its best where a disk is full, and the digest is of what was meant, not of what a
    disk made of it.
    """
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", libver=LIBVER) as file:
        file.attrs.update(attributes(fingerprint, identity))
        for column in COLUMNS:
            dtype = np.dtype(segments_dtype if column.name == "segments" else column.dtype)
            data = np.asarray(rows[column.name]).astype(dtype)
            chunks = (chunk_rows(data.shape, dtype, SHARD_CHUNK), *data.shape[1:])
            file.create_dataset(column.name, data=data, chunks=chunks, **COMPRESSION)
    return buffer.getbuffer()


def _join(units: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Concatenate units along N, padding the segment axis to the widest; in the schema's types."""
    widest = max(unit["coefficients"].shape[2] for unit in units)
    joined = {}
    for column in COLUMNS:
        parts = [np.asarray(unit[column.name]).astype(column.dtype) for unit in units]
        if "S" in column.axes:
            parts = [
                np.pad(part, [*[(0, 0)] * (part.ndim - 1), (0, widest - part.shape[-1])], constant_values=column.fill)
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


def shard_problem(
    path: Path,
    manifest: Path,
    ids: np.ndarray,
    fingerprint: str,
    values: bool = True,
    visit: Callable[[Rows], None] | None = None,
    classes: int | None = None,
) -> str | None:
    """Why a shard cannot be used, or None: file and manifest there, digest right, planned ids, sound rows.

    values=False leaves out the rows: they were sound when the digest was taken. visit: gets the rows, block by block,
    each found sound; what it made of them is void if a problem shows later. classes: how many there are, if known.
    """
    if not manifest.is_file() or not path.is_file():
        return "missing" if not path.is_file() else "its manifest is missing"
    try:
        recorded = read_manifest(manifest)
        quarantined = [entry["image"] for entry in recorded["quarantined"]]
    except (InputError, TypeError, KeyError) as error:
        return str(error)
    if recorded["fingerprint"] != fingerprint:
        return "made by another plan"
    if recorded["file"] != path.name:
        return f"a duplicate of {recorded['file']}"
    kept = without(ids, quarantined)
    if recorded["ids_sha256"] != digest_arrays(kept):
        return "holds other image ids than planned"
    if recorded["sha256"] != digest_file(path):
        return "its bytes differ from the manifest's digest"
    return _values_problem(path, recorded, kept, visit, classes) if values else None


def read_manifest(path: Path) -> dict[str, Any]:
    """A shard's manifest. Raises InputError if it is damaged or of another schema."""
    try:
        return read_sealed(path, REDO, schema=int, fingerprint=str, file=str, quarantined=list, columns=dict)
    except InputError:
        if problem := schema_problem(read_json(path, REDO, schema=int)["schema"]):  # the first had no digest
            raise InputError(problem) from None
        raise


def _values_problem(
    path: Path, recorded: Mapping[str, Any], ids: np.ndarray, visit: Callable[[Rows], None] | None, classes: int | None
) -> str | None:
    try:
        with h5py.File(path, "r") as file:
            if problem := schema_problem(file.attrs.get("schema")):
                return problem
            if file.attrs.get("fingerprint") != recorded["fingerprint"]:
                return "its attributes are another plan's"
            sets = {name: file[name] for name in COLUMN}
            for name, made in sets.items():
                if [made.dtype.str, list(made.shape)] != recorded["columns"][name]:
                    return f"{name} is not as its manifest describes it"
            start = 0
            for rows in row_blocks(sets):
                stop = start + len(rows["image_id"])
                if problem := _unfit(rows, ids[start:stop], classes):
                    return problem
                if visit:
                    visit(rows)
                start = stop
            return None if start == len(ids) else f"has {start} rows, expected {len(ids)}"
    except (OSError, KeyError, RuntimeError, ValueError) as error:
        return f"unreadable ({error})"


def row_blocks(sets: Mapping[str, h5py.Dataset]) -> Iterator[Rows]:
    """All rows of some columns in blocks of about BLOCK bytes, cut where the columns' shapes alone say."""
    row = sum(each.dtype.itemsize * int(np.prod(each.shape[1:])) for each in sets.values())
    step = 1 << max(0, (BLOCK // row).bit_length() - 1)
    for start in range(0, min(len(each) for each in sets.values()), step):
        yield {name: each[start : start + step] for name, each in sets.items()}


def unit_problem(rows: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the rows of one unit as they will be stored, or None."""
    return rows_problem({column.name: np.asarray(rows[column.name]).astype(column.dtype) for column in COLUMNS})
