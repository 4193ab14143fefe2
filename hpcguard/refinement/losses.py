"""Loss terms of guided refinement."""

import torch
from torch import Tensor


def true_class_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class less the largest other one, [B]."""
    true = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (true - others.amax(1, keepdim=True))[:, 0]


def sensitivity_penalty(logits: Tensor, x: Tensor, y: Tensor, pixels: Tensor) -> Tensor:
    """Mean over images and input coordinates of (M * d margin / dx)^2, differentiable in the parameters.

    The paper's L_reg (arXiv 2601.00968) with the margin of the true class for its logit. `x` [B, C, H, W] must be the
    leaf that `logits` came from; `pixels` M is bool [B, 1, H, W].
    """
    (gradient,) = torch.autograd.grad(true_class_margin(logits, y).sum(), x, create_graph=True)
    return (gradient * pixels).square().mean()
