"""Image sets: digits, Fashion-MNIST, CIFAR and image folders, whole, damaged and missing."""

import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from real_data import CIFAR10, needs_cifar10
from sklearn.datasets import load_digits

from hpcguard.config import DataConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.data.fashion_mnist import DEBIAN
from hpcguard.errors import InputError


def refusal(config: DataConfig, split: str = "train") -> str:
    """The one line with which `split` is refused."""
    with pytest.raises(InputError) as caught:
        load_images(config, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# digits, and what every set does


def test_digits_parts_are_scikit_learns_images() -> None:
    source = load_digits()
    train, test = (load_images(DataConfig(), split) for split in ("train", "test"))
    assert np.array_equal(np.concatenate([train.ids, test.ids]), np.arange(1797))
    assert len(test) == 1797 // 4
    assert train.shape == test.shape == (1, 8, 8)
    assert train.classes == tuple("0123456789")
    for part in (train, test):
        images = part.images(part.ids)
        assert images.dtype == np.float32
        assert np.array_equal(images[:, 0], (source.images[part.ids] / 16).astype(np.float32))
        assert np.array_equal(part.labels, source.target[part.ids])
        assert part.ids.dtype == part.labels.dtype == np.int64


def test_images_and_labels_come_in_the_order_asked_for() -> None:
    test = load_images(DataConfig(), "test")
    ids = [1700, 1400, 1700]
    images = test.images(ids)
    assert np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])
    assert np.array_equal(test.labels_of(ids), load_digits().target[ids])
    assert test.images([]).shape == (0, 1, 8, 8)
    assert test.labels_of([]).shape == (0,)


def test_resized_images_stay_in_range_and_do_not_depend_on_their_batch() -> None:
    train = load_images(DataConfig(size=16), "train")
    images = train.images(train.ids[:40])
    assert images.shape == (40, *train.shape) == (40, 1, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    assert np.array_equal(images[17], train.images(train.ids[17:18])[0])
    original = load_images(DataConfig(), "train").images(train.ids[:40])
    assert np.abs(images.mean((1, 2, 3)) - original.mean((1, 2, 3))).max() < 0.02


@pytest.mark.parametrize("ids", [[0, 1347, 1348], [-1], [10**6]])
def test_unknown_id_is_one_line(ids: list[int]) -> None:
    train = load_images(DataConfig(), "train")
    for read in (train.images, train.labels_of, train.subset):
        with pytest.raises(InputError, match=rf"digits train: no image has id {ids[-1]}; .* 0 to 1347"):
            read(ids)


@pytest.mark.parametrize("ids", [[1.0], [[1]], [True], 3])
def test_ids_of_another_type_are_refused(ids: object) -> None:
    with pytest.raises(InputError, match="list of integers"):
        load_images(DataConfig(), "train").images(ids)


def test_subset_keeps_ids_labels_and_pixels() -> None:
    train = load_images(DataConfig(), "train")
    subset = train.subset([30, 10, 20, 10])
    assert subset.ids.tolist() == [10, 20, 30]
    assert np.array_equal(subset.labels, train.labels_of([10, 20, 30]))
    assert np.array_equal(subset.images([20]), train.images([20]))
    with pytest.raises(InputError, match="no image has id 11"):
        subset.images([11])


def test_digest_tells_sets_apart_and_survives_pickling() -> None:
    train = load_images(DataConfig(), "train")
    assert len(train.digest()) == 64
    assert pickle.loads(pickle.dumps(train)).digest() == load_images(DataConfig(), "train").digest()
    others = [train.subset(train.ids[1:]), load_images(DataConfig(), "test")]
    others.append(load_images(DataConfig(size=16), "train"))
    assert len({train.digest(), *(other.digest() for other in others)}) == 4


# splits


def test_splits_are_disjoint_and_complete() -> None:
    config = DataConfig(validation=0.1)
    train, validation = (load_images(config, split) for split in ("train", "validation"))
    assert len(validation) == round(0.1 * 1348) == 135
    assert (train.split, validation.split) == ("train", "validation")
    assert np.array_equal(np.sort(np.concatenate([train.ids, validation.ids])), np.arange(1348))
    assert (np.diff(train.ids) > 0).all()
    assert (np.diff(validation.ids) > 0).all()


@pytest.mark.parametrize("train_images", [1, 300, 1213])
def test_validation_does_not_depend_on_train_images(train_images: int) -> None:
    config = DataConfig(validation=0.1, train_images=train_images)
    train, validation = (load_images(config, split) for split in ("train", "validation"))
    assert len(train) == train_images
    assert (np.diff(train.ids) > 0).all()
    assert not set(train.ids) & set(validation.ids)
    assert np.array_equal(validation.ids, load_images(DataConfig(validation=0.1), "validation").ids)


def test_draws_are_the_same_on_every_machine_and_follow_the_seed() -> None:
    config = DataConfig(validation=0.005, train_images=5)
    assert load_images(config, "validation").ids.tolist() == PINNED_VALIDATION
    assert load_images(config, "train").ids.tolist() == PINNED_TRAIN
    other = config.model_copy(update={"seed": 1})
    assert load_images(other, "validation").ids.tolist() != PINNED_VALIDATION
    assert load_images(other, "train").ids.tolist() != PINNED_TRAIN
    assert len(load_images(other, "test")) == 449


PINNED_VALIDATION = [12, 586, 654, 683, 1263, 1273, 1279]
PINNED_TRAIN = [117, 147, 363, 403, 633]


def test_smallest_validation_is_one_image() -> None:
    assert len(load_images(DataConfig(validation=1e-6), "validation")) == 1


def test_impossible_splits_are_one_line() -> None:
    assert refusal(DataConfig(), "validation").startswith("data.validation = 0")
    line = refusal(DataConfig(train_images=1349))
    assert "data.train_images = 1349" in line
    assert "1348" in line
    assert "1213" in refusal(DataConfig(train_images=1214, validation=0.1))
    assert "data.validation = 0.9999" in refusal(DataConfig(validation=0.9999))


# Fashion-MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Four small files in Fashion-MNIST's format: 12 training and 5 test images."""
    random = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        images = random.integers(0, 256, (count, 28, 28), np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(count, dtype=np.uint8) % 10)):
            (tmp_path / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def test_fashion_mnist_is_read_from_idx_files(fashion: Path) -> None:
    config = DataConfig(name="fashion-mnist", root=fashion)
    train, test = (load_images(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 5)
    assert train.shape == (1, 28, 28)
    assert train.labels.tolist() == [*range(10), 0, 1]
    assert train.classes[9] == "Ankle boot"
    expected = np.random.default_rng(0).integers(0, 256, (12, 28, 28), np.uint8)
    assert np.array_equal(train.images([3])[0, 0], expected[3].astype(np.float32) / np.float32(255))
    assert test.ids.tolist() == [0, 1, 2, 3, 4]
    assert load_images(config.model_copy(update={"size": 16}), "test").images([0]).shape == (1, 1, 16, 16)


LABELS = "train-labels-idx1-ubyte.gz"
IMAGES = "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (IMAGES, lambda whole: whole[: len(whole) // 2], "damaged gzip"),
        (IMAGES, lambda whole: whole[:200] + bytes([whole[200] ^ 255]) + whole[201:], "damaged gzip"),
        (IMAGES, lambda whole: b"not gzip", "damaged gzip"),
        (IMAGES, lambda whole: b"", "starts with nothing"),
        (IMAGES, lambda whole: gzip.compress(idx(np.zeros(12, np.uint8))), "starts with 00000801"),
        (IMAGES, lambda whole: gzip.compress(gzip.decompress(whole)[:-1]), "9423 bytes unpacked"),
        (IMAGES, lambda whole: gzip.compress(gzip.decompress(whole) + b"x"), "its header promises 9424"),
        (IMAGES, lambda whole: gzip.compress(gzip.decompress(whole)[:9]), "header promises"),
        (IMAGES, lambda whole: gzip.compress(idx(np.zeros((12, 0, 28), np.uint8))), "no pixels"),
        (LABELS, lambda whole: gzip.compress(idx(np.zeros(11, np.uint8))), "12 images, but .* 11 labels"),
        (LABELS, lambda whole: gzip.compress(idx(np.full(12, 10, np.uint8))), "label 10"),
    ],
)
def test_damaged_idx_files_are_one_line(fashion: Path, name: str, damage: object, says: str) -> None:
    file = fashion / name
    file.write_bytes(damage(file.read_bytes()))
    line = refusal(DataConfig(name="fashion-mnist", root=fashion))
    assert str(file) in line
    assert re.search(says, line), line
    assert "data.root" in line
    assert len(load_images(DataConfig(name="fashion-mnist", root=fashion), "test")) == 5


def test_missing_fashion_mnist_names_the_file_and_the_package(tmp_path: Path) -> None:
    line = refusal(DataConfig(name="fashion-mnist", root=tmp_path), "test")
    assert f"{tmp_path / 't10k-images-idx3-ubyte.gz'} is not there" in line
    assert "dataset-fashion-mnist" in line


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs system package dataset-fashion-mnist")
def test_real_fashion_mnist() -> None:
    train, test = (load_images(DataConfig(name="fashion-mnist"), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (60000, 10000)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert abs(train.images(train.ids).mean() - 0.2860) < 1e-3


# CIFAR


@pytest.mark.parametrize(
    ("name", "folder", "first"),
    [("cifar10", "cifar-10-batches-py", "data_batch_1"), ("cifar100", "cifar-100-python", "train")],
)
def test_missing_and_damaged_cifar(tmp_path: Path, name: str, folder: str, first: str) -> None:
    assert refusal(DataConfig(name=name)).startswith("data.root must be set")
    config = DataConfig(name=name, root=tmp_path)
    line = refusal(config)
    assert f"no folder {tmp_path / folder}" in line
    assert "data.root" in line
    (tmp_path / folder).mkdir()
    assert f"no file {tmp_path / folder / first}" in refusal(config)
    (tmp_path / folder / first).write_bytes(b"garbage")
    assert f"{tmp_path / folder / first}: damaged" in refusal(config, "test")


@needs_cifar10
@pytest.mark.filterwarnings("error")
def test_real_cifar10() -> None:
    config = DataConfig(name="cifar10", root=CIFAR10)
    test = load_images(config, "test")
    assert len(test) == 10000
    assert test.shape == (3, 32, 32)
    assert test.classes[3] == "cat"
    assert [test.classes[label] for label in test.labels_of([0, 1, 3])] == ["cat", "ship", "airplane"]
    assert np.bincount(test.labels).tolist() == [1000] * 10
    channel_means = test.images(test.ids[:5000]).mean((0, 2, 3))
    assert np.abs(channel_means - [0.494, 0.485, 0.450]).max() < 0.01
    validation = load_images(config.model_copy(update={"validation": 0.1}), "validation")
    assert len(validation) == 5000


# image folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; train has 3 images of each, test 1; wide red cats, tall blue dogs, numbered in green."""
    for part, count in (("train", 3), ("test", 1)):
        for name, size, colour in (("cat", (40, 20), (255, 0, 0)), ("dog", (20, 30), (0, 0, 255))):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", size, (colour[0], number * 10, colour[2])).save(place / f"{number}.png")
    return tmp_path


def load_folder(folder: Path, split: str = "train", size: int | None = 16) -> ImageSet:
    return load_images(DataConfig(name="image-folder", root=folder, size=size), split)


def test_image_folder_is_listed_in_order_and_decoded(folder: Path) -> None:
    train, test = load_folder(folder), load_folder(folder, "test")
    assert train.classes == ("cat", "dog")
    assert train.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels_of([1, 0]).tolist() == [1, 0]
    images = train.images([5, 0])
    assert images.shape == (2, *train.shape) == (2, 3, 16, 16)
    assert images.dtype == np.float32
    for image, colour in zip(images, ([0, 20 / 255, 1], [1, 0, 0]), strict=True):
        assert (image == np.float32(colour)[:, None, None]).all()


def test_image_folder_takes_the_centre_of_the_shorter_side(folder: Path) -> None:
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, 10:30] = 255
    Image.fromarray(pixels).save(folder / "train/cat/0.png")
    assert load_folder(folder, size=20).images([0]).min() == 1
    assert load_folder(folder, size=10).images([0])[0, :, :, 1:-1].min() == 1


def test_images_are_read_only_when_asked_for_and_damage_names_the_file(folder: Path) -> None:
    broken = folder / "train/dog/1.png"
    whole = broken.read_bytes()
    train = load_folder(folder)
    for content in (whole[:60], b"garbage", b"", whole.replace(b"IDAT", b"IDAX")):
        broken.write_bytes(content)
        assert train.images([0, 5]).shape == (2, 3, 16, 16)
        with pytest.raises(InputError, match=re.escape(str(broken))) as caught:
            train.images([3, 4])
        assert "\n" not in str(caught.value)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(broken))):  # the disk, not the picture
        train.images([4])
    with pytest.raises(InputError, match=re.escape(str(broken))):
        train.digest()


def test_sixteen_bit_images_are_refused_rather_than_clipped(folder: Path) -> None:
    Image.fromarray(np.full((20, 20), 5000, np.uint16)).save(folder / "train/cat/0.png")
    with pytest.raises(InputError, match="8 bits"):
        load_folder(folder).images([0])


def test_folder_digest_sees_names_sizes_and_labels(folder: Path) -> None:
    first = load_folder(folder).digest()
    assert load_folder(folder).digest() == first
    (folder / "train/cat/0.png").rename(folder / "train/cat/00.png")
    renamed = load_folder(folder).digest()
    Image.new("RGB", (41, 23)).save(folder / "train/cat/00.png")
    assert len({first, renamed, load_folder(folder).digest(), load_folder(folder, size=8).digest()}) == 4


def test_wrong_folders_are_one_line(folder: Path, tmp_path: Path) -> None:
    assert "data.root" in refusal(DataConfig(name="image-folder", size=16))
    assert "data.size" in refusal(DataConfig(name="image-folder", root=folder))
    config = DataConfig(name="image-folder", root=folder, size=16)
    (folder / "test/dog").rename(folder / "test/wolf")
    assert "different class folders (dog, wolf)" in refusal(config)
    (folder / "train/dog").rename(folder / "train/wolf")
    assert len(load_images(config, "train")) == 6
    for file in (folder / "train/wolf").iterdir():
        file.unlink()
    assert "wolf" in refusal(config)
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    line = refusal(DataConfig(name="image-folder", root=empty, size=16))
    assert f"{empty / 'train'}: holds no class folders" in line
    line = refusal(DataConfig(name="image-folder", root=tmp_path / "nowhere", size=16))
    assert str(tmp_path / "nowhere/train") in line
    assert "data.root" in line
