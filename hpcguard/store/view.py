"""store.h5: one virtual view over all shards, published only when every source has been verified."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import digest_file, publish, read_json, read_sealed
from hpcguard.store.schema import COLUMN, COLUMNS, RECOMPUTE, attributes, schema_problem
from hpcguard.store.shard import LIBVER
from hpcguard.store.sink import new_file

REDO = "run `python -m hpcguard.consolidate` on this run again"


def build_view(
    store: Path,
    sources: Sequence[Path],
    manifests: Sequence[Mapping[str, Any]],
    fingerprint: str,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Publish the view, the same bytes for the same sources. They are named relative to it: a run can be moved.

    Columns are as wide as the widest source; what a narrower one does not provide reads as the column's fill value.
    """
    with publish(store) as temporary:
        write_view(temporary, store, sources, manifests, fingerprint, identity)


def write_view(
    path: Path,
    store: Path,
    sources: Sequence[Path],
    manifests: Sequence[Mapping[str, Any]],
    fingerprint: str,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """The view to be published as `store`, into `path`. Raises OSError where the disk is full."""
    widths = store_shapes(manifests)
    with new_file(path, store, libver=LIBVER) as (file, _):
        file.attrs.update(attributes(fingerprint, identity))
        for column in COLUMNS:
            dtype, rest = widths[column.name]
            shapes = [tuple(manifest["columns"][column.name][1]) for manifest in manifests]
            whole = h5py.h5s.create_simple((sum(shape[0] for shape in shapes), *rest))
            made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            made.set_layout(h5py.h5d.VIRTUAL)
            made.set_obj_track_times(False)  # h5py's create_virtual_dataset keeps the time, so bytes would differ
            made.set_fill_value(np.array([column.fill]).astype(dtype))
            start = 0
            for source, shape in zip(sources, shapes, strict=True):
                whole.select_hyperslab((start, *(0 for _ in rest)), shape)
                name = str(source.relative_to(store.parent))
                made.set_virtual(whole, name.encode(), column.name.encode(), h5py.h5s.create_simple(shape))
                start += shape[0]
            whole.select_all()
            h5py.h5d.create(file.id, column.name.encode(), h5py.h5t.py_create(dtype, logical=True), whole, made)


def store_shapes(manifests: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Type and shape of a row of each column of a store over files of these manifests."""
    described = {column.name: [each["columns"][column.name] for each in manifests] for column in COLUMNS}
    return {
        name: (
            np.result_type(*(np.dtype(dtype) for dtype, _ in every)),
            tuple(max(sizes) for sizes in zip(*(shape[1:] for _, shape in every), strict=True)),
        )
        for name, every in described.items()
    }


def view_problem(store: Path, manifest: Path, fingerprint: str) -> str | None:
    """Why a store cannot be trained from, or None: of this plan, every source there with the digest that was verified.

    A virtual data set whose source is missing reads as fill values without an error, hence this check.
    """
    if not store.is_file():
        return f"{store} is not there; {REDO}"
    try:
        recorded = read_store_manifest(manifest)
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


def read_store_manifest(path: Path) -> dict[str, Any]:
    """store.json. Raises InputError if it is missing, damaged or of another schema."""
    try:
        return read_sealed(path, REDO, schema=int, sha256=str, sources=dict, fingerprint=str)
    except InputError:
        if problem := schema_problem(read_json(path, REDO, fingerprint=str).get("schema", 1)):  # 1 had none
            raise InputError(f"{path}: {problem}; {RECOMPUTE}") from None
        raise


def open_rows(store: Path, columns: Sequence[str] = tuple(COLUMN)) -> dict[str, np.ndarray]:
    """Whole columns of a store, shard or explanation file in memory."""
    try:
        with h5py.File(store, "r") as file:
            if problem := schema_problem(file.attrs.get("schema")):
                raise InputError(f"{store}: {problem}; {RECOMPUTE}")
            return {name: file[name][:] for name in columns}
    except (OSError, KeyError) as error:
        raise InputError(f"{store}: cannot be read as a store ({error})") from error
