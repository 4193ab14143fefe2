"""Which images a model still gets right under an attack."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hpcguard.attacks import fgsm, margin_loss, pgd, random_start
from hpcguard.attacks.gradient import Norm
from hpcguard.randomness import keyed_generator

Model = Callable[[Tensor], Tensor]
PgdLoss = Literal["cross-entropy", "margin"]
LOSSES: tuple[PgdLoss, ...] = ("cross-entropy", "margin")


@torch.no_grad()
def is_right(model: Model, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    """Whether each image [B, C, H, W] is classified as y, bool [B]; a NaN or infinite logit never counts as right."""
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
    for part in _batches(left, batch_size):
        outcome[part] = is_right(model, attack(x[part], y[part]), y[part], batch_size)
    return outcome


def _batches(rows: Tensor, size: int) -> Sequence[Tensor]:
    """None of no rows: torch splits these into one empty part, which not every model takes."""
    return rows.split(size) if len(rows) else []


def survives_fgsm(
    model: Model, x: Tensor, y: Tensor, right: Tensor, eps: float, batch_size: int, norm: Norm = "linf"
) -> Tensor:
    return survives(model, lambda a, b: fgsm(model, a, b, eps, norm), x, y, right, batch_size)


@dataclass(frozen=True)
class Pgd:
    """PGD (Madry et al. 2018) from random starts, in steps of a quarter of the radius."""

    steps: int
    restarts: int = 1
    loss: PgdLoss = "cross-entropy"
    norm: Norm = "linf"
    seed: int = 0


def survives_pgd(
    model: Model, x: Tensor, y: Tensor, ids: np.ndarray, right: Tensor, eps: float, how: Pgd, batch_size: int
) -> Tensor:
    """Which of the images that are still `right` stay right after every restart, bool [B].

    ids: int64 [B]; an image's starts depend on (how.seed, its id) alone.
    """
    for restart in range(how.restarts):
        left = right.nonzero()[:, 0]
        outcome = torch.zeros_like(right)
        for part in _batches(left, batch_size):
            images, labels = x[part], y[part]
            noise = start_noise(ids[part.cpu().numpy()], images.shape[1:], how, restart).to(x.device)
            start = random_start(images, noise, eps, how.norm)
            loss = margin_loss(labels) if how.loss == "margin" else None
            attacked = pgd(model, images, labels, eps, how.steps, start=start, norm=how.norm, loss=loss)
            outcome[part] = is_right(model, attacked, labels, batch_size)
        right = outcome
    return right


def start_noise(ids: np.ndarray, shape: Sequence[int], how: Pgd, restart: int) -> Tensor:
    """Uniform in [-1, 1), float32 [n, *shape]: each image's own, another for every loss and restart."""
    place = restart * len(LOSSES) + LOSSES.index(how.loss)
    noise = np.empty((len(ids), *shape), np.float32)
    for row, image in zip(noise, ids, strict=True):
        keyed_generator("attack", how.seed, int(image), place << 32).random(out=row, dtype=np.float32)
    return torch.from_numpy(noise * 2 - 1)


def falls_at(survivors: Callable[[Tensor, float], Tensor], right: Tensor, radii: Sequence[float]) -> np.ndarray:
    """The smallest of the ascending radii that each image falls at, float64 [B]: 0 if it is wrong unattacked, infinite
    if it survives all. What has fallen at a radius is in every larger ball too, and is not attacked again.

    survivors(right, radius): the images still right under the attack.
    """
    found = np.where(right.cpu().numpy(), np.inf, 0.0)
    for radius in radii:
        left = survivors(right, radius)
        found[(right & ~left).cpu().numpy()] = radius
        right = left
    return found
