"""Case: one batch of test images, and the model that is measured on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from hpcguard.config import Config
from hpcguard.data import ImageSet


@dataclass(frozen=True)
class Case:
    """Images x [B, C, H, W] in [0, 1] on the model's device, their ids and labels."""

    config: Config
    model: nn.Module
    test: ImageSet
    ids: np.ndarray
    x: Tensor
    y: Tensor
    baseline: nn.Module | None = None  # the model that was explained, if there is one
    first: int = 0  # place of the first image among all that are measured
    report: Callable[[], None] = lambda: None  # called now and then, so that whoever waits sees that it lives


@dataclass(frozen=True)
class Measured:
    """Columns of one row an image, [B, ...] each; seconds by step, if there are several."""

    columns: Mapping[str, np.ndarray]
    seconds: Mapping[str, float] = field(default_factory=dict)
