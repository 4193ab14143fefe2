"""Superpixels: of one image by a method of the configuration, of a batch where its images lie; clean segment maps."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.quickshift import quickshift_batch
from hpcguard.config import LimeConfig
from hpcguard.errors import InputError
from hpcguard.plugins import import_callable

KEY = "attribution.segmentation"
FEW_SEGMENTS = 4  # below this an explanation says almost nothing (lime's own default gives 1 to 3 at 32x32)
MOST_SEGMENTS = 65_535  # counts and labels are kept in 16 bits
QUICKSHIFT_SEED = 42  # scikit-image's default, and so lime's


@dataclass(frozen=True)
class Defaults:
    """What holds for images whose shorter side is at least `side`, where the configuration does not say otherwise."""

    side: int
    num_segments: int  # slic, grid
    kernel_size: float  # quickshift
    max_dist: float
    scale: float  # felzenszwalb
    min_size: int


# Looked at on digits, Fashion-MNIST, CIFAR-10 and photographs. Stored values depend on it: see ATTRIBUTION_VERSION.
DEFAULTS = (
    Defaults(side=0, num_segments=16, kernel_size=1, max_dist=10, scale=10, min_size=2),
    Defaults(side=12, num_segments=24, kernel_size=1, max_dist=10, scale=10, min_size=8),
    Defaults(side=24, num_segments=40, kernel_size=1, max_dist=10, scale=10, min_size=8),
    Defaults(side=32, num_segments=50, kernel_size=1, max_dist=10, scale=10, min_size=8),
    Defaults(side=48, num_segments=50, kernel_size=1, max_dist=10, scale=25, min_size=16),
    Defaults(side=64, num_segments=64, kernel_size=2, max_dist=20, scale=25, min_size=16),
    Defaults(side=96, num_segments=64, kernel_size=2, max_dist=20, scale=50, min_size=32),
    Defaults(side=128, num_segments=100, kernel_size=2, max_dist=20, scale=100, min_size=50),
    Defaults(side=192, num_segments=100, kernel_size=4, max_dist=200, scale=100, min_size=100),  # lime's quickshift
    Defaults(side=384, num_segments=100, kernel_size=4, max_dist=200, scale=300, min_size=400),
)


def segment_batch(images: Tensor, config: LimeConfig, ids: np.ndarray | None = None) -> np.ndarray:
    """Superpixels of each image: float32 [B, C, H, W] in [0, 1] to int64 [B, H, W], on the images' device if it can.

    ids: names for the images in messages.
    """
    names = range(len(images)) if ids is None else ids
    if segments_on_device(config, images.device.type, images.shape[1]):
        return quickshift_maps(images, config)
    host = images.cpu().numpy()
    return np.stack([segment_image(image, config, int(name)) for image, name in zip(host, names, strict=True)])


def segments_on_device(config: LimeConfig, device_type: str, channels: int) -> bool:
    """Whether images on such a device are segmented there; the labels are the same."""
    return config.segmentation == "quickshift" and device_type == "cuda" and channels in (1, 3)


def quickshift_maps(images: Tensor, config: LimeConfig) -> np.ndarray:
    """quickshift of [B, 1 or 3, H, W] by torch, wherever the images lie, with the labels of segment_image."""
    options = _quickshift_options(config, images.shape[2:])
    # At most as many images in memory at once as the model is shown.
    parts = [quickshift_batch(part, seed=QUICKSHIFT_SEED, **options) for part in images.split(config.batch_size)]
    return np.stack([_finished(labels, config) for labels in torch.cat(parts).cpu().numpy()])


def segment_image(image: np.ndarray, config: LimeConfig, image_id: int | None = None) -> np.ndarray:
    """Superpixels of one image: float32 [C, H, W] in [0, 1] to int64 [H, W] with labels 0..d-1, every one in use.

    Raises InputError for a callable that cannot be had or gives no labels, RuntimeError where a method itself fails.
    """
    pixels = np.moveaxis(image, 0, -1).astype(np.float64)
    method = _METHODS.get(config.segmentation) or partial(_by_own, import_callable(config.segmentation, KEY))
    try:
        labels = method(pixels, config)
    except InputError as error:
        raise InputError(f"{error}{_of_image(image_id)}") from error
    except Exception as error:  # a user's code raises what it likes
        problem = f"{KEY} = {config.segmentation}: {type(error).__name__}: {error}{_of_image(image_id)}"
        raise RuntimeError(problem) from error
    return _finished(labels, config)


def check_segmentation(image: np.ndarray, config: LimeConfig, image_id: int) -> None:
    """Try the user's own callable, if it is one, on one image [C, H, W]. Raises InputError if it cannot be used."""
    if config.segmentation in _METHODS:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the image is explained
            segment_image(image, config, image_id)
    except RuntimeError as error:
        raise InputError(str(error)) from error


def wanted_segments(config: LimeConfig, height: int, width: int) -> int:
    """How many superpixels slic and grid are asked for."""
    return config.num_segments or _defaults(height, width).num_segments


def labels_fit_a_byte(config: LimeConfig, height: int, width: int) -> bool:
    """Whether no image of this size can have more than 256 segments."""
    if height * width <= 256:
        return True
    # slic gives up to three times as many as it is asked for, on images little larger than that: 267 for 80 at 17x17.
    limit = {"slic": 64, "grid": 128}.get(config.segmentation, 0)
    return wanted_segments(config, height, width) <= limit


def grid_segments(height: int, width: int, count: int) -> np.ndarray:
    """About `count` equal rectangles, int64 [H, W]."""
    side = max(2, round(count**0.5))
    rows = np.arange(height) * min(side, height) // height
    columns = np.arange(width) * min(side, width) // width
    return rows[:, None] * (columns.max() + 1) + columns[None, :]


def relabel(labels: np.ndarray) -> np.ndarray:
    """The same segments with labels 0..d-1 in ascending order of the old ones (lime cannot mask past a gap)."""
    if _is_dense(labels):
        return labels.astype(np.int64)
    _, dense = np.unique(labels, return_inverse=True)
    return dense.reshape(labels.shape).astype(np.int64)


def _is_dense(labels: np.ndarray) -> bool:
    """Whether the labels are 0..d-1 already, at a tenth of the cost of sorting them."""
    if labels.dtype.kind not in "iu" or labels.size == 0 or labels.min() < 0 or labels.max() >= labels.size:
        return False
    return bool(np.bincount(labels.ravel().astype(np.int64)).all())


def _finished(labels: np.ndarray, config: LimeConfig) -> np.ndarray:
    """Dense labels, with a warning where they are too few to explain anything by."""
    dense = relabel(labels)
    count = int(dense.max()) + 1
    what = f"{config.segmentation} gives {count} segment(s) on an image of {labels.shape[0]}x{labels.shape[1]}"
    if count > MOST_SEGMENTS:
        raise InputError(f"{what}, at most {MOST_SEGMENTS} are possible; {_remedy(config, 'more')}")
    if count < FEW_SEGMENTS:
        warnings.warn(f"{what}: its explanation means little; {_remedy(config, 'fewer')}", stacklevel=3)
    return dense


def _remedy(config: LimeConfig, than_wanted: str) -> str:
    """What to change where there are 'fewer' or 'more' segments than wanted."""
    keys = {
        "slic": "attribution.num_segments",
        "grid": "attribution.num_segments",
        "quickshift": "kernel_size and max_dist of attribution.segmentation_options",
        "felzenszwalb": "scale and min_size of attribution.segmentation_options",
    }
    if config.segmentation not in keys:
        return f"change it, or choose another {KEY}"
    counts = config.segmentation in ("slic", "grid")
    verb = "raise" if counts == (than_wanted == "fewer") else "lower"
    return f"{verb} {keys[config.segmentation]}, or choose another {KEY}"


def _of_image(image_id: int | None) -> str:
    return "" if image_id is None else f" (image id {image_id})"


def _defaults(height: int, width: int) -> Defaults:
    return next(each for each in reversed(DEFAULTS) if each.side <= min(height, width))


def _options(config: LimeConfig) -> dict[str, float]:
    """The user's, whole numbers as int: scikit-image and others take no 10.0 for a count."""
    return {name: int(value) if value.is_integer() else value for name, value in config.segmentation_options.items()}


def _quickshift_options(config: LimeConfig, shape: tuple[int, ...]) -> dict[str, float]:
    size = _defaults(*shape)
    return {"kernel_size": size.kernel_size, "max_dist": size.max_dist, "ratio": 0.2, **_options(config)}


def _by_slic(pixels: np.ndarray, config: LimeConfig) -> np.ndarray:
    from skimage import segmentation  # slow to import, and not needed with injected segments

    height, width, channels = pixels.shape
    options = {"compactness": 10.0 if channels == 3 else 0.1, **_options(config)}
    count = wanted_segments(config, height, width)
    return segmentation.slic(pixels, n_segments=count, start_label=0, channel_axis=-1, **options)


def _by_quickshift(pixels: np.ndarray, config: LimeConfig) -> np.ndarray:
    from skimage import segmentation

    # skimage's quickshift takes colour only; a repeated channel leaves a grey image's distances proportional.
    colour = pixels if pixels.shape[-1] == 3 else np.repeat(pixels.mean(-1, keepdims=True), 3, axis=-1)
    return segmentation.quickshift(colour, rng=QUICKSHIFT_SEED, **_quickshift_options(config, pixels.shape[:2]))


def _by_felzenszwalb(pixels: np.ndarray, config: LimeConfig) -> np.ndarray:
    from skimage import segmentation

    size = _defaults(*pixels.shape[:2])
    options = {"scale": size.scale, "sigma": 0.5, "min_size": size.min_size, **_options(config)}
    return segmentation.felzenszwalb(pixels, channel_axis=-1, **options)


def _by_grid(pixels: np.ndarray, config: LimeConfig) -> np.ndarray:
    height, width = pixels.shape[:2]
    return grid_segments(height, width, wanted_segments(config, height, width))


def _by_own(own: Callable[..., Any], pixels: np.ndarray, config: LimeConfig) -> np.ndarray:
    labels = np.asarray(own(np.ascontiguousarray(pixels), **_options(config)))
    if labels.shape != pixels.shape[:2] or labels.dtype.kind not in "iu":
        expected = f"integer labels {list(pixels.shape[:2])} for pixels {list(pixels.shape)}"
        found = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{KEY} = {config.segmentation}: must give {expected}, gave {found}")
    return labels


_METHODS = {"slic": _by_slic, "quickshift": _by_quickshift, "felzenszwalb": _by_felzenszwalb, "grid": _by_grid}
