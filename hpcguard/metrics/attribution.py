"""Statistics over stored explanations, and how alike two explanations are."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Sums = dict[str, np.ndarray]


def row_statistics(
    rows: dict[str, np.ndarray], num_classes: int, flagged: Mapping[str, np.ndarray] | None = None
) -> Sums:
    """Sums a true class over store rows, float64 [K] each; the first explained label is the true one.

    flagged: segments that some criteria flag, bool [N, S]; their shares of an image's segments are added up.
    """
    labels = rows["label"]
    magnitude = np.abs(rows["coefficients"][:, 0].astype(np.float64))
    per_row = {
        "images": np.ones(len(labels)),
        "right": (rows["predicted"] == labels).astype(np.float64),
        "segments": rows["num_segments"].astype(np.float64),
        "score": rows["score"][:, 0].astype(np.float64),
        "mean_abs_coefficient": np.nanmean(magnitude, axis=1),
        "standard_error": np.nanmean(rows["standard_error"][:, 0].astype(np.float64), axis=1),
        "largest_coefficient": np.nanmax(magnitude, axis=1),
        "samples": rows["num_samples"].astype(np.float64),
        **{f"flagged_{rule}": mask.sum(1) / rows["num_segments"] for rule, mask in (flagged or {}).items()},
    }
    return {name: np.bincount(labels, values, num_classes) for name, values in per_row.items()}


def combine_statistics(parts: list[Sums]) -> Sums:
    """Add up sums, one after the other: what comes out depends on their order in the last bits."""
    total: Sums = {}
    for part in parts:
        total = {name: total[name] + values for name, values in part.items()} if total else part
    return total


def summarise(sums: Sums) -> dict[str, float]:
    """Means over all images."""
    images = sums["images"].sum()
    means = {name: float(values.sum() / images) for name, values in sums.items() if name != "images"}
    means["accuracy"] = means.pop("right")
    # Of the means, not a mean of ratios: a model that is sure of an image gives it coefficients near 0.
    means["relative_error"] = means["standard_error"] / max(means["largest_coefficient"], np.finfo(np.float64).tiny)
    return {"images": float(images), **means}


def summarise_classes(sums: Sums, names: Sequence[str]) -> dict[str, Any]:
    """Means over the images of each class that has some, by its name."""
    return {
        name: summarise({key: values[k : k + 1] for key, values in sums.items()})
        for k, name in enumerate(names)
        if sums["images"][k]
    }


def topk_jaccard(first: np.ndarray, second: np.ndarray, k: int = 5) -> float:
    """Jaccard index of the k segments of largest |coefficient| in two explanations [d] of one image."""
    top = [set(np.argsort(-np.nan_to_num(np.abs(each), nan=-1.0), kind="stable")[:k]) for each in (first, second)]
    return len(top[0] & top[1]) / len(top[0] | top[1])


def mean_set_jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over images of |A and B| / |A or B| of two sets of segments, bool [N, S] each; 1 where both are empty."""
    both, either = (first & second).sum(1), (first | second).sum(1)
    return float(np.where(either > 0, both / np.maximum(either, 1), 1.0).mean())
