"""Which images stay right: clean, FGSM, PGD on two losses, AutoAttack, and PGD by radius."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks import autoattack
from hpcguard.attacks.autoattack import name_of
from hpcguard.config import EvaluationConfig
from hpcguard.evaluation.case import Case, Measured
from hpcguard.metrics.robustness import Pgd, falls_at, is_right, survives_fgsm, survives_pgd
from hpcguard.store import Outcomes


def measure_attacks(case: Case) -> Measured:
    """All attacks on one batch. A model whose answers are not one logit a class is an InputError."""
    right, seconds = attack(case.config.evaluation, case.model, case.x, case.y, case.ids, case.report)
    return Measured(Outcomes(case.ids, case.y.cpu().numpy(), right).columns(), seconds)


def measure_curve(case: Case) -> Measured:
    """Column falls_at, float64 [B]: the smallest radius of the curve at which PGD changes the answer; 0: it is wrong
    unattacked; infinite: none of them."""
    config = case.config.evaluation
    clean = is_right(case.model, case.x, case.y, config.batch_size)
    survivors = partial(_survives_all_pgd, config, case.model, case.x, case.y, case.ids)
    return Measured({"falls_at": falls_at(survivors, clean, config.curve)})


def attack(
    config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """Which images [B, C, H, W] stay right under each attack, from the weakest to the strongest, and its seconds.

    FGSM, PGD and AutoAttack each start from what is right unattacked; PGD's losses from what the one before left.
    """
    outcomes: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    def measured(name: str, run: Callable[[], Tensor]) -> Tensor:
        since = time.monotonic()
        right = run()
        outcomes[name] = right.cpu().numpy()
        seconds[name] = time.monotonic() - since
        between()
        return right

    size = config.batch_size
    clean = measured("clean", lambda: is_right(model, x, y, size))
    measured("fgsm", lambda: survives_fgsm(model, x, y, clean, config.eps, size, config.norm))
    left = clean
    for name, how in zip(pgd_names(config), _pgds(config), strict=True):
        left = measured(name, partial(survives_pgd, model, x, y, ids, left, config.eps, how, size))
    if config.autoattack != "none":
        measured(autoattack_name(config), lambda: survives_autoattack(config, model, x, y, clean))
    return outcomes, seconds


def pgd_names(config: EvaluationConfig) -> list[str]:
    """pgd-20x5, pgd-20x5-margin."""
    name = f"pgd-{config.pgd_steps}" + (f"x{config.pgd_restarts}" if config.pgd_restarts > 1 else "")
    return [name if loss == "cross-entropy" else f"{name}-{loss}" for loss in config.pgd_losses]


def autoattack_name(config: EvaluationConfig) -> str:
    return "autoattack" if config.autoattack == "standard" else f"autoattack-{name_of(config.autoattack)}"


def _pgds(config: EvaluationConfig) -> list[Pgd]:
    return [Pgd(config.pgd_steps, config.pgd_restarts, loss, config.norm, config.seed) for loss in config.pgd_losses]


def _survives_all_pgd(
    config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, right: Tensor, radius: float
) -> Tensor:
    for how in _pgds(config):
        right = survives_pgd(model, x, y, ids, right, radius, how, config.batch_size)
    return right


def survives_autoattack(config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, right: Tensor) -> Tensor:
    """Which of the images that are still `right` stay right, bool [B]; only those are attacked."""
    left = right.nonzero()[:, 0]
    outcome = torch.zeros_like(right)
    if len(left):
        outcome[left] = autoattack(
            model, x[left], y[left], config.eps, config.autoattack, config.seed, config.batch_size, config.norm
        )
    return outcome
