"""Corrupted images out of .npy files: the right rows, by memory map; every damage told in one line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpcguard.config.corruptions import CORRUPTIONS, SEVERITIES, CorruptionsConfig
from hpcguard.data import ImageSet
from hpcguard.data.corrupted import open_corruptions
from hpcguard.data.corruptions import corrupt
from hpcguard.data.image_set import ArrayPixels
from hpcguard.errors import InputError

COUNT = 12
NAMES = ("gaussian_noise", "fog")


def image_set(size: int | None = None) -> ImageSet:
    generator = np.random.default_rng(1)
    pixels = ArrayPixels(generator.integers(0, 256, (COUNT, 3, 8, 8), dtype=np.uint8), 255, size)
    labels = generator.integers(0, 10, COUNT)
    return ImageSet("cifar10", "test", tuple("0123456789"), np.arange(COUNT), labels, pixels.shape, pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "CIFAR-10-C"
    path.mkdir()
    for place, name in enumerate(NAMES):
        # Each value says where it stands: file, severity, image.
        values = [[100 * place + 20 * severity + image for image in range(COUNT)] for severity in range(5)]
        array = np.broadcast_to(np.array(values, np.uint8).reshape(-1, 1, 1, 1), (5 * COUNT, 8, 8, 3)).copy()
        array[:, 0, 1, 2] = 255  # row 0, column 1, blue
        np.save(path / f"{name}.npy", array)
    np.save(path / "labels.npy", np.tile(image_set().labels, 5).astype(np.uint8))
    return path


def config(folder: Path | None) -> CorruptionsConfig:
    return CorruptionsConfig(folder=folder, names=NAMES)


def test_rows_are_those_of_severity_and_id(folder: Path) -> None:
    test = image_set().subset([1, 4, 11])
    stored = open_corruptions(config(folder), test)
    assert stored.name == "CIFAR-10-C"
    for place, name in enumerate(NAMES):
        for severity in SEVERITIES:
            images = stored.images(name, severity, np.array([11, 4]))
            assert images.dtype == np.float32 and images.shape == (2, 3, 8, 8)
            expected = np.array([100 * place + 20 * (severity - 1) + image for image in (11, 4)]) / 255
            assert images[:, 0, 5, 5] == pytest.approx(expected) and (images[:, 2, 0, 1] == 1).all()


def test_files_are_mapped_not_read(folder: Path) -> None:
    stored = open_corruptions(config(folder), image_set())
    array = stored.files["fog"].array  # type: ignore[attr-defined]
    assert isinstance(array.base, np.memmap)


def test_images_are_resized_as_the_test_images_are(folder: Path) -> None:
    test = image_set(size=16)
    images = open_corruptions(config(folder), test, size=16).images("fog", 1, np.array([3]))
    assert images.shape == (1, 3, 16, 16) and images[0, 0, 12, 12] == pytest.approx(103 / 255)


def test_a_digest_is_of_the_images_in_use(folder: Path) -> None:
    ids = np.array([1, 4])
    before = open_corruptions(config(folder), image_set()).digest(ids)
    array = np.load(folder / "fog.npy")
    array[2 * COUNT + 5] += 1  # not of these images
    np.save(folder / "fog.npy", array)
    assert open_corruptions(config(folder), image_set()).digest(ids) == before
    array[2 * COUNT + 4] += 1
    np.save(folder / "fog.npy", array)
    assert open_corruptions(config(folder), image_set()).digest(ids) != before


def test_without_a_folder_they_are_made_and_named_so() -> None:
    test = image_set()
    made = open_corruptions(CorruptionsConfig(seed=3), test)
    ids = np.array([7, 2])
    assert np.array_equal(made.images("snow", 4, ids), corrupt(test.images(ids), ids, "snow", 4, 3))
    assert made.name.startswith("hpcguard-c ") and "cifar" not in made.name.lower()
    assert made.digest(ids) != open_corruptions(CorruptionsConfig(seed=4), test).digest(ids)
    assert CorruptionsConfig().names == CORRUPTIONS and len(CORRUPTIONS) == 15


def save(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / name, change(np.load(folder / name)))


def cut(folder: Path) -> None:
    path = folder / "fog.npy"
    path.write_bytes(path.read_bytes()[:-100])


def other_label(labels: np.ndarray) -> np.ndarray:
    labels = labels.copy()
    labels[3 * COUNT + 6] = (labels[3 * COUNT + 6] + 1) % 10
    return labels


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda folder: (folder / "fog.npy").unlink(), "fog.npy: no such file"),
    "no labels": (lambda folder: (folder / "labels.npy").unlink(), "labels.npy: no such file"),
    "cut": (cut, "fog.npy: cannot be read"),
    "empty": (lambda folder: (folder / "fog.npy").write_bytes(b""), "fog.npy: cannot be read"),
    "no numpy": (lambda folder: (folder / "fog.npy").write_bytes(b"hello" * 99), "fog.npy: cannot be read"),
    "a folder": (lambda folder: ((folder / "fog.npy").unlink(), (folder / "fog.npy").mkdir()), "cannot be read"),
    "objects": (lambda folder: np.save(folder / "fog.npy", np.array([{}])), "fog.npy: cannot be read"),
    "floats": (save("fog.npy", lambda a: a / np.float32(255)), "expected uint8 [60, 8, 8, 3], found float32"),
    "channels first": (save("fog.npy", lambda a: a.transpose(0, 3, 1, 2)), "found uint8 [60, 3, 8, 8]"),
    "one severity": (save("fog.npy", lambda a: a[:COUNT]), "found uint8 [12, 8, 8, 3]"),
    "labels of one severity": (
        save("labels.npy", lambda a: a[:10]),
        "2 images a severity, but there is a test image 11",
    ),
    "not five": (save("labels.npy", lambda a: a[:-1]), "expected whole numbers [5 x test images], found uint8 [59]"),
    "float labels": (save("labels.npy", lambda a: a * 1.0), "found float64 [60]"),
    "another order": (
        save("labels.npy", other_label),
        "labels of 1 of 12 images are not those of cifar10's test images",
    ),
    "an archive": (lambda folder: np.savez((folder / "fog.npy").open("wb"), a=np.zeros(3)), "an archive"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_says_what_to_do(folder: Path, damage: str) -> None:
    spoil, said = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(InputError) as caught:
        open_corruptions(config(folder), image_set())
    assert said in str(caught.value) and "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_another_size_is_refused_unless_resized(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected uint8 \[60, 16, 16, 3\]"):
        open_corruptions(config(folder), image_set(size=16))
