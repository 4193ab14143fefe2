"""Corrupted test images by corruption, severity and id: out of CIFAR-10-C's .npy files, or made by hpcguard-c."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from hpcguard.config.corruptions import SEVERITIES, Corruption, CorruptionsConfig
from hpcguard.data.corruptions import NAME, VERSION, corrupt
from hpcguard.data.image_set import ArrayPixels, ImageSet
from hpcguard.errors import InputError
from hpcguard.runs import digest_json

KEY = "evaluation.corruptions.folder"


class Corrupted(Protocol):
    @property
    def name(self) -> str:
        """What results call it."""

    def images(self, corruption: Corruption, severity: int, ids: np.ndarray) -> np.ndarray:
        """float32 [n, C, H, W] in [0, 1], in the order of `ids`."""

    def digest(self, ids: np.ndarray) -> str:
        """SHA-256 of what the images of `ids` depend on."""


@dataclass(frozen=True)
class GeneratedCorruptions:
    """hpcguard-c of a test set."""

    test: ImageSet
    seed: int
    name: str = f"{NAME} {VERSION}"

    def images(self, corruption: Corruption, severity: int, ids: np.ndarray) -> np.ndarray:
        return corrupt(self.test.images(ids), ids, corruption, severity, self.seed)

    def digest(self, ids: np.ndarray) -> str:
        return digest_json([self.name, self.seed, self.test.subset(ids).digest()])


@dataclass(frozen=True)
class StoredCorruptions:
    """Files of five severities of `count` images each, one after the other, by memory map."""

    name: str
    files: dict[Corruption, ArrayPixels]
    count: int

    def images(self, corruption: Corruption, severity: int, ids: np.ndarray) -> np.ndarray:
        return self.files[corruption].read(SEVERITIES.index(severity) * self.count + ids)

    def digest(self, ids: np.ndarray) -> str:
        rows = np.concatenate([place * self.count + ids for place in range(len(SEVERITIES))])
        return digest_json({name: file.digest(rows) for name, file in self.files.items()})


def open_corruptions(config: CorruptionsConfig, test: ImageSet, size: int | None = None) -> Corrupted:
    """The corrupted images of a test set whose ids are places in the original test part; size: data.size.

    Raises InputError for a file that is missing or damaged, or is not of these images.
    """
    if config.folder is None:
        return GeneratedCorruptions(test, config.seed)
    folder = config.folder.expanduser()
    count = _check_labels(folder, test)
    files = {name: _open(folder / f"{name}.npy", count, test, size) for name in config.names}
    return StoredCorruptions(folder.resolve().name, files, count)


def _check_labels(folder: Path, test: ImageSet) -> int:
    """Images of one severity, once the labels of every severity are those of the test set."""
    path = folder / "labels.npy"
    labels = _map(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or len(labels) % len(SEVERITIES):
        raise InputError(
            f"{path}: expected whole numbers [5 x test images], found {labels.dtype} {list(labels.shape)}; set {KEY} "
            "to CIFAR-10-C or CIFAR-100-C as published, or to null"
        )
    by_severity = labels.reshape(len(SEVERITIES), -1)
    count = by_severity.shape[1]
    if len(test) and test.ids[-1] >= count:
        raise InputError(f"{path}: {count} images a severity, but there is a test image {test.ids[-1]}; {_swap()}")
    differs = (by_severity[:, test.ids] != test.labels).any(0)
    if differs.any():
        first = int(test.ids[differs.argmax()])
        raise InputError(
            f"{path}: labels of {int(differs.sum())} of {len(test)} images are not those of {test.name}'s test images, "
            f"first that of image {first}: {by_severity[:, first].tolist()}, expected "
            f"{int(test.labels[differs.argmax()])}; {_swap()}"
        )
    return count


def _open(path: Path, count: int, test: ImageSet, size: int | None) -> ArrayPixels:
    array = _map(path)
    channels, height, width = test.shape
    expected = [len(SEVERITIES) * count, *(array.shape[1:3] if size else (height, width)), channels]
    if array.dtype != np.uint8 or list(array.shape) != expected:
        raise InputError(f"{path}: expected uint8 {expected}, found {array.dtype} {list(array.shape)}; {_swap()}")
    return ArrayPixels(array.transpose(0, 3, 1, 2), white=255, size=size)


def _map(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; set {KEY} to the folder of all .npy files, or to null") from None
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read ({reason}); unpack it again") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: an archive of several arrays, expected one; unpack it")
    return array


def _swap() -> str:
    return f"set {KEY} to the folder that belongs to data.name, or to null"
