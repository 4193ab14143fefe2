"""What a store holds: one row an image (N rows, S segments at most, L explained labels)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcguard.attribution import Attribution

SCHEMA_VERSION = 2  # 2: interval, effective_samples, sensitivity and instability
SHARD_CHUNK = 32 << 10  # bytes of a chunk of a shard: random rows want small ones
PACKED_CHUNK = 256 << 10  # of a packed file, which is read in blocks: compression and block reads want large ones
MOST_CHUNK_ROWS = 4096
MOST_DECODED = 256  # rows of a chunk of a packed file
COMPRESSION: dict[str, Any] = {"compression": "gzip", "compression_opts": 4, "shuffle": True, "fletcher32": True}
BLOCK = 8 << 20  # bytes of rows held at once where a whole file is looked at


@dataclass(frozen=True)
class Column:
    name: str
    dtype: str
    axes: str  # of N, L, S, H, W
    fill: float = 0  # value past an image's last segment, and of a row that no shard provides
    bits: int = 23  # of the mantissa that are kept, where more would be noise that no filter compresses


COLUMNS = (
    Column("image_id", "i8", "N", -1),
    Column("label", "i4", "N", -1),
    Column("predicted", "i4", "N", -1),
    Column("segments", "u2", "NHW"),
    Column("num_segments", "u2", "N"),
    Column("target", "i4", "NL", -1),
    Column("probability", "f4", "NL", np.nan),
    Column("coefficients", "f4", "NLS", np.nan),
    Column("standard_error", "f4", "NLS", np.nan),
    Column("interval", "f4", "NLS", np.nan, 11),  # half the width of the 95% interval
    Column("sensitivity", "f4", "NS", np.nan, 11),  # mean |d margin / d pixel|
    Column("instability", "f4", "NS", np.nan, 11),  # variance of the first label's coefficient under noise
    Column("intercept", "f4", "NL", np.nan),
    Column("score", "f4", "NL", np.nan),
    Column("effective_samples", "f4", "N", np.nan),
    Column("num_samples", "u4", "N"),
)
COLUMN = {column.name: column for column in COLUMNS}
ROUNDING = 1e-3  # of probabilities and R^2 of models in half precision
BETWEEN = {
    "probability": (-ROUNDING, 1 + ROUNDING), "score": (-np.inf, 1 + ROUNDING), "standard_error": (0, np.inf),
    "interval": (0, np.inf), "sensitivity": (0, np.inf), "instability": (0, np.inf), "effective_samples": (0, np.inf),
}  # fmt: skip
# Nothing converts: what schema 2 added was never computed for the rows of 1, and cannot be had from them.
RECOMPUTE = (
    "run `python -m hpcguard.attribute RUN`, then `python -m hpcguard.consolidate RUN`, to compute it again (of test "
    "images `python -m hpcguard.evaluate RUN`)"
)
DECODED = ("segments", "coefficients")  # the columns that batches for training may hold
OPTIONAL = ("sensitivity", "instability")  # NaN in every row where they were not computed


def attributes(fingerprint: str, identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """What every file of a store says of itself: its schema, and what its rows were made from.

    identity: the plan's, everything that the values depend on; fingerprint is its digest.
    """
    about = identity or {}
    return {
        "schema": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "configuration": json.dumps(about, sort_keys=True),
        "weights_sha256": str(about.get("model", {}).get("weights_sha256", "")),
        "data_sha256": str(about.get("data", {}).get("sha256", "")),
    }


def schema_problem(version: object) -> str | None:
    return None if version == SCHEMA_VERSION else f"has schema {version}, this hpcguard reads {SCHEMA_VERSION}"


def packed_chunk_rows(shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], total: int) -> dict[str, int]:
    """Rows of a chunk of each column of a packed file.

    As many in all that training decodes, and few: blocks are of whole chunks, and many blocks are to be mixed.
    """
    rows = {name: chunk_rows((total, *rest), dtype, PACKED_CHUNK) for name, (dtype, rest) in shapes.items()}
    return {name: min(each, rows["segments"], MOST_DECODED) if name in DECODED else each for name, each in rows.items()}


def chunk_rows(shape: Sequence[int], dtype: np.dtype, target: int) -> int:
    """Rows of a chunk of about `target` bytes: a power of two, at most those that there are."""
    row = dtype.itemsize * max(1, int(np.prod(shape[1:])))
    return min(1 << max(0, (target // row).bit_length() - 1), MOST_CHUNK_ROWS, max(1, shape[0]))


def rows_from(
    explained: Attribution,
    labels: np.ndarray,
    sensitivity: np.ndarray | None = None,
    instability: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The schema's columns from explanations, the true labels [B], and what else was computed, [B, S] each."""
    absent = np.full(explained.coefficients[:, 0].shape, np.nan)
    own = {
        "image_id": explained.image_ids,
        "label": labels,
        "target": explained.targets,
        "sensitivity": absent if sensitivity is None else sensitivity,
        "instability": absent if instability is None else instability,
    }
    found = {name: own[name] if name in own else getattr(explained, name) for name in COLUMN}
    return {name: _rounded(values, COLUMN[name].bits) for name, values in found.items()}


def _rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 of so many bits of mantissa, nearest; NaN and infinity as they are."""
    if bits == 23:
        return values
    whole = np.ascontiguousarray(values, np.float32)
    spare = 23 - bits
    kept = ((whole.view(np.uint32) + np.uint32(1 << (spare - 1))) >> np.uint32(spare)) << np.uint32(spare)
    return np.where(np.isfinite(whole), kept.view(np.float32), whole)


def rows_problem(rows: dict[str, np.ndarray], classes: int | None = None) -> str | None:
    """What is wrong with a block of rows, or None: shapes that disagree, values that cannot be.

    classes: how many there are, if known.
    """
    if missing := set(COLUMN) - set(rows):
        return f"columns {', '.join(sorted(missing))} are missing"
    sizes: dict[str, int] = {}
    for name, column in COLUMN.items():
        shape = rows[name].shape
        if len(shape) != len(column.axes):
            return f"{name} has the shape {shape}, expected axes {column.axes}"
        for axis, size in zip(column.axes, shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                return f"{name} has {size} along {axis}, others {sizes[axis]}"
    return _segments_problem(rows, sizes["S"]) or _floats_problem(rows, sizes["S"]) or _classes_problem(rows, classes)


def _segments_problem(rows: dict[str, np.ndarray], widest: int) -> str | None:
    counts = rows["num_segments"].astype(np.int64)
    if len(counts) and (counts.min() < 1 or counts.max() > widest):
        return f"num_segments lies outside 1..{widest}"
    if (rows["segments"].reshape(len(counts), -1).max(1, initial=0) >= counts).any():
        return "segments has labels past num_segments"
    return None


def _floats_problem(rows: dict[str, np.ndarray], widest: int) -> str | None:
    present = np.arange(widest) < rows["num_segments"][:, None]
    for name in (column.name for column in COLUMNS if column.dtype == "f4"):
        values = rows[name]
        if name in OPTIONAL and np.isnan(values).all():
            continue
        if "S" in COLUMN[name].axes:
            own = np.broadcast_to(present if COLUMN[name].axes == "NS" else present[:, None], values.shape)
            if not np.isnan(values[~own]).all():
                return f"{name} has values past num_segments, where there is NaN"
            values = values[own]
        if not np.isfinite(values).all():
            return f"{name} holds NaN or infinite values"
        least, most = BETWEEN.get(name, (-np.inf, np.inf))
        if values.size and (values.min() < least or values.max() > most):
            return f"{name} lies outside {least:g} to {most:g}"
    return None


def _classes_problem(rows: dict[str, np.ndarray], classes: int | None) -> str | None:
    for name in ("label", "predicted", "target"):
        values = rows[name]
        if values.size and (values.min() < 0 or (classes is not None and values.max() >= classes)):
            return f"{name} is no class: it lies outside 0 to {'...' if classes is None else classes - 1}"
    if not np.array_equal(rows["target"][:, 0], rows["label"]):
        return "target does not begin with the true class"
    return "num_samples is 0" if (rows["num_samples"] < 1).any() else None
