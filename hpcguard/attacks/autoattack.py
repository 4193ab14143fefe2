"""AutoAttack (Croce & Hein 2020) through the maintained library pyautoattack."""

from typing import Literal

import torch
from torch import Tensor, nn

from hpcguard.errors import InputError

Version = Literal["standard", "rand", "fast", "untargeted"]
PARTS = {"fast": ["apgd-ce", "apgd-t"], "untargeted": ["apgd-ce", "fab", "square"]}
TARGETED_NEEDS = 4  # classes, for the targeted DLR loss


def check_classes(version: str, classes: int) -> None:
    """Raises InputError if AutoAttack's version needs more classes."""
    if classes < TARGETED_NEEDS and version in ("standard", "rand", "fast"):
        raise InputError(
            f"evaluation.autoattack = {version}: needs {TARGETED_NEEDS} classes, there are {classes}; use untargeted"
        )


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, version: Version, seed: int, batch_size: int
) -> Tensor:
    """Which images stay right under AutoAttack in the Linf ball, bool [B]; `model` gives logits for x in [0, 1].

    standard: apgd-ce, apgd-t, fab-t, square; rand: for randomised models; fast and untargeted: see PARTS, weaker.
    Raises InputError for a version that needs more classes.
    """
    import pyautoattack  # brings a second of imports that only evaluation needs

    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    check_classes(version, classes)
    chosen = {"version": "custom", "attacks": PARTS[version]} if version in PARTS else {"version": version}
    attacker = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, seed=seed, device=x.device, **chosen)
    for targeted in (attacker.apgd_targeted, attacker.fab):  # with few classes there are fewer targets than 9
        targeted.n_target_classes = min(9, classes - 1)
    if version in PARTS:  # as in the standard version
        attacker.apgd.n_restarts = attacker.fab.n_restarts = 1
    _, predicted = attacker.run_standard_evaluation(x, y, batch_size=batch_size)
    return predicted == y
