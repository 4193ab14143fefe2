"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) through torchvision, which checks every MD5 before it reads."""

import warnings
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from hpcguard.config import DataConfig
from hpcguard.data.image_set import ArrayPixels, ImageSet
from hpcguard.errors import InputError


def read_cifar(config: DataConfig, test: bool) -> ImageSet:
    """32x32 colour images of 10 or 100 classes. Raises InputError naming what is missing or damaged."""
    kind = CIFAR10 if config.name == "cifar10" else CIFAR100
    if config.root is None:
        raise InputError(f"data.root must be set for {config.name}, to the folder of {kind.base_folder}/")
    root = config.root.expanduser()
    try:
        with warnings.catch_warnings():
            # NumPy 2.4 objects to how these old pickles write a dtype; nothing can be done about it here.
            warnings.filterwarnings("ignore", r"dtype\(\): align", np.exceptions.VisibleDeprecationWarning)
            data = kind(root, train=not test, download=False)
    except (RuntimeError, OSError) as error:
        raise InputError(_explain(kind, root) or f"data.root = {root}: cannot be read ({error})") from error
    pixels = ArrayPixels(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), white=255, size=config.size)
    return ImageSet(
        name=config.name,
        split="test" if test else "train",
        classes=tuple(data.classes),
        ids=np.arange(len(data.targets), dtype=np.int64),
        labels=np.array(data.targets, np.int64),
        shape=pixels.shape,
        pixels=pixels,
    )


def _explain(kind: type[CIFAR10], root: Path) -> str:
    """What is wrong with the folder, or '' if every file is intact."""
    folder = root / kind.base_folder
    remedy = f"set data.root to the folder that holds {kind.base_folder}/, unpacked from {kind.url}"
    if not folder.is_dir():
        return f"data.root = {root}: no folder {folder}; {remedy}"
    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    for name, md5 in files:
        if not (folder / name).is_file():
            return f"data.root = {root}: no file {folder / name}; {remedy}"
        try:
            intact = check_integrity(folder / name, md5)
        except OSError as error:
            return f"{folder / name}: cannot be read ({error.strerror})"
        if not intact:
            return f"{folder / name}: damaged, its MD5 is not {md5}; {remedy}"
    return ""
