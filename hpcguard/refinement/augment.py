"""Random shifts and flips that move an image and its flagged pixels together."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional


def augment(
    x: Tensor, pixels: Tensor, kind: Literal["none", "crop", "crop-flip"], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] and pixels bool [B, 1, H, W], each image shifted by up to an eighth of its size (edges padded
    with black, never flagged) and, with crop-flip, mirrored half of the time."""
    if kind == "none":
        return x, pixels
    batch, channels, height, width = x.shape
    pad = max(1, height // 8)
    both = functional.pad(torch.cat([x, pixels.to(x.dtype)], 1), (pad, pad, pad, pad))
    top, left = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=generator)
    flip = torch.rand(batch, 1, generator=generator) < (0.5 if kind == "crop-flip" else -1.0)
    columns = torch.arange(width).expand(batch, width)
    columns = left + torch.where(flip, columns.flip(1), columns)
    rows = top + torch.arange(height)
    image = torch.arange(batch)[:, None, None]
    moved = both.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return moved[:, :channels].contiguous(), moved[:, channels:] > 0.5
