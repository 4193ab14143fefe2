"""Gradient attacks in the Linf ball, in [0, 1] pixel space, on a model that gives logits.

The model's mode is the caller's: in eval mode batch statistics are neither used nor changed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Model = Callable[[Tensor], Tensor]


def fgsm(model: Model, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One signed gradient step of size eps (Goodfellow et al. 2015); the shape of x [B, C, H, W]."""
    return (x + eps * _gradient(model, x, y).sign()).clamp(0, 1)


def pgd(
    model: Model, x: Tensor, y: Tensor, eps: float, steps: int, step_size: float | None = None,
    start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient descent on the cross-entropy (Madry et al. 2018); the shape of x [B, C, H, W].

    start: noise in [-1, 1] of x's shape, the random start in units of eps; None: start at x.
    step_size: None is eps / 4.
    """
    step = eps / 4 if step_size is None else step_size
    attacked = x if start is None else (x + eps * start).clamp(0, 1)
    for _ in range(steps):
        attacked = attacked + step * _gradient(model, attacked, y).sign()
        attacked = torch.min(torch.max(attacked, x - eps), x + eps).clamp(0, 1)
    return attacked


def _gradient(model: Model, x: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        # Summed, not averaged: an image's gradient must not shrink with the batch.
        loss = functional.cross_entropy(model(x), y, reduction="sum")
        return torch.autograd.grad(loss, x)[0]
