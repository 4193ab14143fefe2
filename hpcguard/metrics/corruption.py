"""Accuracy on corrupted images, and the mean corruption error, from outcomes. C corruptions, S severities, N images.

No torch: a report computes the mCE, once the reference model is measured too.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hpcguard.config.corruptions import SEVERITIES
from hpcguard.metrics.resampling import bootstrap_means, interval


def summarise_corruptions(names: Sequence[str], right: np.ndarray, clean: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Accuracy by corruption and severity, and its mean over all, of right [C, S, N] and clean [N].

    Intervals are from resampled images: the versions of an image are right or wrong together, and count as one.
    """
    accuracies = right.mean(2)
    resampled = bootstrap_means(right.reshape(-1, right.shape[2]).astype(np.float64), seed=seed)
    by_name = resampled.reshape(*right.shape[:2], -1).mean(1)
    return {
        "images": right.shape[2],
        "clean": float(clean.mean()),
        "mean_accuracy": {"mean": float(accuracies.mean()), **interval(by_name.mean(0))},
        "corruptions": {
            name: {"severities": own.tolist(), "mean": float(own.mean()), **interval(draws)}
            for name, own, draws in zip(names, accuracies, by_name, strict=True)
        },
    }


def mean_corruption_error(
    names: Sequence[str], right: np.ndarray, clean: np.ndarray, reference: np.ndarray, reference_clean: np.ndarray,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """mCE and relative mCE against a reference model on the same images (Hendrycks & Dietterich 2019); 1 is alike.

    CE of a corruption: the errors of all severities over the reference's; relative: what they exceed the clean error
    by, over what the reference's do. None where the reference's is not above 0, and in the mean then.
    """
    wrong = np.concatenate([_errors(right, clean), _errors(reference, reference_clean)])
    measured = _corruption_errors(wrong.mean(1)[:, None])
    resampled = _corruption_errors(bootstrap_means(wrong, seed=seed))
    out: dict[str, Any] = {}
    for kind, own, draws in zip(("mce", "relative_mce"), measured, resampled, strict=True):
        mean = own.mean()
        bounds = interval(draws.mean(0)) if np.isfinite(mean) else {"low": None, "high": None}
        out[kind] = {"mean": _number(mean), **bounds}
        out[kind]["corruptions"] = {name: _number(value) for name, value in zip(names, own[:, 0], strict=True)}
    return out


def _errors(right: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Errors on clean images, then summed over severities, float64 [1 + C, N]."""
    return np.concatenate([~clean[None], (~right).sum(1)]).astype(np.float64)


def _corruption_errors(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """CE and relative CE, [C, draws] each, of means [2 (1 + C), draws] of both models' errors; NaN for no ratio."""
    (clean, *own), (reference_clean, *reference) = np.split(means, 2)
    severities = len(SEVERITIES)
    plain = _ratio(np.array(own), np.array(reference))
    return plain, _ratio(own - severities * clean, reference - severities * reference_clean)


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
