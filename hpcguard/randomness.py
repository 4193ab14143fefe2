"""Random numbers that depend on what they are for, never on where or in which order they are drawn."""

from typing import Literal

import numpy as np

STREAMS = ("samples", "spurious", "order", "step", "attack", "dropout", "blocks", "noise")
Stream = Literal["samples", "spurious", "order", "step", "attack", "dropout", "blocks", "noise"]


def keyed_generator(stream: Stream, seed: int, key: int, count: int = 0) -> np.random.Generator:
    """Counter-based generator (Philox) for one purpose; key is an image id, an epoch or a step, and it begins after
    `count` counts of four 64-bit words."""
    counter = np.array([count, 0, 0, STREAMS.index(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], dtype=np.uint64), counter=counter))


def torch_seed(stream: Stream, seed: int, key: int) -> int:
    """A seed for a torch.Generator from the same keys."""
    return int(keyed_generator(stream, seed, key).integers(2**62))
