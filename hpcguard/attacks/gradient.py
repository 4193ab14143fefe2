"""Gradient attacks in Linf and L2 balls, in [0, 1] pixel space, on a model that gives logits.

The model's mode is the caller's: in eval mode batch statistics are neither used nor changed.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Model = Callable[[Tensor], Tensor]
Norm = Literal["linf", "l2"]
Loss = Callable[[Tensor], Tensor]  # logits [B, K] to a sum over the batch


def fgsm(model: Model, x: Tensor, y: Tensor, eps: float, norm: Norm = "linf", where: Tensor | None = None) -> Tensor:
    """One step of length eps along the gradient's sign (Goodfellow et al. 2015) or, in L2, along the gradient."""
    gradient = _restricted(_gradient(model, x, _cross_entropy(y)), where)
    return (x + _step(gradient, eps, norm)).clamp(0, 1)


def pgd(
    model: Model, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float | None = None,
    start: Tensor | None = None, norm: Norm = "linf", where: Tensor | None = None, loss: Loss | None = None,
    first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient ascent (Madry et al. 2018) from x [B, C, H, W]; its shape.

    start: an image of the ball to begin at, see `random_start`; None: x. step_size: None is eps / 4.
    where: bool [B, 1, H, W], the only pixels that may change. loss: ascended; None: the cross-entropy with labels y.
    first: a gradient at the start that is known already, for the first step.
    """
    step = eps / 4 if step_size is None else step_size
    loss = loss or _cross_entropy(y)
    attacked = x if start is None else start
    for index in range(steps):
        gradient = first if index == 0 and first is not None else _gradient(model, attacked, loss)
        attacked = project(attacked + _step(_restricted(gradient, where), step, norm), x, eps, norm)
    return attacked


def margin_loss(y: Tensor) -> Loss:
    """The largest other logit less the true one (Carlini & Wagner 2017): its gradient does not vanish where a softmax
    saturates, as the cross-entropy's does."""

    def loss(logits: Tensor) -> Tensor:
        logits, true = logits.float(), y[:, None]
        return (logits.scatter(1, true, -torch.inf).amax(1) - logits.gather(1, true)[:, 0]).sum()

    return loss


def random_start(x: Tensor, noise: Tensor, eps: float, norm: Norm = "linf", where: Tensor | None = None) -> Tensor:
    """x moved by noise in [-1, 1]: each pixel by eps times it (Linf), or all along it by eps (L2, where nearly all of
    a ball's volume is at its surface)."""
    noise = _restricted(noise, where)
    length = 1.0 if norm == "linf" else _norm(noise).clamp_min(1e-12)
    return (x + eps * noise / length).clamp(0, 1)


def project(attacked: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """An image of the ball around x and in [0, 1]: the nearest in Linf, and near it in L2."""
    if norm == "linf":
        return torch.min(torch.max(attacked, x - eps), x + eps).clamp(0, 1)
    change = attacked - x
    # Clamping to [0, 1] afterwards only shortens the change, since x lies in there.
    return (x + change * (eps / _norm(change).clamp_min(eps or 1e-12))).clamp(0, 1)


def _step(gradient: Tensor, length: float, norm: Norm) -> Tensor:
    """The steepest step of that length."""
    return length * (gradient.sign() if norm == "linf" else gradient / _norm(gradient).clamp_min(1e-20))


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)[:, None, None, None]


def _restricted(values: Tensor, where: Tensor | None) -> Tensor:
    return values if where is None else values * where


def _cross_entropy(y: Tensor) -> Loss:
    # Summed, not averaged: an image's gradient must not shrink with the batch.
    return lambda logits: functional.cross_entropy(logits.float(), y, reduction="sum")


def _gradient(model: Model, x: Tensor, loss: Loss) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(model(x)), x)[0]
