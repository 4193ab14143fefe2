"""Accuracies with intervals."""

import math


def wilson_interval(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% score interval of a share (Wilson 1927); (0, 1) for no images."""
    if of == 0:
        return 0.0, 1.0
    share = right / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return max(0.0, centre - half), min(1.0, centre + half)
