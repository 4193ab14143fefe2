"""Foreground masks that a user gives beside a data set."""

from pathlib import Path

import numpy as np

from hpcguard.errors import InputError

KEY = "spurious.foreground"


def open_foreground(path: Path, ids: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Masks [images, H, W] by image id, memory-mapped, nonzero in the foreground.

    Raises InputError unless the file is a .npy array of bool or uint8 with a mask of `size` for each of `ids`.
    """
    if not path.is_file():
        raise InputError(f"{KEY} = {path}: no such file; save masks [images, H, W] with numpy.save")
    try:
        masks = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{KEY} = {path}: cannot be read as a .npy file ({reason}); save it anew") from error
    if not isinstance(masks, np.ndarray) or masks.dtype not in (np.bool_, np.uint8) or masks.ndim != 3:
        found = f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, np.ndarray) else "an .npz archive"
        raise InputError(f"{KEY} = {path}: holds {found}; bool or uint8 [images, H, W] is allowed")
    if masks.shape[1:] != size:
        raise InputError(f"{KEY} = {path}: masks of {_by(masks.shape[1:])}, the images have {_by(size)}; resize them")
    if len(ids) and int(np.max(ids)) >= len(masks):
        raise InputError(
            f"{KEY} = {path}: {len(masks)} masks, none for image {int(np.max(ids))}; "
            "write one for each image of the original training part"
        )
    return masks


def _by(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
