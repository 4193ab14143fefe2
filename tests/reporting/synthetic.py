"""Small results, trainings and explanations, as the stages write them."""

from typing import Any

import numpy as np

from hpcguard.metrics.accuracy import wilson_interval
from hpcguard.reporting.arms import Arm

ATTACKS = ("clean", "fgsm", "pgd-20", "autoattack")


def result(name: str, right: tuple[int, ...] = (95, 60, 50, 45), of: int = 100, **evaluation: Any) -> dict[str, Any]:
    attacks = {}
    for attack, count in zip(ATTACKS, right, strict=False):
        low, high = wilson_interval(count, of)
        attacks[attack] = {
            "right": count, "of": of, "accuracy": count / of, "low": low, "high": high, "seconds": 0.1,
        }  # fmt: skip
    return {
        "arm": name,
        "identity": {
            "weights_sha256": f"weights of {name}",
            "model": {"name": "small-cnn"},
            "evaluation": {
                "images": of, "eps": 0.1, "pgd_steps": 20, "pgd_restarts": 1, "autoattack": "standard",
                "batch_size": 256, "explained": 2, "seed": 0,
            } | evaluation,
            "attribution": {"num_samples": 16},
            "test_sha256": "digest",
        },
        "images": of,
        "attacks": attacks,
        "explanation_jaccard5": 0.75,
        "trusted": True,
        "alarms": [{"name": "randomness", "measured": {}, "limit": 1e-4, "red": False, "meaning": "-"}],
        "seconds": 12.3,
        "hardware": {"device": "cpu", "cores": 2, "torch": "2.11"},
        "revision": "abc123",
    }  # fmt: skip


def training(name: str, guided: bool = False) -> dict[str, Any]:
    return {
        "arm": name,
        "identity": {
            "training": {
                "clean_weight": 0.0, "adversarial_weight": 1.0, "attack": {"method": "pgd", "eps": 0.1},
                "masking": {"weight": 0.5 if guided else 0.0}, "sensitivity": {"weight": 0.0},
            }
        },
        "world_size": 2,
        "device": "cpu",
        "steps": 216,
        "spurious": {"flagged": 0.174, "empty": 0.002, "full": 0.0} if guided else {},
        "seconds": 48.3,
        "last_epoch": epoch(12),
        "weights_sha256": f"weights of {name}",
    }  # fmt: skip


def epoch(number: int, loss: float = 0.5) -> dict[str, Any]:
    return {
        "epoch": number, "loss": loss, "clean": 0.04, "adversarial": 0.375, "masked": 0.25, "sensitivity": 0.0,
        "validation_clean": 0.9, "validation_robust": 0.6, "seconds": 1.0,
    }  # fmt: skip


def store() -> dict[str, Any]:
    means = {"segments": 18.6, "score": 0.776, "relative_error": 0.033, "samples": 256.0, "accuracy": 0.9}
    return {"fingerprint": "f", "images": 1213, "shards": 4, "worker_seconds": 50.3, "statistics": means}


def explanations(ids: np.ndarray, labels: np.ndarray, size: int = 16) -> dict[str, np.ndarray]:
    """Two segments an image, left and right: the left one supports the true class, the right one speaks against it."""
    segments = np.zeros((len(ids), size, size), np.uint16)
    segments[:, :, size // 2 :] = 1
    target = np.stack([labels, (labels + 1) % 10], 1).astype(np.int32)
    coefficients = np.full((len(ids), 2, 3), np.nan, np.float32)
    coefficients[:, :, 0], coefficients[:, :, 1] = 0.2, -0.1
    return {
        "image_id": ids.astype(np.int64), "label": labels.astype(np.int32), "predicted": target[:, 1].copy(),
        "segments": segments, "num_segments": np.full(len(ids), 2, np.uint16), "target": target,
        "probability": np.tile(np.array([0.25, 0.625], np.float32), (len(ids), 1)),
        "coefficients": coefficients, "standard_error": np.abs(coefficients) * 0.1,
        "interval": np.abs(coefficients) * 0.2,
        "sensitivity": np.full((len(ids), 3), np.nan, np.float32),
        "instability": np.full((len(ids), 3), np.nan, np.float32),
        "intercept": np.zeros((len(ids), 2), np.float32), "score": np.ones((len(ids), 2), np.float32),
        "effective_samples": np.full(len(ids), 9, np.float32), "num_samples": np.full(len(ids), 16, np.uint32),
    }  # fmt: skip


def arms(guided: tuple[int, ...] = (95, 60, 50, 45), control: tuple[int, ...] = (95, 60, 50, 44)) -> list[Arm]:
    return [
        Arm("baseline", result("baseline", (98, 20, 3, 0))),
        Arm("pgd", result("pgd", control), training("pgd"), [epoch(1, 2.0), epoch(2, 1.0)]),
        Arm("guided", result("guided", guided), training("guided", guided=True), [epoch(1, 2.5), epoch(2, 0.8)]),
    ]
