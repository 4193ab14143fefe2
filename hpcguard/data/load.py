"""load_images: a data set by name, and its train, validation and test splits."""

from dataclasses import replace
from typing import Literal

import numpy as np

from hpcguard.config import DataConfig
from hpcguard.data.image_set import ImageSet
from hpcguard.errors import InputError


def load_images(config: DataConfig, split: Literal["train", "validation", "test"]) -> ImageSet:
    """One split of the data set that `config` names.

    The validation split is drawn from the original training part, then `train_images` from what remains; both
    draws depend only on their seed and share. Raises InputError for a missing or damaged data set.
    """
    if split == "validation" and config.validation == 0:
        raise InputError("data.validation = 0 leaves no validation split; set it to a share such as 0.1")
    part = _read_part(config, test=split == "test")
    if split == "test":
        return part
    validation, rest = _hold_out(part.ids, config)
    if split == "validation":
        return replace(part.subset(validation), split="validation")
    return part.subset(_limit(rest, config))


def _read_part(config: DataConfig, test: bool) -> ImageSet:
    # Imported here: torchvision and scikit-learn take seconds, and every worker process would wait for both.
    match config.name:
        case "digits":
            from hpcguard.data.digits import read_digits

            return read_digits(config, test)
        case "fashion-mnist":
            from hpcguard.data.fashion_mnist import read_fashion_mnist

            return read_fashion_mnist(config, test)
        case "cifar10" | "cifar100":
            from hpcguard.data.cifar import read_cifar

            return read_cifar(config, test)
        case "image-folder":
            from hpcguard.data.image_folder import read_image_folder

            return read_image_folder(config, test)


def _hold_out(ids: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """(validation ids, remaining ids)."""
    if config.validation == 0:
        return ids[:0], ids
    count = max(1, round(config.validation * len(ids)))
    if count >= len(ids):
        raise InputError(f"data.validation = {config.validation} leaves no training image of {len(ids)}; set less")
    shuffled = np.random.default_rng([config.seed, 0]).permutation(ids)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def _limit(ids: np.ndarray, config: DataConfig) -> np.ndarray:
    """`train_images` of the ids; a smaller number draws a part of what a larger one draws."""
    if config.train_images is None:
        return ids
    if config.train_images > len(ids):
        raise InputError(
            f"data.train_images = {config.train_images}: {config.name} has {len(ids)} training images"
            f"{' beside the validation split' if config.validation else ''}; set at most so many, or null"
        )
    return np.sort(np.random.default_rng([config.seed, 1]).permutation(ids)[: config.train_images])
