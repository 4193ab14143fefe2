"""Exponential moving average of the weights (EMA), kept in float32 beside the model, the same on every rank.

Every rank moves its own copy: after a step of ZeRO 0 to 2 all ranks hold the same parameters, and their buffers are
averaged before (engine.average_buffers), so nothing needs to be sent. The floating-point buffers (batch statistics)
are averaged like the weights, since they belong to them; counters are copied.
"""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def start_average(model: M) -> M:
    """A copy of the model to hold the average. Make it before DeepSpeed has wrapped the model."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def decay_at(step: int, decay: float) -> float:
    """Short memory first, or a short training would be judged by its initialisation (as in TensorFlow's EMA)."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, step: int, decay: float) -> None:
    """average = d * average + (1 - d) * model, after optimiser step number `step` (from 0)."""
    new = model.state_dict()
    for name, values in average.state_dict().items():
        if values.is_floating_point():
            values.lerp_(new[name].to(values.dtype), 1 - decay_at(step, decay))
        else:
            values.copy_(new[name])
