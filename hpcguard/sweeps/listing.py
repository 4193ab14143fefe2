"""Which images lie in an image folder, found without the seconds that importing torchvision takes."""

import os
from pathlib import Path

from hpcguard.errors import InputError
from hpcguard.runs import digest_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's IMG_EXTENSIONS


def listing_digest(root: Path | None) -> str:
    """SHA-256 over relative names and sizes in bytes of the images in ROOT/train and ROOT/test."""
    if root is None:
        raise InputError("data.root must be set for image-folder: the folder with train/ and test/ in it")
    root = root.expanduser()
    found = [entry for part in ("train", "test") for entry in images_in(root / part)]
    return digest_json(sorted(found))


def images_in(part: Path) -> list[tuple[str, int]]:
    """Name, from the folder above, and size in bytes of each, in no order."""
    if not part.is_dir():
        raise InputError(f"{part}: no such folder; image-folder reads ROOT/train/CLASS/* and ROOT/test/CLASS/*")
    found: list[tuple[str, int]] = []
    folders = [str(part)]
    while folders:  # plain strings: a Path for each of a million files would take longer than the disk
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif entry.name.lower().endswith(SUFFIXES):
                        found.append((entry.path.removeprefix(f"{part.parent}/"), entry.stat().st_size))
        except OSError as error:
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    return found
