"""The table of alarms of one model."""

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from hpcguard.attacks import autoattack
from hpcguard.config import EvaluationConfig
from hpcguard.metrics.alarms import Trial, raise_alarms
from hpcguard.metrics.robustness import is_right


def measure_alarms(
    config: EvaluationConfig, model: nn.Module, sibling: nn.Module | None, x: Tensor, y: Tensor
) -> list[dict[str, Any]]:
    """Rows of `raise_alarms` on all of the images x [N, C, H, W], as JSON."""
    right = is_right(model, x, y, config.batch_size)
    trial = Trial(
        model, x, y, right, config.eps, config.norm, config.pgd_steps, config.pgd_restarts, config.batch_size,
        config.seed,
    )  # fmt: skip

    def square(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return autoattack(
            model, x, y, config.eps, ["square"], config.seed, config.batch_size, config.norm, config.alarms.queries
        )

    return [asdict(row) for row in raise_alarms(trial, config.alarms, square=square, sibling=sibling)]
