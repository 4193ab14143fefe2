"""Elementwise activations over intervals: the range of their slope, and a linear relaxation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Activation:
    """A function of one number, its slope, and where the slope turns: (place, slope there rounded outwards)."""

    name: str
    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    turns: tuple[tuple[float, float], ...] = ()

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest slope over each interval [low, high]."""
        if self.name == "relu":
            return (low >= 0).to(low), (high > 0).to(low)
        first, last = self.slope(low), self.slope(high)
        least, most = torch.minimum(first, last), torch.maximum(first, last)
        for place, extreme in self.turns:
            inside = (low <= place + NEAR) & (high >= place - NEAR)
            least = torch.where(inside, least.clamp(max=extreme), least)
            most = torch.where(inside, most.clamp(min=extreme), most)
        return least - ROUNDING, most + ROUNDING

    def relax(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """slope, shift, error with |function(z) - slope * z - shift| <= error on [low, high]."""
        if self.name == "relu":  # the parallelogram of least area (DeepZ, Singh et al. 2018)
            slope = high.clamp(min=0) / (high.clamp(min=0) - low.clamp(max=0)).clamp(min=TINY)
            error = torch.maximum(-slope * low.clamp(max=0), (1 - slope) * high.clamp(min=0)) / 2
            return slope, error, error
        least, most = self.slopes(low, high)
        slope = (least + most) / 2
        middle = (low + high) / 2
        steepest = torch.maximum(most - slope, slope - least)
        error = steepest * (high - low) / 2 * (1 + ROUNDING) + ROUNDING * (1 + middle.abs())
        return slope, self.function(middle) - slope * middle, error


NEAR, ROUNDING, TINY = 1e-6, 1e-12, 1e-300


def _gelu_slope(z: Tensor) -> Tensor:
    return torch.special.ndtr(z) + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5


def _silu_slope(z: Tensor) -> Tensor:
    sigma = z.sigmoid()
    return sigma * (1 + z * (1 - sigma))


def _softplus_slope(z: Tensor) -> Tensor:
    return torch.where(z > 20, torch.ones_like(z), z.sigmoid())  # torch's softplus is the identity from there


RELU = Activation("relu", torch.relu, lambda z: (z > 0).to(z))
GELU = Activation("gelu", functional.gelu, _gelu_slope, ((2**0.5, 1.128904146), (-(2**0.5), -0.128904146)))
SILU = Activation("silu", functional.silu, _silu_slope, ((2.39935728, 1.09983933), (-2.39935728, -0.09983933)))
SOFTPLUS = Activation("softplus", functional.softplus, _softplus_slope)
