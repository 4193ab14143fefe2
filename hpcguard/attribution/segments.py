"""Superpixel segmentation of one image, and clean segment maps."""

import warnings

import numpy as np

from hpcguard.config import LimeConfig

FEW_SEGMENTS = 4  # below this an explanation says almost nothing (lime's own default gives 1 to 3 at 32x32)


def segment_image(image: np.ndarray, config: LimeConfig) -> np.ndarray:
    """Superpixels of one image: float32 [C, H, W] in [0, 1] to int64 [H, W] with labels 0..d-1, every one in use."""
    from skimage import segmentation  # slow to import, and not needed with injected segments

    pixels = np.moveaxis(image, 0, -1).astype(np.float64)
    if config.segmentation == "grid":
        labels = grid_segments(image.shape[1], image.shape[2], config.num_segments)
    elif config.segmentation == "slic":
        compactness = config.compactness or (10.0 if image.shape[0] == 3 else 0.1)
        labels = segmentation.slic(
            pixels, n_segments=config.num_segments, compactness=compactness, start_label=0, channel_axis=-1
        )
    elif config.segmentation == "quickshift":
        # skimage's quickshift takes colour only; a repeated channel leaves a grey image's distances proportional.
        colour = pixels if pixels.shape[-1] == 3 else np.repeat(pixels.mean(-1, keepdims=True), 3, axis=-1)
        labels = segmentation.quickshift(colour, kernel_size=1, max_dist=10, ratio=0.2, rng=42)
    else:
        labels = segmentation.felzenszwalb(pixels, scale=10, sigma=0.5, min_size=8, channel_axis=-1)
    labels = relabel(labels)
    if labels.max() + 1 < FEW_SEGMENTS:
        warnings.warn(
            f"{config.segmentation} gives {labels.max() + 1} segment(s) on an image of "
            f"{image.shape[1]}x{image.shape[2]}: its explanation means little; "
            "raise attribution.num_segments or choose another attribution.segmentation",
            stacklevel=2,
        )
    return labels


def grid_segments(height: int, width: int, count: int) -> np.ndarray:
    """About `count` equal rectangles, int64 [H, W]."""
    side = max(2, round(count**0.5))
    rows = np.arange(height) * min(side, height) // height
    columns = np.arange(width) * min(side, width) // width
    return rows[:, None] * (columns.max() + 1) + columns[None, :]


def relabel(labels: np.ndarray) -> np.ndarray:
    """The same segments with labels 0..d-1 in ascending order of the old ones (lime cannot mask past a gap)."""
    _, dense = np.unique(labels, return_inverse=True)
    return dense.reshape(labels.shape).astype(np.int64)
