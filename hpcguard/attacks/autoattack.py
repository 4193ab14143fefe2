"""AutoAttack (Croce & Hein 2020) through the maintained library pyautoattack."""

from typing import Literal

import torch
from torch import Tensor, nn

Version = Literal["standard", "rand", "fast"]
FAST = ["apgd-ce", "apgd-t"]


def autoattack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, version: Version, seed: int, batch_size: int
) -> Tensor:
    """Which images stay right under AutoAttack in the Linf ball, bool [B]; `model` gives logits for x in [0, 1].

    standard: apgd-ce, apgd-t, fab-t, square; rand: for randomised models; fast: apgd-ce and apgd-t alone, weaker.
    """
    import pyautoattack  # brings a second of imports that only evaluation needs

    attacks = {"version": "custom", "attacks": FAST} if version == "fast" else {"version": version}
    attacker = pyautoattack.AutoAttack(model, norm="Linf", eps=eps, seed=seed, device=x.device, **attacks)
    with torch.no_grad():
        wrong_classes = model(x[:1]).shape[1] - 1
    for targeted in (attacker.apgd_targeted, attacker.fab):  # with few classes there are fewer targets than 9
        targeted.n_target_classes = min(9, wrong_classes)
    if version == "fast":
        attacker.apgd.n_restarts = 1  # as in the standard version
    _, predicted = attacker.run_standard_evaluation(x, y, batch_size=batch_size)
    return predicted == y
