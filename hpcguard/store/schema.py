"""What a store holds: one row an image (N rows, S segments at most, L explained labels)."""

from dataclasses import dataclass

import numpy as np

from hpcguard.attribution import Attribution

SCHEMA_VERSION = 2  # 2: interval and effective_samples
CHUNK_ROWS = 16  # a compromise: random rows want few rows a chunk, block reads and compression want many


@dataclass(frozen=True)
class Column:
    name: str
    dtype: str
    axes: str  # of N, L, S, H, W
    fill: float = 0  # value past an image's last segment, and of a row that no shard provides


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
    Column("interval", "f4", "NLS", np.nan),  # half the width of the 95% interval
    Column("intercept", "f4", "NL", np.nan),
    Column("score", "f4", "NL", np.nan),
    Column("effective_samples", "f4", "N", np.nan),
    Column("num_samples", "u4", "N"),
)
COLUMN = {column.name: column for column in COLUMNS}


def rows_from(explained: Attribution, labels: np.ndarray) -> dict[str, np.ndarray]:
    """The schema's columns from explanations and the true labels [B]."""
    renamed = {"image_id": explained.image_ids, "label": labels, "target": explained.targets}
    return {name: renamed[name] if name in renamed else getattr(explained, name) for name in COLUMN}


def rows_problem(rows: dict[str, np.ndarray]) -> str | None:
    """What is wrong with a block of rows, or None: shapes that disagree, values that cannot be."""
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
    counts = rows["num_segments"].astype(np.int64)
    if len(counts) and (counts.min() < 1 or counts.max() > sizes["S"]):
        return f"num_segments lies outside 1..{sizes['S']}"
    if (rows["segments"].reshape(len(counts), -1).max(1, initial=0) >= counts).any():
        return "segments has labels past num_segments"
    present = np.arange(sizes["S"]) < counts[:, None]
    for name in (column.name for column in COLUMNS if column.dtype == "f4"):
        finite = np.isfinite(rows[name])
        if not (finite if column_is_flat(name) else finite | ~present[:, None]).all():
            return f"{name} holds NaN or infinite values"
    return None


def column_is_flat(name: str) -> bool:
    """Whether a column has no segment axis, so that none of its values is padding."""
    return "S" not in COLUMN[name].axes
