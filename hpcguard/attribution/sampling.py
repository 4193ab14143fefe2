"""Sampling designs: which segments each perturbed copy shows.

Every design keeps single rows uniform over {0, 1}^d, so that its limit for many samples is lime's.
"""

from typing import Literal

import numpy as np

from hpcguard.randomness import keyed_generator

Design = Literal["iid", "antithetic"]


def draw_samples(design: Design, seed: int, image_id: int, num_samples: int, num_segments: int) -> np.ndarray:
    """Rows of shown (True) and hidden segments, bool [N, d]; row 0 is the image itself."""
    generator = keyed_generator("samples", seed, image_id)
    samples = np.ones((num_samples, num_segments), dtype=bool)
    rows = num_samples - 1
    if design == "iid":
        samples[1:] = generator.integers(0, 2, (rows, num_segments), dtype=np.uint8)
    else:
        half = generator.integers(0, 2, ((rows + 1) // 2, num_segments), dtype=np.uint8).astype(bool)
        samples[1::2] = half
        samples[2::2] = ~half[: rows // 2]
    return samples


def sample_clusters(design: Design, num_samples: int) -> np.ndarray:
    """Cluster of every row, int64 [N]: rows of a cluster were drawn together, clusters independently."""
    rows = np.arange(num_samples)
    return rows if design == "iid" else (rows + 1) // 2
