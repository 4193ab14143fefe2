"""Quickshift superpixels of a whole batch on the images' own device, with scikit-image's labels."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

NOISE = 1e-5  # scikit-image adds normal noise of this scale to the densities, so that equal pixels have an order

Shift = tuple[int, int]


def quickshift_batch(
    images: Tensor, kernel_size: float, max_dist: float, ratio: float, sigma: float = 0.0, seed: int = 42
) -> Tensor:
    """Quickshift labels (Vedaldi and Soatto, ECCV 2008) of each image: float [B, C, H, W] in [0, 1] to int64 [B, H, W].

    They are those of `skimage.segmentation.quickshift(image, ratio, kernel_size, max_dist, sigma=sigma, rng=seed)` on
    every image as float64 [H, W, 3], a grey one (C = 1) repeated to three channels. Squared distances are its own to
    the last bit; densities too, but for the last bits of the device's exp, far below the noise that orders equal ones.
    The search runs in float64 on the device of `images` and holds about a dozen arrays of the size of [B, H, W], for
    any window. It is for a GPU: on a CPU scikit-image is as fast or faster.
    """
    _check(images, kernel_size)
    batch, _, height, width = images.shape
    planes = _scaled_lab(images, ratio, sigma)
    shifts = list(_window(height, width, math.ceil(3 * kernel_size)))
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=(height, width))  # every image gets the same
    density = _densities(planes, shifts, kernel_size) + torch.from_numpy(noise).to(planes.device)
    parent, distance = _parents(planes, density, shifts)
    own = torch.arange(height * width, device=planes.device)
    parent = torch.where(distance > _squared_cut(max_dist), own.view(height, width), parent)
    return _tree_labels(parent.view(batch, -1), own).view(batch, height, width)


def _check(images: Tensor, kernel_size: float) -> None:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must be [B, 1 or 3, H, W] and not empty, not {list(images.shape)}")
    if images.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"images must be float32 or float64, not {images.dtype}")
    if not kernel_size >= 1:
        raise ValueError(f"kernel_size must be at least 1, not {kernel_size}")


def _scaled_lab(images: Tensor, ratio: float, sigma: float) -> Tensor:
    """Lab colours times `ratio`, float64 [3, B, H, W]: plane by plane, as the window's shifts want them.

    Done on the host by scikit-image itself: another pow, cube root or matrix product differs in the last bits, and
    where two neighbours are all but equally far those bits choose the parent (14 of 1024 pixels of a grey ramp).
    """
    from skimage import color, filters  # slow to import

    pixels = images.detach().double().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    lab = np.stack([color.rgb2lab(image) for image in pixels])
    if sigma:
        blur = [sigma, sigma, 0]
        lab = np.stack([filters.gaussian(image, sigma=blur, mode="reflect", channel_axis=-1) for image in lab])
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(lab * ratio, -1, 0))).to(images.device)


def _squared_cut(max_dist: float) -> float:
    """Largest number whose square root is not above `max_dist`: a device's own sqrt may be an ulp off at the border."""
    if max_dist < 0:
        return max_dist
    cut = float(max_dist) * max_dist
    while math.sqrt(cut) > max_dist:
        cut = math.nextafter(cut, 0.0)
    while cut < math.inf and math.sqrt(math.nextafter(cut, math.inf)) <= max_dist:
        cut = math.nextafter(cut, math.inf)
    return cut


def _window(height: int, width: int, radius: int) -> Iterator[Shift]:
    """(row, column) shifts to the window's other pixels, row by row: sums round and ties break in this order."""
    tall, wide = min(radius, height - 1), min(radius, width - 1)
    for row in range(-tall, tall + 1):
        for column in range(-wide, wide + 1):
            yield row, column


def _crop(array: Tensor, shift: Shift) -> Tensor:
    """View [..., h, w] of the pixels whose neighbour at `shift` is inside the image; at -shift: those neighbours."""
    for axis, step in zip((-2, -1), shift, strict=True):
        array = array.narrow(axis, max(0, -step), array.shape[axis] - abs(step))
    return array


def _squared_distances(planes: Tensor, shift: Shift) -> Tensor:
    """Squared colour and space distance of each pixel to its neighbour at `shift`: [3, B, H, W] to [B, h, w]."""
    row, column = shift
    squares = (_crop(planes, shift) - _crop(planes, (-row, -column))).square_()
    # One term after another, as scikit-image adds them: a tie between neighbours must stay a tie.
    return squares[0].add_(squares[1]).add_(squares[2]).add_(row * row).add_(column * column)


def _densities(planes: Tensor, shifts: list[Shift], kernel_size: float) -> Tensor:
    """Sum of Gaussian weights over each pixel's window: [3, B, H, W] to [B, H, W]."""
    density = torch.zeros_like(planes[0])
    for shift in shifts:
        weight = _squared_distances(planes, shift).mul_(-0.5 / (kernel_size * kernel_size)).exp_()
        _crop(density, shift).add_(weight)
    return density


def _parents(planes: Tensor, density: Tensor, shifts: list[Shift]) -> tuple[Tensor, Tensor]:
    """Nearest denser pixel in the window (flat index) and its squared distance, both [B, H, W]; (self, inf) if none."""
    height, width = density.shape[1:]
    own = torch.arange(height * width, device=density.device).view(1, height, width)
    parent, closest = own.expand_as(density).clone(), torch.full_like(density, math.inf)
    for row, column in shifts:
        shift, back = (row, column), (-row, -column)
        distance = _squared_distances(planes, shift)
        best, chosen = _crop(closest, shift), _crop(parent, shift)
        nearer = (distance < best).logical_and_(_crop(density, back) > _crop(density, shift))
        torch.where(nearer, distance, best, out=best)
        torch.where(nearer, _crop(own, back), chosen, out=chosen)
    return parent, closest


def _tree_labels(parent: Tensor, own: Tensor) -> Tensor:
    """Number of each pixel's tree, trees in the order of their roots: flat parent indices [B, HW] to [B, HW]."""
    root = parent
    for _ in range(own.numel().bit_length()):  # every round doubles the steps taken, and no path is longer than HW
        root = root.gather(1, root)
    return ((parent == own).cumsum(1) - 1).gather(1, root)
