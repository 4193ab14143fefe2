"""From flagged segments to pixels, and hiding them."""

import torch
from torch import Tensor


def flagged_pixels(flagged: Tensor, segments: Tensor) -> Tensor:
    """Pixels of flagged segments: bool [B, S] and integer [B, H, W] to bool [B, 1, H, W]. -1 is outside the image."""
    segments = segments.long()  # torch compares no uint16
    found = flagged.gather(1, segments.flatten(1).clamp_min(0)).reshape(segments.shape)
    return (found & (segments >= 0)).unsqueeze(1)


def hide(x: Tensor, pixels: Tensor, fill: Tensor) -> Tensor:
    """x [B, C, H, W] with `fill` (broadcast to it) where `pixels` [B, 1, H, W]: x' = x * (1 - M) + fill * M."""
    return torch.where(pixels, fill, x)


def segment_means(x: Tensor, segments: Tensor) -> Tensor:
    """x [B, C, H, W] with every pixel the mean colour of its segment, integer [B, H, W]; -1 is a segment too."""
    batch, channels = x.shape[:2]
    own = (segments.flatten(1).long() + 1)[:, None].expand(-1, channels, -1)
    size = int(own.max()) + 1
    sums = x.new_zeros(batch, channels, size).scatter_add_(2, own, x.flatten(2))
    counts = x.new_zeros(batch, channels, size).scatter_add_(2, own, torch.ones_like(x).flatten(2))
    return (sums / counts.clamp_min(1)).gather(2, own).reshape(x.shape)
