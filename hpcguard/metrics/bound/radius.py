"""From margins and Lipschitz constants to a distortion, and which radii to look at."""

import math
from collections.abc import Callable

import numpy as np

Constants = Callable[[float], np.ndarray]  # of a radius: one constant a wrong class, float64 [K - 1]
Evaluated = list[tuple[float, np.ndarray]]

SAME = 0.999  # phi(r) / phi(0) from where on the margins count as linear
CLOSE = 0.25  # log(phi / r) at which the search ends
LONGEST_STEP = 8


def diameter(norm: str, coordinates: int) -> float:
    """The largest distance of two images with pixels in [0, 1]."""
    return 1.0 if norm == "linf" else math.sqrt(coordinates)


def plain_bound(margins: np.ndarray, constants: np.ndarray, radius: float) -> float:
    """min(radius, min_k margin_k / constant_k) for constants that hold within it (Hein & Andriushchenko 2017)."""
    return float(min(radius, _smallest_ratio(margins, constants)))


def stepwise_bound(margins: np.ndarray, evaluated: Evaluated) -> float:
    """The largest R with integral_0^R L_k(t) dt <= margin_k for all k, L_k the step function of what was evaluated.

    evaluated: (radius, constants that hold within it); at least plain_bound of each of them.
    """
    bounds = []
    for k, margin in enumerate(margins):
        reached, left = 0.0, float(margin)
        # The smallest of all constants that hold at a radius: computed ones need not grow with it.
        for radius, _ in sorted(evaluated, key=lambda each: each[0]):
            slope = min(float(constants[k]) for other, constants in evaluated if other >= radius)
            step = min(radius - reached, left / slope if slope else np.inf)
            if step < radius - reached:
                reached += step
                break
            reached, left = radius, left - step * slope
        bounds.append(reached * (1 - 1e-12))
    return max(min(bounds), 0.0)


def search_radius(
    margins: np.ndarray, constants: Constants, first: float, farthest: float, evaluations: int, share: float = 0.1,
    close: float = CLOSE,
) -> Evaluated:  # fmt: skip
    """Constants at radii near that where radius = min_k margin_k / constant_k, for which plain_bound is largest.

    first: an upper bound or estimate of it, such as margin over the gradient's norm; `share` of it is tried first. Ends
    after so many evaluations, or where phi(radius) = min_k margin_k / constant_k is close to the radius.
    """
    evaluated: Evaluated = []
    within, beyond = 0.0, np.inf
    radius = min(first * share, farthest)
    for _ in range(evaluations):
        evaluated.append((radius, constants(radius)))
        phi = min(_smallest_ratio(margins, evaluated[-1][1]), farthest)
        if phi > 0 and abs(np.log(phi / radius)) < close:
            break
        within, beyond = (radius, beyond) if phi > radius else (within, radius)
        if phi > SAME * first > radius:  # as good as linear
            radius = min(first, farthest)
        elif within > 0 and beyond < np.inf:
            radius = float(np.sqrt(within * beyond))
        else:  # computed constants grow faster than exponentially, so phi alone says too little far away
            radius = float(radius * np.clip(np.sqrt(phi / radius), 1 / LONGEST_STEP, LONGEST_STEP))
    return evaluated


def _smallest_ratio(margins: np.ndarray, constants: np.ndarray) -> float:
    ratios = np.divide(margins, constants, out=np.full(len(margins), np.inf), where=constants > 0)
    return float(ratios.min())
