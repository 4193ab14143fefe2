"""Handwritten digits, 8x8, that come with scikit-learn (from UCI's optdigits, Alpaydin and Kaynak 1998)."""

import numpy as np
from sklearn.datasets import load_digits

from hpcguard.config import DataConfig
from hpcguard.data.image_set import ArrayPixels, ImageSet


def read_digits(config: DataConfig, test: bool) -> ImageSet:
    """1797 images of 10 digits; ids are scikit-learn's indices.

    The test part is the last quarter, written by others than the rest. A random quarter would be too easy: a
    support vector machine scores 0.99 on it, and 0.95 on this one.
    """
    digits = load_digits()
    count = len(digits.target)
    first_test = count - count // 4
    ids = np.arange(first_test, count) if test else np.arange(first_test)
    pixels = ArrayPixels(digits.images.astype(np.uint8)[:, None], white=16, size=config.size)
    return ImageSet(
        name="digits",
        split="test" if test else "train",
        classes=tuple(str(digit) for digit in range(10)),
        ids=ids.astype(np.int64),
        labels=digits.target[ids].astype(np.int64),
        shape=pixels.shape,
        pixels=pixels,
    )
