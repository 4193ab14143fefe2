"""AttributionDataset: images joined with their stored explanations by image id."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hpcguard.data import ImageSet
from hpcguard.errors import InputError
from hpcguard.store.reading import StoreReader
from hpcguard.store.schema import DECODED

FLAGGING = ("image_id", "num_segments", "label", "target", "coefficients", "standard_error")
SELDOM = ("interval", "sensitivity", "instability", "segments")  # what only some criteria need, read where asked for
HELD_BYTES = 2**30  # a store whose decoded columns take at most so much is held in memory unless one says otherwise


class StoredColumn:
    """A column of some rows that is read, slice by slice, when it is asked for."""

    def __init__(self, reader: StoreReader, name: str, positions: np.ndarray) -> None:
        self.reader, self.name, self.positions = reader, name, positions
        self.shape = (len(positions), *reader.shapes[name][1:])

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.reader.rows(self.name, self.positions[part])


class AttributionDataset(Dataset[dict[str, Tensor]]):
    """A torch Dataset over the rows of a store that belong to `images`, in the order of their ids.

    Items: image float32 [C, H, W], label and image_id int64, flagged bool [S] (see `flagged`), and of `columns`:
    segments [H, W], uint8 where S <= 256 and else uint16, and coefficients float32 [L, S], NaN past an image's last
    segment. All tensors are contiguous. `BlockShuffled` goes through it in an order that is quick to read.

    memory: hold the decoded columns in memory; None: where they take at most HELD_BYTES. May be pickled, and read by
    forked and by spawned DataLoader workers: each opens files of its own (and reads anew what is held, if spawned).
    Raises InputError if an image has no row or several, and if rows are of images of another size or class. That the
    images are those that were explained, pixel by pixel, is not looked at here: their digest takes as long as reading
    them all, and is compared with the plan's where a stage begins.
    """

    def __init__(
        self, store: Path, images: ImageSet, columns: Sequence[str] = DECODED, memory: bool | None = None
    ) -> None:
        if unknown := set(columns) - set(DECODED):
            raise InputError(f"columns {', '.join(sorted(unknown))} are not decoded: some of {', '.join(DECODED)}")
        self.images, self.columns = images, tuple(columns)
        self.reader = StoreReader(store)
        self.positions = _join(store, self.reader.column("image_id"), images)
        _check_joined(self.reader, self.positions, images)
        segments = self.reader.shapes["coefficients"][2]
        label = np.dtype(np.uint8 if segments <= 256 else np.uint16)
        self._dtypes = {"segments": label, "coefficients": np.dtype(np.float32)}
        self.flagged = np.zeros((len(images), segments), bool)
        needed = len(images) * self.reader.row_bytes(self.columns)
        self.memory = needed <= HELD_BYTES if memory is None else memory
        self._held = self._decode_all() if self.memory else None

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be read again: a spawned worker is not sent a gigabyte."""
        return {name: value for name, value in self.__dict__.items() if name != "rows"} | {"_held": None}

    @cached_property
    def rows(self) -> dict[str, Any]:
        """The columns that flagging is made from, [N, ...] each, read when first asked for; SELDOM as StoredColumn."""
        held: dict[str, Any] = {name: self.reader.rows(name, self.positions) for name in FLAGGING}
        return held | {
            name: StoredColumn(self.reader, name, self.positions) for name in SELDOM if name in self.reader.shapes
        }

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """What a DataLoader asks for: the items of a batch, their rows read together."""
        batch = self.batch(np.arange(len(self))[np.asarray(indices)])
        return [{name: values[place] for name, values in batch.items()} for place in range(len(indices))]

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Several items at once, stacked along the first axis."""
        return self.complete(indices, self.decode(indices))

    def decode(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The stored columns of some items."""
        if self.memory and self._held is None:
            self._held = self._decode_all()
        if self._held is not None:
            return {name: self._held[name][indices] for name in self.columns}
        return {name: self.reader.rows(name, self.positions[indices], self._dtypes[name]) for name in self.columns}

    def complete(self, indices: np.ndarray, decoded: dict[str, np.ndarray]) -> dict[str, Tensor]:
        """A batch from decoded columns: joined with the images, as tensors."""
        ids = self.images.ids[indices]
        return {
            "image": torch.from_numpy(self.images.images(ids)),
            "label": torch.from_numpy(self.images.labels_of(ids)),
            "image_id": torch.from_numpy(ids),
            "flagged": torch.from_numpy(self.flagged[indices]),
            **{name: torch.from_numpy(values) for name, values in decoded.items()},
        }

    def _decode_all(self) -> dict[str, np.ndarray]:
        held = {}
        step = self.reader.block_rows(self.columns) if self.columns else 1
        for name in self.columns:
            held[name] = np.empty((len(self), *self.reader.shapes[name][1:]), self._dtypes[name])
            for start in range(0, len(self), step):
                part = self.positions[start : start + step]
                held[name][start : start + step] = self.reader.rows(name, part, self._dtypes[name])
        return held


def _check_joined(reader: StoreReader, positions: np.ndarray, images: ImageSet) -> None:
    """Ids alone fit whatever has as many images: compare sizes and classes too."""
    if images.shape[1:] != reader.shapes["segments"][1:]:
        shown, stored = ("x".join(map(str, each)) for each in (images.shape[1:], reader.shapes["segments"][1:]))
        raise InputError(f"{reader.store}: explains images of {stored}, {images.name} has {shown}; change data.size")
    labels = reader.column("label")[positions]
    if len(wrong := np.flatnonzero(labels != images.labels)):
        first = wrong[0]
        raise InputError(
            f"{reader.store}: {len(wrong)} of {len(images)} images have another class than in {images.name} "
            f"{images.split} (image {images.ids[first]}: {labels[first]}, there {images.labels[first]}): these are "
            "other images; attribute and train with the same data section"
        )


def _join(store: Path, stored: np.ndarray, images: ImageSet) -> np.ndarray:
    """The store's row of every image; `stored` are the ids of its rows."""
    order = np.argsort(stored, kind="stable")
    ascending = stored[order]
    if len(twice := ascending[1:][ascending[1:] == ascending[:-1]]):
        raise InputError(f"{store}: image {twice[0]} has several rows; attribute, then consolidate, again")
    found = np.searchsorted(stored, images.ids, sorter=order)
    positions = order[np.minimum(found, len(order) - 1)] if len(order) else np.zeros(0, np.int64)
    absent = images.ids[stored[positions] != images.ids] if len(order) else images.ids
    if len(absent):
        raise InputError(
            f"{store}: no row for {len(absent)} of {len(images)} images (first id {absent[0]}); "
            "attribute and train with the same data section"
        )
    return positions
