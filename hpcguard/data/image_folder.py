"""Your own images: ROOT/train/CLASS/* and ROOT/test/CLASS/*, decoded when they are read."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from hpcguard.config import DataConfig
from hpcguard.data.image_set import ImageSet
from hpcguard.errors import InputError
from hpcguard.runs import digest_json

LAYOUT = "image-folder reads ROOT/train/CLASS/* and ROOT/test/CLASS/*; set data.root to ROOT"


def read_image_folder(config: DataConfig, test: bool) -> ImageSet:
    """RGB images, the shorter side resized to `config.size`, centre-cropped to a square.

    Ids count torchvision.datasets.ImageFolder's sorted listing of the part. Raises InputError for a folder of
    another layout, for an empty class, and for classes that differ between train and test.
    """
    if config.root is None:
        raise InputError(f"data.root must be set for image-folder. {LAYOUT}")
    if config.size is None:
        raise InputError("data.size must be set for image-folder: the side of the squares, for example 64")
    root = config.root.expanduser()
    train, other = (_class_names(root / part) for part in ("train", "test"))
    if train != other:
        differing = sorted(set(train) ^ set(other))
        shown = ", ".join(differing[:5]) + (f" and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise InputError(f"data.root = {root}: train/ and test/ have different class folders ({shown})")
    part = root / ("test" if test else "train")
    try:
        listing = ImageFolder(part)
    except OSError as error:
        raise InputError(f"{part}: {error}. {LAYOUT}") from error
    files = tuple(path.removeprefix(f"{part}/") for path, _ in listing.samples)
    return ImageSet(
        name="image-folder",
        split="test" if test else "train",
        classes=tuple(listing.classes),
        ids=np.arange(len(files), dtype=np.int64),
        labels=np.array(listing.targets, np.int64),
        shape=(3, config.size, config.size),
        pixels=FilePixels(part, files, config.size),
    )


@dataclass(frozen=True)
class FilePixels:
    """Pixels in image files, id = index in `files`."""

    folder: Path
    files: tuple[str, ...]
    size: int

    def read(self, ids: np.ndarray) -> np.ndarray:
        return np.stack([_decode(self.folder / self.files[index], self.size) for index in ids])

    def digest(self, ids: np.ndarray) -> str:
        """Over relative names and sizes in bytes: reading every file at every start is too slow."""
        names = [self.files[index] for index in ids.tolist()]
        return digest_json([[name, _bytes(f"{self.folder}/{name}")] for name in names])


def _decode(path: Path, size: int) -> np.ndarray:
    """float32 [3, size, size] in [0, 1]."""
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith(("I", "F"))
            fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except MemoryError:
        raise
    except Exception as error:  # on damaged files Pillow raises anything from SyntaxError to struct.error
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the picture
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be decoded as an image ({reason}); replace or remove it") from error
    if deep:  # Pillow would clip every value above 255 to white
        raise InputError(f"{path}: more than 8 bits a channel; convert it to an 8-bit image")
    return np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(255)


def _class_names(part: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in part.iterdir() if entry.is_dir())
    except OSError as error:
        raise InputError(f"{part}: cannot be listed ({error.strerror}). {LAYOUT}") from error
    if not names:
        raise InputError(f"{part}: holds no class folders. {LAYOUT}")
    return names


def _bytes(path: str) -> int:
    """Of a file; no Path is made of its name, which would cost more than the look."""
    try:
        return os.stat(path).st_size  # noqa: PTH116
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
