"""ImageSet: images known by integer ids, read when asked for."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn import functional

from hpcguard.errors import InputError
from hpcguard.runs import digest_arrays, digest_json


class Pixels(Protocol):
    """Where an image set's pixels come from. Ids given to it are known to exist."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        """float32 [n, C, H, W] in [0, 1], in the order of `ids`."""

    def digest(self, ids: np.ndarray) -> str:
        """SHA-256 of the content behind `ids`."""


@dataclass(frozen=True)
class ImageSet:
    """One split of a data set. An image's id is its place in the original training or test part."""

    name: str
    split: str
    classes: tuple[str, ...]
    ids: np.ndarray  # int64 [N], ascending
    labels: np.ndarray  # int64 [N]
    shape: tuple[int, int, int]  # (C, H, W)
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.ids)

    def images(self, ids: ArrayLike) -> np.ndarray:
        """Pixels of `ids` as float32 [n, C, H, W] in [0, 1], in their order.

        Raises InputError for an id that is not in the set, and for an image file that is damaged.
        """
        wanted = self.ids[self._rows(ids)]
        if len(wanted) == 0:
            return np.empty((0, *self.shape), np.float32)
        return self.pixels.read(wanted)

    def labels_of(self, ids: ArrayLike) -> np.ndarray:
        """Labels of `ids` as int64 [n], in their order. Raises InputError for an unknown id."""
        return self.labels[self._rows(ids)]

    def subset(self, ids: ArrayLike) -> "ImageSet":
        """The same split with only `ids`, ascending and each once. Raises InputError for an unknown id."""
        rows = np.unique(self._rows(ids))
        return replace(self, ids=self.ids[rows], labels=self.labels[rows])

    def digest(self) -> str:
        """SHA-256 over shape, ids, labels and pixels (image-folder: file names and sizes instead)."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """Kept: several arms and stages ask for it, and it reads every pixel."""
        return digest_json([self.shape, digest_arrays(self.ids, self.labels), self.pixels.digest(self.ids)])

    def _rows(self, ids: ArrayLike) -> np.ndarray:
        wanted = np.asarray(ids)
        if wanted.size == 0:
            return np.empty(0, np.int64)
        if wanted.ndim != 1 or wanted.dtype.kind not in "iu":
            found = f"{wanted.dtype} {list(wanted.shape)}"
            raise InputError(f"{self.name} {self.split}: image ids are a list of integers, found {found}")
        rows = np.searchsorted(self.ids, wanted)
        known = np.zeros(len(wanted), bool)
        inside = rows < len(self.ids)
        known[inside] = self.ids[rows[inside]] == wanted[inside]
        if not known.all():
            unknown = wanted[~known]
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            held = f"{len(self)} ids from {self.ids[0]} to {self.ids[-1]}" if len(self) else "no images"
            raise InputError(f"{self.name} {self.split}: no image has id {unknown[0]}{more}; it holds {held}")
        return rows


@dataclass(frozen=True)
class ArrayPixels:
    """Pixels in memory: uint8 [M, C, H, W], row = id, `white` the value that becomes 1."""

    array: np.ndarray
    white: int
    size: int | None = None  # resize to size x size when read

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.array.shape[1:]
        return (channels, self.size or height, self.size or width)

    def read(self, ids: np.ndarray) -> np.ndarray:
        images = self.array[ids].astype(np.float32) / np.float32(self.white)
        if images.shape[1:] == self.shape:
            return images
        # Every image is resized by itself, so its pixels do not depend on the others that are read with it.
        resized = functional.interpolate(
            torch.from_numpy(images), self.shape[1:], mode="bilinear", antialias=True, align_corners=False
        )
        return resized.clamp(0, 1).numpy()

    def digest(self, ids: np.ndarray) -> str:
        return digest_arrays(np.array(self.white), self.array[ids])
