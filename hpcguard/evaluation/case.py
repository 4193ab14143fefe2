"""Case: one batch of test images, and the model that is measured on it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
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
    other: nn.Module | None = None  # of quality: the model that was explained; of alarms: a sibling; if there is one
    report: Callable[[], None] = lambda: None  # called now and then, so that whoever waits sees that it lives

    def answered(self) -> tuple["Case", np.ndarray]:
        """The case of the images whose answer is finite, and which these are, bool [B]: no other can be explained."""
        with torch.no_grad():
            finite = self.model(self.x).isfinite().all(1)
        which = finite.cpu().numpy()
        return replace(self, ids=self.ids[which], x=self.x[finite], y=self.y[finite]), which


@dataclass(frozen=True)
class Measured:
    """Columns of one row an image, [B, ...] each; seconds by step, if there are several."""

    columns: Mapping[str, np.ndarray]
    seconds: Mapping[str, float] = field(default_factory=dict)


def spread(which: np.ndarray, columns: Mapping[str, np.ndarray], fill: float = np.nan) -> dict[str, np.ndarray]:
    """Columns of some of the images, [n, ...] each, as columns of all B of them; which: bool [B]."""
    out = {}
    for name, column in columns.items():
        out[name] = np.full((len(which), *column.shape[1:]), fill)
        out[name][which] = column
    return out
