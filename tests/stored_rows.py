"""Random rows of the store's schema."""

import numpy as np


def make_rows(
    ids: np.ndarray, segments: int = 5, labels: int = 2, size: int = 8, seed: int = 0
) -> dict[str, np.ndarray]:
    """Rows of the schema's types, each with a count of segments of its own."""
    generator = np.random.default_rng([seed, *ids[:1].tolist()])
    count = generator.integers(1, segments + 1, len(ids))
    count[0] = segments
    present = np.arange(segments) < count[:, None, None]
    padded = {
        name: np.where(present, generator.normal(size=(len(ids), labels, segments)), np.nan).astype("f4")
        for name in ("coefficients", "standard_error", "interval")
    }
    for name in ("sensitivity", "instability"):
        padded[name] = np.where(present[:, 0], generator.random((len(ids), segments)), np.nan).astype("f4")
    padded["coefficients"][..., ::4] /= 1000  # of those that say nothing, there are some
    padded["standard_error"] = np.abs(padded["standard_error"])
    padded["interval"] = np.abs(padded["interval"]) / 50
    label, others = ids % 10, generator.integers(0, 10, (len(ids), labels - 1))
    flat = {name: generator.random((len(ids), labels), "f4") for name in ("probability", "intercept", "score")}
    return {
        "image_id": ids.astype("i8"), "label": label.astype("i4"), "predicted": (ids % 7).astype("i4"),
        "segments": generator.integers(0, count[:, None, None], (len(ids), size, size)).astype("u2"),
        "num_segments": count.astype("u2"), "target": np.column_stack([label, others]).astype("i4"),
        "effective_samples": generator.random(len(ids), "f4"), "num_samples": np.full(len(ids), 64, "u4"),
        **padded, **flat,
    }  # fmt: skip
