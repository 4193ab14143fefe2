"""Figures image by image: of a part of the images, or of all of them."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError

VERSION = 1
VERSION_KEY = "image_table"  # not "schema": that would make it a store
AGAIN = "delete it and run `python -m hpcguard.evaluate` again"


@dataclass(frozen=True)
class ImageTable:
    """One row an image in every column. Raises ValueError for columns that do not fit each other."""

    image_id: np.ndarray  # int64 [N]
    columns: Mapping[str, np.ndarray]  # [N, ...] each
    identity: str = ""  # digest of all that they depend on
    seconds: Mapping[str, float] = field(default_factory=dict)  # that each step took
    machines: Sequence[Mapping[str, Any]] = ()  # that they were computed on, each once

    def __post_init__(self) -> None:
        if self.image_id.ndim != 1 or self.image_id.dtype != np.int64:
            raise ValueError(f"image_id is {self.image_id.dtype} {list(self.image_id.shape)}, expected int64 [N]")
        for name, column in self.columns.items():
            if column.shape[:1] != self.image_id.shape:
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, expected {len(self.image_id)} rows")
        if len(np.unique(self.image_id)) < len(self.image_id):
            raise ValueError("an image has several rows")

    def __len__(self) -> int:
        return len(self.image_id)


def write_table(path: Path, table: ImageTable) -> None:
    """One HDF5 file, a data set with checksums for every column; a name with / lies in a group. The caller publishes
    it."""
    buffer = io.BytesIO()  # HDF5 is not at its best where a disk is full
    with h5py.File(buffer, "w", libver="v110") as file:
        file.attrs[VERSION_KEY] = VERSION
        file.attrs["identity"] = table.identity
        for name, value in (("columns", list(table.columns)), ("seconds", dict(table.seconds)),
                            ("machines", list(table.machines))):  # fmt: skip
            file.attrs[name] = json.dumps(value)
        for name, column in {"image_id": table.image_id, **table.columns}.items():
            if column.size:
                file.create_dataset(name, data=column, chunks=column.shape, fletcher32=True)
            else:  # no chunk is so small
                file.create_dataset(name, data=column)
    path.write_bytes(buffer.getbuffer())


def read_table(path: Path) -> ImageTable:
    """Raises InputError if the file is not there, damaged, or not of this version."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if file.attrs.get(VERSION_KEY) != VERSION:
                found = file.attrs.get(VERSION_KEY)
                raise InputError(f"{path}: figures of version {found}, this hpcguard reads {VERSION}; {AGAIN}")
            notes = {name: json.loads(file.attrs[name]) for name in ("columns", "seconds", "machines")}
            return ImageTable(
                file["image_id"][:], {name: file[name][:] for name in notes["columns"]},
                str(file.attrs["identity"]), notes["seconds"], notes["machines"],
            )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; run `python -m hpcguard.evaluate` again") from error
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as figures of images ({' '.join(str(error).split())}); {AGAIN}"
        ) from error


def table_problem(path: Path, ids: np.ndarray, identity: str) -> str | None:
    """Why a file cannot be used as the figures of these images under this identity, or None."""
    if not path.is_file():
        return "missing"
    try:
        found = read_table(path)
    except InputError as error:
        return str(error)
    if found.identity != identity:
        return "made with other weights, settings or images"
    return None if np.array_equal(found.image_id, ids) else "holds other images"


def join_tables(parts: Sequence[ImageTable]) -> ImageTable:
    """The parts of one identity as one, in their order; seconds are added up. Raises ValueError for strangers."""
    first = parts[0]
    if any(part.identity != first.identity or list(part.columns) != list(first.columns) for part in parts):
        raise ValueError("parts of different identities or columns")
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in first.columns}
    names = dict.fromkeys(name for part in parts for name in part.seconds)
    seconds = {name: round(sum(part.seconds.get(name, 0.0) for part in parts), 3) for name in names}
    machines = {json.dumps(machine, sort_keys=True): machine for part in parts for machine in part.machines}
    ids = np.concatenate([part.image_id for part in parts])
    return ImageTable(ids, columns, first.identity, seconds, list(machines.values()))
