"""Which segments are spurious: plain functions over store rows (N images, labels: true then runner-up, S segments)."""

import numpy as np

from hpcguard.config import SpuriousConfig
from hpcguard.errors import InputError
from hpcguard.randomness import keyed_generator

Rows = dict[str, np.ndarray]


def flag_segments(rows: Rows, config: SpuriousConfig, seed: int) -> np.ndarray:
    """Flagged segments, bool [N, S], by config.rule; never padding, at most config.share of an image's segments."""
    most = np.floor(config.share * rows["num_segments"]).astype(int)
    if config.rule == "weight":
        return _largest(np.abs(rows["coefficients"][:, 0]), most)
    misleading = _largest(misleading_evidence(rows, config.z), most)
    return misleading if config.rule == "misleading" else _random_like(misleading, rows, seed)


def misleading_evidence(rows: Rows, z: float) -> np.ndarray:
    """How much more a segment supports the strongest wrong label than the true one, less z standard errors, [N, S].

    The two errors are added as if independent; the labels share their samples, and in a classifier one's gain is
    mostly the other's loss, so this is the order of the truth and not a bound.
    """
    true, wrong = rows["coefficients"][:, 0], rows["coefficients"][:, 1]
    error = np.hypot(rows["standard_error"][:, 0], rows["standard_error"][:, 1])
    return wrong - true - z * error


def _largest(evidence: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The `most[n]` segments of largest positive evidence in each row."""
    positive = np.where(evidence > 0, evidence, -np.inf)  # NaN padding compares as not positive
    rank = np.argsort(np.argsort(-positive, axis=1, kind="stable"), axis=1)
    return (rank < most[:, None]) & np.isfinite(positive)


def _random_like(flagged: np.ndarray, rows: Rows, seed: int) -> np.ndarray:
    """As many random segments of each image as are flagged: the control for whether it matters which."""
    chosen = np.zeros_like(flagged)
    for row, image_id, count, segments in zip(
        chosen, rows["image_id"], flagged.sum(1), rows["num_segments"], strict=True
    ):
        row[keyed_generator("spurious", seed, int(image_id)).permutation(int(segments))[:count]] = True
    return chosen


def check_flagged(flagged: np.ndarray, num_segments: np.ndarray, config: SpuriousConfig) -> dict[str, float]:
    """Shares of segments flagged, of images with none and with all flagged.

    Raises InputError beyond config.max_empty: training on empty masks would be called guided and be none.
    """
    count = flagged.sum(1)
    shares = {
        "flagged": float((count / num_segments).mean()),
        "empty": float((count == 0).mean()),
        "full": float((count == num_segments).mean()),
    }
    for kind in ("empty", "full"):
        if shares[kind] > config.max_empty:
            raise InputError(
                f"spurious.rule = {config.rule}: {shares[kind]:.0%} of the images have {kind} masks, more than "
                f"spurious.max_empty = {config.max_empty}; change share ({config.share}) or z ({config.z})"
            )
    return shares
