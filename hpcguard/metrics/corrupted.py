"""Which corrupted images a model gets right."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcguard.config.corruptions import SEVERITIES, Corruption
from hpcguard.metrics.robustness import Model, is_right

Read = Callable[[Corruption, int, np.ndarray], np.ndarray]


def right_when_corrupted(
    model: Model, read: Read, names: Sequence[Corruption], ids: np.ndarray, labels: Tensor, batch_size: int,
    done: Callable[[], None] = lambda: None,
) -> np.ndarray:  # fmt: skip
    """Whether each image is still classified right, bool [C, 5, N]; labels [N] lie on the model's device.

    read: images float32 [n, C, H, W] of a corruption, a severity and ids, such as Corrupted.images; asked for
    batch_size at once. done: called after each of the 5 C sets.
    """
    right = np.zeros((len(names), len(SEVERITIES), len(ids)), bool)
    for place, name in enumerate(names):
        for row, severity in zip(right[place], SEVERITIES, strict=True):
            for start in range(0, len(ids), batch_size):
                part = slice(start, start + batch_size)
                x = torch.from_numpy(read(name, severity, ids[part])).to(labels.device)
                row[part] = is_right(model, x, labels[part], batch_size).cpu().numpy()
            done()
    return right
