"""Figures of certified against measured distortions."""

from collections.abc import Sequence

import numpy as np

from hpcguard.metrics.bound.grades import Distortion, assert_sound

NON_TRIVIAL = 0.01
"""A true bound of a right image is always above 0; it says something from this share of the measured distortion on."""
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)

Figures = dict[str, float]


def summarise(certified: Distortion, measured: Distortion, ids: Sequence[int] | np.ndarray) -> Figures:
    """Medians over the images that are right, infinite where the attack broke fewer than half of them; the ratio's
    quantiles and the share of non-trivial certificates over those of them that it broke.

    Raises UnsoundBoundError where a certified distortion is above the measured one.
    """
    assert_sound(certified, measured, ids)
    right = measured.values > 0
    broken = right & np.isfinite(measured.values)
    figures = {
        "images": float(len(ids)), "right": float(right.sum()), "not_broken": float(right.sum() - broken.sum())
    }  # fmt: skip
    if right.any():
        figures["certified_median"] = float(np.median(certified.values[right]))
        figures["measured_median"] = float(np.median(measured.values[right]))
    if broken.any():
        ratio = certified.values[broken] / measured.values[broken]
        figures["non_trivial_share"] = float((ratio >= NON_TRIVIAL).mean())
        figures |= {f"ratio_q{round(100 * q)}": float(np.quantile(ratio, q)) for q in QUANTILES}
    return figures


def constant_shares(bound: Distortion) -> np.ndarray:
    """The flagged pixels' share of the Lipschitz constant of each certified image, L_S^q / (L_S^q + L_R^q) of the wrong
    class that the bound is of (Linf: q = 1; L2: q = 2), float64 [B]. NaN for images that are wrong."""
    power, shares = (1 if bound.norm == "linf" else 2), np.full(len(bound.values), np.nan)
    for place, split in enumerate(bound.splits):
        if split is not None:
            flagged, rest = split.flagged**power, split.rest**power
            nearest = np.argmin(split.margins / (flagged + rest) ** (1 / power))
            shares[place] = flagged[nearest] / (flagged[nearest] + rest[nearest])
    return shares
