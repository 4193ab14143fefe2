"""An explanation painted over its image: superpixel borders, and coefficients as diverging colours."""

import numpy as np
from matplotlib import colormaps

COLOURS = "RdBu"  # red speaks against, blue supports; told apart by the colour-blind too
OPACITY = 0.65
DARKEST = 0.3  # black is lifted to this grey, or the colours over it would not be those of the scale
BORDER = 40  # grey level of borders


def overlay(image: np.ndarray, segments: np.ndarray, coefficients: np.ndarray, scale: float, zoom: int) -> np.ndarray:
    """uint8 [H*zoom, W*zoom, 3]: `image` [C, H, W] in grey under the colours of its segments' coefficients [S].

    -scale is full red, +scale full blue, 0 white.
    """
    strength = np.nan_to_num(coefficients)[segments] / (scale or 1.0)
    colours = colormaps[COLOURS](0.5 + 0.5 * np.clip(strength, -1, 1))[..., :3]
    grey = DARKEST + (1 - DARKEST) * image.mean(0)[..., None]
    painted = np.round(255 * ((1 - OPACITY) * grey + OPACITY * colours)).astype(np.uint8)
    large = painted.repeat(zoom, 0).repeat(zoom, 1)
    large[borders(segments.repeat(zoom, 0).repeat(zoom, 1))] = BORDER
    return large


def borders(segments: np.ndarray) -> np.ndarray:
    """bool [H, W]: pixels whose right or lower neighbour, or left or upper one, is of another segment."""
    across, down = np.diff(segments.astype(np.int64), axis=1) != 0, np.diff(segments.astype(np.int64), axis=0) != 0
    found = np.zeros(segments.shape, bool)
    found[:, :-1] |= across
    found[:, 1:] |= across
    found[:-1] |= down
    found[1:] |= down
    return found
