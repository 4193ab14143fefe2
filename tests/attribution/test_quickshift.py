"""quickshift_batch against scikit-image's quickshift, image by image, on pictures, noise and images full of ties."""

import math
import random

import numpy as np
import pytest
import torch
from skimage import data, segmentation, transform
from torch import Tensor

from hpcguard.attribution import quickshift
from hpcguard.attribution.quickshift import quickshift_batch

Settings = tuple[float, float, float]  # kernel_size, max_dist, ratio

PICTURES = ("astronaut", "coffee", "chelsea")  # all inside scikit-image's wheel
SETTINGS = ((4, 200, 0.2), (1, 10, 0.2), (2, 6, 1.0), (1.5, 2.5, 0.5))  # the first is lime's, the second ours
TIES = ("constant", "black", "ramp", "grey ramp", "dark ramp", "checkers", "stripes", "mirrored")


def photograph(name: str, height: int, width: int, crop: int = 256, corner: int = 20) -> np.ndarray:
    """A square of a picture, resized: float64 [H, W, 3]."""
    pixels = getattr(data, name)()[corner : corner + crop, corner : corner + crop]
    return transform.resize(pixels, (height, width), anti_aliasing=crop > height)


def patterned(name: str, height: int, width: int) -> np.ndarray:
    """An image with many equal pixels or equal distances: float64 [H, W, 3]."""
    rows, columns = np.mgrid[:height, :width]
    slope = (rows / height + columns / width) / 2
    noise = np.random.default_rng(3).random((height, (width + 1) // 2, 3))
    return {
        "constant": np.full((height, width, 3), 0.37),
        "black": np.zeros((height, width, 3)),
        "ramp": np.stack([rows / height, columns / width, 1 - slope], -1),
        "grey ramp": np.repeat(slope[..., None], 3, -1),
        "dark ramp": np.repeat(0.02 * slope[..., None], 3, -1),
        "checkers": np.repeat(((rows // 4 + columns // 4) % 2 * 1.0)[..., None], 3, -1),
        "stripes": np.stack([columns // 5 % 2 * 0.8, rows // 3 % 2 * 0.5, 0.0 * slope], -1),
        "mirrored": np.concatenate([noise, noise[:, ::-1]], 1)[:, :width],
    }[name]


def as_batch(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())


def reference(image: np.ndarray, settings: Settings, sigma: float = 0.0, seed: int = 42) -> np.ndarray:
    kernel_size, max_dist, ratio = settings
    return segmentation.quickshift(
        image, kernel_size=kernel_size, max_dist=max_dist, ratio=ratio, sigma=sigma, rng=seed
    )


def assert_same(images: list[np.ndarray], settings: Settings, sigma: float = 0.0, seed: int = 42) -> None:
    ours = quickshift_batch(as_batch(*images), *settings, sigma=sigma, seed=seed)
    assert ours.dtype == torch.int64
    for labels, image in zip(ours.numpy(), images, strict=True):
        np.testing.assert_array_equal(labels, reference(image, settings, sigma, seed))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (40, 25)])
def test_pictures(size: tuple[int, int], settings: Settings) -> None:
    assert_same([photograph(name, *size, corner=corner) for name in PICTURES for corner in (0, 40)], settings)


@pytest.mark.parametrize("settings", SETTINGS)
def test_larger_pictures(settings: Settings) -> None:
    assert_same([photograph("astronaut", 96, 96), photograph("coffee", 96, 96, crop=96)], settings)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(24, 24), (9, 33)])
def test_noise(size: tuple[int, int], settings: Settings) -> None:
    assert_same(list(np.random.default_rng(0).random((4, *size, 3))), settings)


@pytest.mark.parametrize("max_dist", [1, math.sqrt(2), 2, 200])  # on a flat image these lie exactly on distances
@pytest.mark.parametrize("kernel_size", [1, 2])
def test_ties(kernel_size: float, max_dist: float) -> None:
    assert_same([patterned(name, 28, 22) for name in TIES], (kernel_size, max_dist, 0.2))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 3)])
def test_images_smaller_than_the_window(size: tuple[int, int]) -> None:
    assert_same(list(np.random.default_rng(1).random((3, *size, 3))), (4, 200, 0.2))


def test_sigma_and_seed() -> None:
    images = [photograph("chelsea", 30, 24), patterned("constant", 30, 24)]
    assert_same(images, (1, 10, 0.2), sigma=0.8)
    assert_same(images, (1, 10, 0.2), seed=7)


@pytest.mark.parametrize("max_dist", [-1, 0, 1e200, math.inf])
def test_extreme_max_dist(max_dist: float) -> None:
    assert_same([photograph("coffee", 12, 12), patterned("black", 12, 12)], (1, max_dist, 0.2))


def test_squared_cut_is_the_last_square_with_that_root() -> None:
    for root in [0.0, 1e-160, 2.0, 10.0, 1e160, *random.Random(0).choices(np.linspace(0, 300, 9999), k=500)]:
        cut = quickshift._squared_cut(root)
        assert math.sqrt(cut) <= root < math.sqrt(math.nextafter(cut, math.inf))


def test_parents_and_distances_are_scikit_images() -> None:
    """The whole tree, not only the labels: the squared distances agree to the last bit."""
    images = [photograph("astronaut", 32, 28), patterned("grey ramp", 32, 28)]
    planes = quickshift._scaled_lab(as_batch(*images), 0.2, 0.0)
    shifts = list(quickshift._window(32, 28, 6))
    noise = np.random.default_rng(42).normal(scale=1e-5, size=(32, 28))
    density = quickshift._densities(planes, shifts, 2) + torch.from_numpy(noise)
    parents, squares = quickshift._parents(planes, density, shifts)
    for parent, square, image in zip(parents.numpy(), squares.numpy(), images, strict=True):
        _, expected, distance = segmentation.quickshift(image, ratio=0.2, kernel_size=2, return_tree=True, rng=42)
        np.testing.assert_array_equal(parent, np.asarray(expected))
        found = np.isfinite(square)
        np.testing.assert_array_equal(np.sqrt(square[found]), np.asarray(distance)[found])
        for cut, root in zip(square[found], np.asarray(distance)[found], strict=True):
            assert quickshift._squared_cut(np.nextafter(root, 0)) < cut <= quickshift._squared_cut(root)


def test_max_dist_at_a_distance_of_the_tree() -> None:
    image = photograph("astronaut", 12, 12)
    distances = np.asarray(segmentation.quickshift(image, ratio=0.2, kernel_size=1, return_tree=True, rng=42)[2])
    for distance in np.sort(distances, axis=None)[5:100:12]:
        for max_dist in (distance, np.nextafter(distance, 0)):
            assert_same([image], (1, max_dist, 0.2))


def test_grey_is_one_channel_repeated() -> None:
    camera = photograph("camera", 32, 32)[..., None]
    labels = quickshift_batch(as_batch(camera), 1, 10, 0.2)[0].numpy()
    np.testing.assert_array_equal(labels, reference(np.repeat(camera, 3, -1), (1, 10, 0.2)))


def test_float32_and_strided_input_equal_their_float64_copy() -> None:
    single = as_batch(photograph("coffee", 32, 32), photograph("chelsea", 32, 32)).float()
    labels = quickshift_batch(single.to(memory_format=torch.channels_last).requires_grad_(), 1, 10, 0.2)
    assert not labels.requires_grad
    for row, image in zip(labels.numpy(), single.double().numpy().transpose(0, 2, 3, 1), strict=True):
        np.testing.assert_array_equal(row, reference(image, (1, 10, 0.2)))


@pytest.mark.parametrize("settings", SETTINGS[:2])
def test_a_batch_equals_its_images_one_by_one(settings: Settings) -> None:
    images = as_batch(*(photograph(name, 24, 24, corner=corner) for name in PICTURES for corner in (0, 10, 30)))
    alone = torch.cat([quickshift_batch(images[i : i + 1], *settings) for i in range(len(images))])
    assert torch.equal(quickshift_batch(images, *settings), alone)


def test_labels_are_dense() -> None:
    labels = quickshift_batch(as_batch(photograph("astronaut", 32, 32)), 1, 10, 0.2)
    assert torch.equal(labels.unique(), torch.arange(int(labels.max()) + 1))
    assert labels.max() > 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("settings", SETTINGS)
def test_on_a_gpu(settings: Settings) -> None:
    images = [*(photograph(name, 32, 32) for name in PICTURES), *(patterned(name, 32, 32) for name in TIES)]
    labels = quickshift_batch(as_batch(*images).cuda(), *settings)
    assert labels.is_cuda
    for row, image in zip(labels.cpu().numpy(), images, strict=True):
        np.testing.assert_array_equal(row, reference(image, settings))


@pytest.mark.parametrize(
    ("images", "kernel_size", "message"),
    [
        (torch.rand(3, 8, 8), 1, "images must be"),
        (torch.rand(1, 2, 8, 8), 1, "images must be"),
        (torch.rand(0, 3, 8, 8), 1, "not empty"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 1, "float32 or float64"),
        (torch.rand(1, 3, 8, 8), 0.5, "kernel_size"),
        (torch.rand(1, 3, 8, 8), math.nan, "kernel_size"),
    ],
)
def test_bad_input(images: Tensor, kernel_size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quickshift_batch(images, kernel_size, 10, 0.2)
