"""Fashion-MNIST (Xiao et al. 2017) from its four idx files, as in Debian's dataset-fashion-mnist."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from hpcguard.config import DataConfig
from hpcguard.data.image_set import ArrayPixels, ImageSet
from hpcguard.errors import InputError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
REMEDY = (
    "install Debian's dataset-fashion-mnist, or set data.root to a folder with intact "
    "train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz, "
    "t10k-labels-idx1-ubyte.gz"
)


def read_fashion_mnist(config: DataConfig, test: bool) -> ImageSet:
    """28x28 images of 10 kinds of clothing. Raises InputError naming the file that is missing or damaged."""
    root = (config.root or DEBIAN).expanduser()
    prefix = "t10k" if test else "train"
    images_path = root / f"{prefix}-images-idx3-ubyte.gz"
    labels_path = root / f"{prefix}-labels-idx1-ubyte.gz"
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        counts = f"{len(images)} images, but {labels_path} has {len(labels)} labels"
        raise InputError(f"{images_path} has {counts}; {REMEDY}")
    if images.size == 0:
        raise InputError(f"{images_path}: holds no pixels, its shape is {list(images.shape)}; {REMEDY}")
    if labels.max() >= len(CLASSES):
        raise InputError(f"{labels_path}: label {labels.max()} found, Fashion-MNIST has 0 to 9; {REMEDY}")
    pixels = ArrayPixels(images[:, None], white=255, size=config.size)
    return ImageSet(
        name="fashion-mnist",
        split="test" if test else "train",
        classes=CLASSES,
        ids=np.arange(len(labels), dtype=np.int64),
        labels=labels.astype(np.int64),
        shape=pixels.shape,
        pixels=pixels,
    )


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A gzipped idx file of unsigned bytes (yann.lecun.com's format) as uint8 with `dimensions` axes.

    Raises InputError naming the file if it is missing, truncated, damaged or of another kind.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise InputError(f"data.root: {path} is not there; {REMEDY}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}); {REMEDY}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if content[:4] != magic:
        found = content[:4].hex() or "nothing"
        raise InputError(f"{path}: starts with {found} where its idx format has {magic.hex()}; {REMEDY}")
    start = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    if len(content) != start + math.prod(shape):
        expected = start + math.prod(shape)
        raise InputError(f"{path}: {len(content)} bytes unpacked, its header promises {expected}; {REMEDY}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
