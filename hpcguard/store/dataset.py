"""AttributionDataset: images joined with their stored explanations by image id."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hpcguard.data import ImageSet
from hpcguard.errors import InputError
from hpcguard.store.view import open_rows

TRAINING_COLUMNS = ("image_id", "segments", "num_segments", "label", "target", "coefficients", "standard_error")


class AttributionDataset(Dataset[dict[str, Tensor]]):
    """A torch Dataset over the rows of a store that belong to `images`, held in memory.

    Items: image float32 [C, H, W], label int64, segments int64 [H, W], flagged bool [S] (see `flagged`).
    Raises InputError if an image has no row.
    """

    def __init__(self, store: Path, images: ImageSet, columns: Sequence[str] = TRAINING_COLUMNS) -> None:
        self.images = images
        rows = open_rows(store, columns)
        order = np.argsort(rows["image_id"])
        found = np.searchsorted(rows["image_id"], images.ids, sorter=order)
        positions = order[np.minimum(found, len(order) - 1)]
        absent = images.ids[rows["image_id"][positions] != images.ids]
        if len(absent):
            raise InputError(
                f"{store}: no row for {len(absent)} of {len(images)} images (first id {absent[0]}); "
                "attribute and train with the same data section"
            )
        self.rows = {name: values[positions] for name, values in rows.items()}
        self.flagged = np.zeros((len(images), self.rows["coefficients"].shape[2]), bool)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.batch(np.array([index])).items()}

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Several items at once, stacked along the first axis."""
        ids = self.images.ids[indices]
        return {
            "image": torch.from_numpy(self.images.images(ids)),
            "label": torch.from_numpy(self.images.labels_of(ids)),
            "segments": torch.from_numpy(self.rows["segments"][indices].astype(np.int64)),
            "flagged": torch.from_numpy(self.flagged[indices]),
        }
