"""Which images a model still gets right under an attack."""

from collections.abc import Callable

import torch
from torch import Tensor

from hpcguard.attacks import fgsm, pgd, random_start

Model = Callable[[Tensor], Tensor]


@torch.no_grad()
def is_right(model: Model, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Whether each image [B, C, H, W] is classified as y, bool [B]; a NaN logit never counts as right."""
    rights = []
    for start in range(0, len(x), batch_size):
        logits = model(x[start : start + batch_size])
        rights.append((logits.argmax(1) == y[start : start + batch_size]) & logits.isfinite().all(1))
    return torch.cat(rights) if rights else torch.zeros(0, dtype=torch.bool, device=x.device)


def survives(
    model: Model, attack: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, right: Tensor, batch_size: int
) -> Tensor:
    """Which of the images that are still `right` stay right when attacked, bool [B]; only those are attacked."""
    left = right.nonzero()[:, 0]
    outcome = torch.zeros_like(right)
    for part in left.split(batch_size):
        outcome[part] = is_right(model, attack(x[part], y[part]), y[part], batch_size)
    return outcome


def survives_fgsm(model: Model, x: Tensor, y: Tensor, right: Tensor, eps: float, batch_size: int) -> Tensor:
    return survives(model, lambda a, b: fgsm(model, a, b, eps), x, y, right, batch_size)


def survives_pgd(
    model: Model, x: Tensor, y: Tensor, right: Tensor, eps: float, steps: int, restarts: int, batch_size: int, seed: int
) -> Tensor:
    """Right after every one of `restarts` runs of PGD (step eps / 4) from random starts."""
    generator = torch.Generator().manual_seed(seed)

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        noise = torch.empty(images.shape).uniform_(-1, 1, generator=generator).to(images.device)
        return pgd(model, images, labels, eps, steps, start=random_start(images, noise, eps))

    for _ in range(restarts):
        right = survives(model, attack, x, y, right, batch_size)
    return right
