"""hpcguard-c: the 15 corruptions of Hendrycks & Dietterich 2019 (arXiv:1903.12261) at 5 severities, made from images.

Strengths are those of the 32x32 benchmark but where a comment says otherwise; lengths in pixels grow with the shorter
side of larger images. Not CIFAR-10-C: other random numbers, own rendering, and synthetic frost; see
docs/corruptions.md.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from hpcguard.config.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from hpcguard.randomness import keyed_generator

NAME, VERSION = "hpcguard-c", 1
Picture = np.ndarray  # float64 [H, W, C] in [0, 1]
Generator = np.random.Generator
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
APART = 1 << 40  # counts between the random numbers of two corruptions of an image; none draws so many


def corrupt(images: np.ndarray, ids: np.ndarray, corruption: Corruption, severity: int, seed: int = 0) -> np.ndarray:
    """Corrupted images, float32 [N, C, H, W] of 1 or 3 channels and in [0, 1], rounded to 8 bits as files hold them.

    An image's corrupted version depends on itself and on (seed, id, corruption, severity) alone.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) != len(ids):
        raise ValueError(f"expected [N, 1 or 3, H, W] and N ids, got {images.shape} and {len(ids)} ids")
    place = len(SEVERITIES) * CORRUPTIONS.index(corruption) + SEVERITIES.index(severity)
    method, strengths = METHODS[corruption]
    out = np.empty(images.shape, np.float32)
    for row, image, image_id in zip(out, images, ids, strict=True):
        # From the second stretch of the noise stream on: its first is the noise of training.
        generator = keyed_generator("noise", seed, int(image_id), (1 + place) * APART)
        changed = method(image.transpose(1, 2, 0).astype(np.float64), strengths[severity - 1], generator)
        row[:] = _to_bytes(changed).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return out


# Noise


def _gaussian_noise(image: Picture, deviation: float, generator: Generator) -> Picture:
    return image + deviation * generator.standard_normal(image.shape)


def _shot_noise(image: Picture, photons: float, generator: Generator) -> Picture:
    return generator.poisson(image * photons) / photons


def _impulse_noise(image: Picture, share: float, generator: Generator) -> Picture:
    """That share of the values becomes 0 or 1."""
    drawn = generator.random(image.shape)
    return np.where(drawn < share, drawn < share / 2, image)


# Blur


def _defocus_blur(image: Picture, strength: tuple[float, float], generator: Generator) -> Picture:
    """A disk of that radius, itself smoothed a little."""
    radius, smoothing = (_unit(image) * each for each in strength)
    reach, margin = math.ceil(radius), math.ceil(_unit(image))
    across = np.arange(-reach - margin, reach + margin + 1)
    disk = (np.hypot(*np.meshgrid(across, across)) <= radius).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), smoothing, mode="constant", radius=margin)
    return ndimage.correlate(image, kernel[..., None], mode="mirror")


def _glass_blur(image: Picture, strength: tuple[float, float], generator: Generator) -> Picture:
    """A share of the pixels, one after the other, is swapped with a neighbour each, between two smoothings."""
    smoothing, share = strength
    height, width, channels = image.shape
    reach = max(1, round(_unit(image)))
    moves = generator.integers(-reach, reach + 1, (height, width, 2)).tolist()
    swapped = np.argwhere(generator.random((height, width)) < share)
    places = list(range(height * width))  # a list, for single numbers are slow to change in an array
    for y, x in swapped[((swapped >= reach) & (swapped < [height - reach, width - reach])).all(1)].tolist():
        down, right = moves[y][x]
        here, there = y * width + x, (y + down) * width + x + right
        places[here], places[there] = places[there], places[here]
    shuffled = _smooth(image, smoothing).reshape(-1, channels)[places].reshape(image.shape)
    return _smooth(shuffled, smoothing)


def _motion_blur(image: Picture, strength: tuple[float, float], generator: Generator) -> Picture:
    return _move(image, *strength, math.radians(generator.uniform(-45, 45)))


def _zoom_blur(image: Picture, largest: float, generator: Generator) -> Picture:
    """Mean of the image and of its magnifications by 1.00, 1.01, ... up to the largest."""
    factors = np.arange(1, largest + 0.005, 0.01)
    return (image + sum(_magnify(image, factor) for factor in factors)) / (len(factors) + 1)


# Weather


def _snow(image: Picture, strength: tuple[float, ...], generator: Generator) -> Picture:
    """Flakes of noise above a threshold, magnified and blurred by their fall, over a whitened image."""
    mean, deviation, size, threshold, length, spread, share = strength
    flakes = mean + deviation * generator.standard_normal((*image.shape[:2], 1))
    flakes = _magnify(flakes, max(1.0, size * _unit(image)))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _move(flakes, length, spread, math.radians(generator.uniform(-135, -45)))
    whitened = np.maximum(image, 1.5 * _grey(image) + 0.5)
    return share * image + (1 - share) * whitened + flakes + flakes[::-1, ::-1]


def _frost(image: Picture, strength: tuple[float, float], generator: Generator) -> Picture:
    """Over the image a synthetic texture, bluish veins of ice: the benchmark's photographs of frost cannot be given."""
    shown, ice = strength
    height, width, channels = image.shape
    veins = 1 - np.abs(2 * _plasma(height, width, 1.8, generator) - 1)  # ridges where the plasma passes its middle
    rime = _plasma(height, width, 1.4, generator)
    tint = np.array([0.9, 0.97, 1.0]) if channels == 3 else np.ones(1)
    return shown * image + ice * (0.65 * veins**2 + 0.35 * rime)[..., None] * tint


def _fog(image: Picture, strength: tuple[float, float], generator: Generator) -> Picture:
    """A cloud of plasma is added, and the brightest value kept where it was."""
    thickness, decay = strength
    brightest = image.max()
    cloud = _plasma(image.shape[0], image.shape[1], decay, generator)[..., None]
    return (image + thickness * cloud) * brightest / (brightest + thickness)


# Digital


def _brightness(image: Picture, more: float, generator: Generator) -> Picture:
    """More of HSV's value, which scales a pixel's channels alike."""
    value = image.max(2, keepdims=True)
    brighter = np.minimum(value + more, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(value > 0, image * (brighter / value), brighter)


def _contrast(image: Picture, share: float, generator: Generator) -> Picture:
    mean = image.mean((0, 1), keepdims=True)
    return mean + share * (image - mean)


def _elastic_transform(image: Picture, strength: tuple[float, float, float], generator: Generator) -> Picture:
    """A random affine map, then smoothed random displacements; all three numbers are shares of the shorter side."""
    height, width, channels = image.shape
    amount, smoothing, corner = (min(height, width) * each for each in strength)
    centre, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = centre + arm * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = corners + generator.uniform(-corner, corner, (3, 2))
    # Where each pixel of the result comes from: the affine map that takes the moved corners back.
    back = np.linalg.solve(np.hstack([moved, np.ones((3, 1))]), corners)
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), axis=-1)
    shift = [
        amount * ndimage.gaussian_filter(generator.uniform(-1, 1, (height, width)), smoothing, truncate=3)
        for _ in range(2)
    ]
    source = ((places + np.stack(shift, axis=-1)) @ back[:2] + back[2]).transpose(2, 0, 1)
    return np.stack(
        [ndimage.map_coordinates(image[..., k], source, order=1, mode="mirror") for k in range(channels)], -1
    )


def _pixelate(image: Picture, share: float, generator: Generator) -> Picture:
    picture = _to_pil(image)
    coarse = (max(1, int(picture.width * share)), max(1, int(picture.height * share)))
    return _from_pil(picture.resize(coarse, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX))


def _jpeg_compression(image: Picture, quality: int, generator: Generator) -> Picture:
    file = io.BytesIO()
    _to_pil(image).save(file, "JPEG", quality=quality)
    return _from_pil(Image.open(file))


# What they are made of


def _unit(image: Picture) -> float:
    """Pixels of this image to one of a 32x32 image; 1 for smaller ones, where less would be no blur at all."""
    return max(1.0, min(image.shape[:2]) / 32)


def _smooth(image: Picture, deviation: float) -> Picture:
    sides = deviation * _unit(image)
    return ndimage.gaussian_filter(image, (sides, sides, 0), mode="nearest")


def _move(image: Picture, length: float, deviation: float, angle: float) -> Picture:
    """Blur along a line that ends at each pixel, with the weights of half a bell curve."""
    steps = np.arange(1 + 2 * math.ceil(length * _unit(image)))
    weights = np.exp(-((steps / (deviation * _unit(image))) ** 2) / 2)
    ys, xs = np.arange(image.shape[0]), np.arange(image.shape[1])
    out = np.zeros_like(image)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = round(step * math.sin(angle)), round(step * math.cos(angle))
        rows, columns = np.clip(ys + down, 0, ys[-1]), np.clip(xs + right, 0, xs[-1])
        out += weight * image[rows[:, None], columns]
    return out


def _magnify(image: Picture, factor: float) -> Picture:
    """Magnified about its centre, bilinearly."""
    scale = np.array([1 / factor, 1 / factor, 1])
    centre = (np.array(image.shape) - 1) / 2
    return ndimage.affine_transform(image, scale, centre * (1 - scale), order=1, mode="nearest")


def _plasma(height: int, width: int, decay: float, generator: Generator) -> np.ndarray:
    """A plasma fractal by midpoint displacement (diamond-square) on a torus, in [0, 1], of random displacements that
    shrink by `decay` with each halving."""
    size = 1 << max(1, math.ceil(math.log2(max(height, width))))
    field, step, rough = np.zeros((size, size)), size, 1.0

    def drawn(corners: np.ndarray) -> np.ndarray:
        return corners / 4 + rough * generator.uniform(-1, 1, corners.shape)

    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        pairs = corners + np.roll(corners, -1, 0)
        field[half::step, half::step] = drawn(pairs + np.roll(pairs, -1, 1))
        centres = field[half::step, half::step]
        field[::step, half::step] = drawn(corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 0))
        field[half::step, ::step] = drawn(corners + np.roll(corners, -1, 0) + centres + np.roll(centres, 1, 1))
        step, rough = half, rough / decay
    field -= field.min()
    return field[:height, :width] / field.max()


def _grey(image: Picture) -> Picture:
    return (image @ LUMA)[..., None] if image.shape[2] == 3 else image


def _to_bytes(image: Picture) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def _to_pil(image: Picture) -> Image.Image:
    return Image.fromarray(_to_bytes(image) if image.shape[2] == 3 else _to_bytes(image)[..., 0])


def _from_pil(picture: Image.Image) -> Picture:
    return np.asarray(picture, np.float64).reshape(picture.height, picture.width, -1) / 255


METHODS: dict[Corruption, tuple[Callable[[Picture, Any, Generator], Picture], tuple[Any, ...]]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.4, 0.15), (0.4, 0.3), (0.4, 0.45), (0.4, 0.6), (0.4, 0.8))),  # own
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2.25), (9, 2.5))),  # own: 2.25 for 2
    "zoom_blur": (_zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.95, 0.4), (0.9, 0.5), (0.85, 0.6))),  # own from the third on
    "fog": (_fog, ((0.2, 9), (0.5, 9), (0.75, 6.25), (1, 4), (1.5, 3.0625))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (  # own
        _elastic_transform,
        ((0.04, 0.06, 0.03), (0.06, 0.05, 0.04), (0.08, 0.04, 0.05), (0.1, 0.04, 0.06), (0.1, 0.03, 0.07)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
}  # fmt: skip
