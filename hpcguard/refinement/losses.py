"""Loss terms of guided refinement."""

import torch
from torch import Tensor
from torch.nn import functional


def true_class_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the true class less the largest other one, [B]."""
    true = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], -torch.inf)
    return (true - others.amax(1, keepdim=True))[:, 0]


def margin_gradient(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """d margin / dx, the shape of x and differentiable in the parameters; `x` must be the leaf `logits` came from."""
    return torch.autograd.grad(true_class_margin(logits, y).sum(), x, create_graph=True)[0]


def sensitivity_penalty(gradient: Tensor, pixels: Tensor) -> Tensor:
    """Mean over images of |M * d margin / dx|^2, summed over the input's coordinates.

    The paper's L_reg (arXiv 2601.00968) with the margin of the true class for its logit, and a sum for its mean over
    coordinates, so that a weight means the same for images of any size. `gradient` is [B, C, H, W], `pixels` M bool
    [B, 1, H, W].
    """
    return (gradient * pixels).square().flatten(1).sum(1).mean()


def divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Mean KL(reference || other) of the probabilities of logits [B, K], as in TRADES (Zhang et al. 2019)."""
    return functional.kl_div(other.log_softmax(1), reference.log_softmax(1), reduction="batchmean", log_target=True)
