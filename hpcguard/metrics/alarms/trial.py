"""Trial: which images are attacked, on which model, and how."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.attacks import margin_loss, pgd, random_start
from hpcguard.metrics.robustness import survives

Norm = Literal["linf", "l2"]
LossName = Literal["ce", "margin"]
LOSSES: tuple[LossName, ...] = ("ce", "margin")


@dataclass(frozen=True)
class Trial:
    """x [B, C, H, W] in [0, 1], labels y [B], bool [B] which are `right` unattacked; steps and restarts are PGD's."""

    model: nn.Module
    x: Tensor
    y: Tensor
    right: Tensor
    eps: float
    norm: Norm = "linf"
    steps: int = 20
    restarts: int = 1
    batch_size: int = 256
    seed: int = 0

    def attack(self, loss: LossName, x: Tensor, y: Tensor, generator: torch.Generator, more: int = 1) -> Tensor:
        """Images that PGD makes of x from a random start, with `more` times the steps."""
        noise = torch.empty(x.shape).uniform_(-1, 1, generator=generator).to(x.device)
        start = random_start(x, noise, self.eps, self.norm)
        # Many steps of eps / 4 would only jump to and fro; Madry et al. 2018 take 2.5 eps over the steps.
        size = None if more == 1 else 2.5 * self.eps / (more * self.steps)
        return pgd(self.model, x, y, self.eps, more * self.steps, size, start, self.norm, loss=ascended(loss, y))

    def pgd(self, loss: LossName, right: Tensor, more: int = 1, restarts: int | None = None) -> Tensor:
        """Which of the images that are `right` stay so under PGD from random starts, bool [B]."""
        generator = self.generator(2 * (more > 1) + (loss == "margin"))
        for _ in range(restarts or self.restarts):
            right = survives(
                self.model, lambda x, y: self.attack(loss, x, y, generator, more), self.x, self.y, right,
                self.batch_size,
            )  # fmt: skip
        return right

    def generator(self, purpose: int = 0) -> torch.Generator:
        """The same numbers again for the same purpose."""
        return torch.Generator().manual_seed(4 * self.seed + purpose)


def ascended(loss: LossName, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The loss that an attack on labels y [B] ascends: logits [B, K] to a sum over the batch."""
    if loss == "ce":
        return lambda logits: functional.cross_entropy(logits.float(), y, reduction="sum")
    return margin_loss(y)
