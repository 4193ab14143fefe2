"""From flagged segments to pixels, and hiding them."""

import torch
from torch import Tensor


def flagged_pixels(flagged: Tensor, segments: Tensor) -> Tensor:
    """Pixels of flagged segments: bool [B, S] and integer [B, H, W] to bool [B, 1, H, W]."""
    return flagged.gather(1, segments.flatten(1).long()).reshape(segments.shape).unsqueeze(1)


def hide(x: Tensor, pixels: Tensor, fill: Tensor) -> Tensor:
    """x [B, C, H, W] with `fill` (broadcast to it) where `pixels` [B, 1, H, W]: x' = x * (1 - M) + fill * M."""
    return torch.where(pixels, fill, x)
