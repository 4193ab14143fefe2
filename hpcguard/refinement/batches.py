"""A rank's share of each global batch: its images, labels, flagged pixels, noise and fill."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hpcguard.config import TrainingConfig
from hpcguard.randomness import keyed_generator, torch_seed
from hpcguard.refinement.augment import augment, draw_shifts
from hpcguard.refinement.engine import Engine
from hpcguard.refinement.masking import flagged_pixels, segment_means
from hpcguard.refinement.schedule import steps_per_epoch, total_steps

T = TypeVar("T")
FLOATS_A_COUNT = 8  # what one count of numpy's Philox gives: four words of 64 bits


class Share(NamedTuple):
    """A rank's part of a global batch, as GuidedStep wants it."""

    x: Tensor
    y: Tensor
    pixels: Tensor
    noise: Tensor
    fill: Tensor | None


@dataclass(frozen=True)
class Batches:
    """What an arm trains on: `read(positions)` gives image, label and, where guided, segments and flagged, of those of
    `ids`."""

    read: Callable[[np.ndarray], dict[str, Tensor]]
    ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def shares(
    engine: Engine, batches: Batches, begin: int, config: TrainingConfig
) -> Iterator[tuple[int, np.ndarray, Share]]:
    """Each step from `begin` on, the positions of its global batch, and this rank's share of it on its device.

    Beside a GPU the next one is read while a step is computed; a CPU has better to do meanwhile.
    """

    def read(step: int) -> tuple[int, np.ndarray, Share]:
        chosen = _chosen(len(batches), step, config)
        return step, chosen, own_share(engine, batches, chosen, step, config)

    steps = range(begin, total_steps(len(batches), config))
    return map(read, steps) if engine.device.type == "cpu" else read_ahead(read, steps)


def read_ahead(read: Callable[[int], T], steps: Sequence[int]) -> Iterator[T]:
    """read(step) of each step in order, the next one in a thread while the last is in use; close it to stop early."""
    pending = None
    with ThreadPoolExecutor(1, "next-batch") as reader:
        for step in steps:
            ready, pending = pending, reader.submit(read, step)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()


def _chosen(size: int, step: int, config: TrainingConfig) -> np.ndarray:
    epoch, index = divmod(step, steps_per_epoch(size, config))
    return _order(size, config.seed, epoch)[index * config.batch_size :][: config.batch_size]


@lru_cache(1)
def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return keyed_generator("order", seed, epoch).permutation(size)


def own_share(engine: Engine, batches: Batches, chosen: np.ndarray, step: int, config: TrainingConfig) -> Share:
    """This rank's images, labels, flagged pixels, noise and fill of the global batch `chosen`, on its device.

    Only its own images are read. The random numbers of an image depend on the seed, the step and its place in the
    global batch, so they do not depend on the number of processes.
    """
    generator = torch.Generator().manual_seed(torch_seed("step", config.seed, step))
    per_rank = len(chosen) // engine.world_size
    own = slice(engine.rank * per_rank, (engine.rank + 1) * per_rank)
    batch = batches.read(chosen[own])
    shifts = draw_shifts(len(chosen), batch["image"].shape[2], config.augment, generator)
    image, segments = augment(batch["image"], batch.get("segments"), None if shifts is None else shifts[own])
    if segments is not None and config.guided:
        pixels = flagged_pixels(batch["flagged"], segments)
    else:
        pixels = image.new_zeros(per_rank, 1, *image.shape[2:], dtype=torch.bool)
    noise = draw_noise(image.shape, own.start, step, config.seed) if config.noisy else torch.zeros_like(image)
    fill = None
    if config.masking.weight and config.masking.fill == "segment-mean" and segments is not None:
        fill = segment_means(image, segments)
    elif config.masking.weight and config.masking.fill == "swap":
        others = batches.read(np.roll(chosen, 1)[own])["image"]  # the batch comes in random order
        fill, _ = augment(others, None, None if shifts is None else shifts.roll(1, 0)[own])
    image, label, pixels, noise = (_moved(each, engine.device) for each in (image, batch["label"], pixels, noise))
    return Share(image, label, pixels, noise, None if fill is None else _moved(fill, engine.device))


def _moved(values: Tensor, device: torch.device) -> Tensor:
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def draw_noise(shape: torch.Size, first: int, step: int, seed: int) -> Tensor:
    """Uniform in [-1, 1), float32 of `shape` [B, C, H, W], for the images at places first to first + B of a global
    batch: a rank draws no other's."""
    size = shape[1:].numel()
    counts = -(-size // FLOATS_A_COUNT)  # an image begins at a count of its own
    generator = keyed_generator("noise", seed, step, first * counts)
    drawn = torch.from_numpy(generator.random((shape[0], counts * FLOATS_A_COUNT), dtype=np.float32))
    return drawn[:, :size].reshape(shape).mul_(2).sub_(1)
