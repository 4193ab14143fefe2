"""Normalized: a classifier on pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import nn


class Normalized(nn.Module):
    """`net` behind (x - mean) / std, so that attacks and explanations work in pixel space.

    mean and std hold one value, or one a channel. They are configuration: state_dict leaves them out.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.net = net
        self.normalizes = True  # for_inference turns it off where it would change nothing
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] in [0, 1] to logits [B, K]."""
        return self.net((images - self.mean) / self.std if self.normalizes else images)
