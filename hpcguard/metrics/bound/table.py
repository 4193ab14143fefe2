"""Figures of certified against measured distortions."""

from collections.abc import Sequence

import numpy as np

from hpcguard.metrics.bound.grades import Distortion, assert_sound

NON_TRIVIAL = 0.01
"""A true bound of a right image is always above 0; it says something from this share of the measured distortion on."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

Figures = dict[str, float]


def summarise(certified: Distortion, measured: Distortion, ids: Sequence[int] | np.ndarray) -> Figures:
    """Medians, the ratio's quantiles and the share of non-trivial certificates, over images that are right.

    Raises UnsoundBoundError where a certified distortion is above the measured one.
    """
    assert_sound(certified, measured, ids)
    right = (measured.values > 0) & np.isfinite(measured.values)
    unbroken = int(np.isinf(measured.values).sum())
    counts = {"images": float(len(ids)), "right": float((measured.values > 0).sum()), "not_broken": float(unbroken)}
    if not right.any():
        return counts
    ratio = certified.values[right] / measured.values[right]
    return {
        **counts,
        "certified_median": float(np.median(certified.values[right])),
        "measured_median": float(np.median(measured.values[right])),
        "non_trivial_share": float((ratio >= NON_TRIVIAL).mean()),
        **{f"ratio_q{round(100 * q)}": float(np.quantile(ratio, q)) for q in QUANTILES},
    }
