"""small-cnn: four convolutions for images of 8 to 64 pixels, quick on a CPU."""

import math

import torch
from torch import nn

from hpcguard.errors import InputError
from hpcguard.models.activations import ACTIVATIONS

NORMS = ("group", "none")
STRIDES = (1, 2)


class SmallCNN(nn.Sequential):
    """Widths w, 2w, 4w, 4w, the second and third with stride 2, then a mean over the map and a linear layer.

    61 thousand weights at width 16. With stride 2 the first convolution halves the map too, which on a CPU makes
    width 24 about three times as quick on 32x32 images as width 16 without. GELU by default: networks with smooth
    activations can fit a penalty on their input gradients, ReLU networks hardly (arXiv:2409.20139). GroupNorm,
    because it does the same in training and evaluation, and nothing in it depends on the other images of a batch.
    Raises InputError for a width, stride, activation or norm that is not allowed.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        width: int = 16,
        activation: str = "gelu",
        norm: str = "group",
        stride: int = 1,
    ) -> None:
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise InputError(f"model.options.width = {width!r}: write a whole number from 1, for example 16")
        if activation not in ACTIVATIONS:
            raise InputError(f"model.options.activation = {activation!r}: allowed: {', '.join(ACTIVATIONS)}")
        if norm not in NORMS:
            raise InputError(f"model.options.norm = {norm!r}: allowed: {', '.join(NORMS)}")
        if isinstance(stride, bool) or stride not in STRIDES:
            raise InputError(f"model.options.stride = {stride!r}: allowed: 1, 2")
        widths, strides = (width, 2 * width, 4 * width, 4 * width), (stride, 2, 2, 1)
        layers: list[nn.Module] = []
        for inputs, outputs, step in zip((channels, *widths), widths, strides, strict=False):
            layers.append(nn.Conv2d(inputs, outputs, 3, step, padding=1))
            if norm == "group":
                layers.append(nn.GroupNorm(math.gcd(outputs, 8), outputs))
            layers.append(ACTIVATIONS[activation]())
        super().__init__(*layers, MeanOverMap(), nn.Linear(widths[-1], num_classes))


class MeanOverMap(nn.Module):
    """[B, C, H, W] to [B, C]."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features.mean((2, 3))
