"""Random shifts and flips that move an image and its segments together."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["none", "crop", "crop-flip"]
OUTSIDE = -1  # the segment of pixels that were shifted in


def draw_shifts(batch: int, size: int, kind: Kind, generator: torch.Generator) -> Tensor | None:
    """Rows, columns and flips for a batch of images of height `size`, int64 [B, 3]; None: leave them as they are."""
    if kind == "none":
        return None
    offsets = torch.randint(0, 2 * _pad(size) + 1, (2, batch), generator=generator)
    flips = torch.rand(batch, generator=generator) < (0.5 if kind == "crop-flip" else -1.0)
    return torch.stack([*offsets, flips.long()], 1)


def augment(x: Tensor, segments: Tensor | None, shifts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x [B, C, H, W] and segments [B, H, W], each image shifted by up to an eighth of its height (black, and OUTSIDE,
    come in at the edges) and mirrored where its flip is set."""
    if shifts is None:
        return x, segments
    batch, _, height, width = x.shape
    pad = _pad(height)
    columns = torch.arange(width).expand(batch, width)
    columns = shifts[:, 1:2] + torch.where(shifts[:, 2:] > 0, columns.flip(1), columns)
    rows = shifts[:, :1] + torch.arange(height)
    image = torch.arange(batch)[:, None, None]
    padded = functional.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    moved = padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
    if segments is None:
        return moved, None
    around = functional.pad(segments.long(), (pad, pad, pad, pad), value=OUTSIDE)
    return moved, around[image, rows[:, :, None], columns[:, None, :]]


def _pad(size: int) -> int:
    return max(1, size // 8)
