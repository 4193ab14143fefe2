"""store.h5: one virtual view over all shards, published only when every source has been verified."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import digest_file, publish, read_json
from hpcguard.store.schema import COLUMN, COLUMNS, SCHEMA_VERSION

REDO = "run `python -m hpcguard.consolidate` on this run again"


def build_view(store: Path, shards: Sequence[Path], manifests: Sequence[dict[str, Any]], fingerprint: str) -> None:
    """Publish the view. Sources are named relative to the store, so that a run folder can be moved.

    Columns are as wide as the widest shard; what a narrower one does not provide reads as the column's fill value.
    """
    total = sum(manifest["rows"] for manifest in manifests)
    with publish(store) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["schema"] = SCHEMA_VERSION
        file.attrs["fingerprint"] = fingerprint
        for column in COLUMNS:
            shapes = [manifest["columns"][column.name][1] for manifest in manifests]
            rest = tuple(np.max([shape[1:] for shape in shapes], axis=0).astype(int)) if len(column.axes) > 1 else ()
            dtype = _stored_dtype(shards[0], column.name)
            layout = h5py.VirtualLayout((total, *rest), dtype)
            start = 0
            for shard, shape in zip(shards, shapes, strict=True):
                source = h5py.VirtualSource(str(shard.relative_to(store.parent)), column.name, tuple(shape), dtype)
                region = (slice(start, start + shape[0]), *(slice(0, size) for size in shape[1:]))
                layout[region] = source
                start += shape[0]
            file.create_virtual_dataset(column.name, layout, fillvalue=np.array(column.fill).astype(dtype))


def _stored_dtype(shard: Path, name: str) -> np.dtype:
    with h5py.File(shard, "r") as file:
        return file[name].dtype


def view_problem(store: Path, manifest: Path, fingerprint: str) -> str | None:
    """Why a store cannot be trained from, or None: of this plan, every source there with the digest that was verified.

    A virtual data set whose source is missing reads as fill values without an error, hence this check.
    """
    if not store.is_file():
        return f"{store} is not there; {REDO}"
    try:
        recorded = read_json(manifest, REDO, sha256=str, sources=dict, fingerprint=str)
    except InputError as error:
        return str(error)
    if recorded["fingerprint"] != fingerprint:
        return f"{store}: made from another plan than its run folder's; {REDO}"
    for name, digest in {store.name: recorded["sha256"], **recorded["sources"]}.items():
        path = store.parent / name
        if not path.is_file():
            return f"{path} is missing under the store; run attribute, then consolidate, on this run again"
        if digest_file(path) != digest:
            return f"{path} has changed since it was verified; run attribute, then consolidate, on this run again"
    return None


def open_rows(store: Path, columns: Sequence[str] = tuple(COLUMN)) -> dict[str, np.ndarray]:
    """Whole columns of a store, shard or explanation file in memory."""
    try:
        with h5py.File(store, "r") as file:
            return {name: file[name][:] for name in columns}
    except (OSError, KeyError) as error:
        raise InputError(f"{store}: cannot be read as a store ({error})") from error
