"""Sampling designs: which segments each perturbed copy shows.

Every design keeps single rows uniform over {0, 1}^d, so that its limit for many samples is lime's. Longer draws start
with shorter ones.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hpcguard.randomness import keyed_generator

Design = Literal["lime", "iid", "antithetic", "hadamard", "sobol"]


@dataclass(frozen=True)
class Drawn:
    """The rows of one image, and how they hang together."""

    rows: np.ndarray  # bool [n, d], row 0 is the image itself
    paired: bool = False  # rows 1 and 2, 3 and 4, ... are complements, drawn together
    complete: bool = False  # all 2^d rows, each once: nothing is left to chance for who evaluates them all


def draw_samples(design: Design, seed: int, image_id: int, num_samples: int, num_segments: int) -> Drawn:
    """`num_samples` rows for an image of `num_segments` segments; all 2^d of them where that is no more.

    `lime` never enumerates: it gives the rows of LimeImageExplainer(random_state=seed + image_id), bit for bit.
    """
    if design == "lime":
        return Drawn(_lime_rows(seed + image_id, num_samples, num_segments))
    if num_segments < 63 and 2**num_segments <= num_samples:
        return Drawn(_all_rows(keyed_generator("samples", seed, image_id), num_segments), paired=True, complete=True)
    generator = keyed_generator("samples", seed, image_id)
    rest, design_asked = num_samples - 1, design
    rows = _DRAW[design](generator, rest, num_segments)
    if coincide(rows):
        told_apart = f"two columns of image {image_id} coincide at {num_samples} samples of {num_segments} segments"
        remedy = f"Raise attribution.num_samples (auto: max_samples) to {4 * num_segments} or more"
        use = "their segments cannot be told apart"
        if design in ("hadamard", "sobol"):
            design, rows, use = "antithetic", _antithetic(generator, rest, num_segments), "antithetic rows are used"
        warnings.warn(f"{design_asked}: {told_apart}; {use}. {remedy}", stacklevel=2)
    whole = np.concatenate([np.ones((1, num_segments), bool), rows])
    return Drawn(whole, paired=design in ("antithetic", "hadamard"))


def _lime_rows(seed: int, num_samples: int, num_segments: int) -> np.ndarray:
    """lime's stream: a draw for the segmentation's seed, then int64 zeros and ones for all rows, row 0 set to ones."""
    state = np.random.RandomState(seed % 2**32)
    state.randint(0, high=1000)
    rows = state.randint(0, 2, num_samples * num_segments).reshape(num_samples, num_segments).astype(bool)
    rows[0] = True
    return rows


def _all_rows(generator: np.random.Generator, num_segments: int) -> np.ndarray:
    """All ones, then pairs (z, 1 - z) in random order, so that it is fair to stop early; all zeros last."""
    halves = generator.permutation(2 ** (num_segments - 1) - 1) + 1
    rows = (halves[:, None] >> np.arange(num_segments) & 1).astype(bool)
    ends = np.ones((1, num_segments), bool)
    return np.concatenate([ends, _fold(rows), ~ends])


def _iid(generator: np.random.Generator, count: int, num_segments: int) -> np.ndarray:
    return generator.integers(0, 2, (count, num_segments), dtype=np.uint8).astype(bool)


def _antithetic(generator: np.random.Generator, count: int, num_segments: int) -> np.ndarray:
    """Pairs (z, 1 - z)."""
    return _fold(_iid(generator, -(-count // 2), num_segments))[:count]


def _hadamard(generator: np.random.Generator, count: int, num_segments: int) -> np.ndarray:
    """Blocks of a Hadamard matrix's rows and their complements, columns drawn and signed anew in every block.

    Within a whole block the columns are orthogonal to each other and, folded over, to all their pairwise products.
    """
    order = 2 ** math.ceil(math.log2(num_segments + 1))
    parity = np.array([number.bit_count() & 1 for number in range(order)], bool)
    blocks = []
    for _ in range(-(-count // (2 * order))):
        columns = generator.permutation(order - 1)[:num_segments] + 1  # column 0 is constant
        signs = generator.integers(0, 2, num_segments, dtype=np.uint8).astype(bool)
        index = generator.permutation(order)[: -(-count // 2)]  # no more rows of a large block than are asked for
        blocks.append(_fold(parity[index[:, None] & columns] ^ signs))
    return np.concatenate(blocks)[:count]


def _sobol(generator: np.random.Generator, count: int, num_segments: int) -> np.ndarray:
    """Scrambled Sobol points, u > 1/2 (Owen 1998)."""
    from scipy.stats import qmc  # a second of imports

    seed = int(generator.integers(2**63))  # scipy spawns from its generator, which a keyed one cannot
    points = qmc.Sobol(num_segments, scramble=True, rng=np.random.default_rng(seed)).random_base2(
        max(1, math.ceil(math.log2(count)))
    )
    return points[:count] > 0.5


_DRAW = {"iid": _iid, "antithetic": _antithetic, "hadamard": _hadamard, "sobol": _sobol}


def _fold(rows: np.ndarray) -> np.ndarray:
    """Each row followed by its complement."""
    return np.stack([rows, ~rows], 1).reshape(2 * len(rows), rows.shape[1])


def distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows of bool [n, d] in the order of their first appearance, which of them each row is)."""
    packed = np.ascontiguousarray(np.packbits(rows, axis=1))
    keys = packed.view(np.dtype((np.void, packed.shape[1])))[:, 0]
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rows[first[order]], rank[back]


def coincide(rows: np.ndarray) -> bool:
    """Whether two columns of bool [n, d] are equal or complementary: their segments could then not be told apart."""
    columns = np.packbits(rows ^ rows[0], axis=0)
    return len(np.unique(columns, axis=1).T) < rows.shape[1]
