"""Stability indices against examples worked by hand, instability under noise against closed forms and a plain loop."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.metrics.stability import (
    coefficient_stability_index,
    mean_pairwise_jaccard,
    noise_instability,
    variable_stability_index,
)
from hpcguard.randomness import keyed_generator

NAN = np.nan
# The first and the third repeat select segments 0 and 1, the second 0 and 2; the last column is padding.
REPEATS = np.array([[1.0, 0.5, 0.1, NAN], [1.5, 0.4, -0.9, NAN], [-3.0, 2.0, 0.2, NAN]])
ERRORS = np.array([[0.2, 0.1, 0.1, NAN], [0.2, 0.1, 0.1, NAN], [0.2, 0.1, 0.1, NAN]])


def test_indices_of_a_worked_example() -> None:
    assert mean_pairwise_jaccard(REPEATS, 2) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert variable_stability_index(REPEATS, 2) == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)
    # Segment 0: 1.0 and 1.5 overlap (+-0.392), -3.0 with neither: 1 of 3 pairs. Segment 1: 0.5 and 2.0 of the first
    # and third (+-0.196) do not, and its overlap with the second, which did not select it, does not count.
    # Segment 2 is selected once: no pair.
    assert coefficient_stability_index(REPEATS, ERRORS, 2) == pytest.approx((1 / 3 + 0) / 2)
    # All three segments, padding not among them: segment 1 overlaps in 1 of 3 pairs, segment 2 in 1 of 3.
    for k in (3, 4, 9):
        assert variable_stability_index(REPEATS, k) == mean_pairwise_jaccard(REPEATS, k) == 1
        assert coefficient_stability_index(REPEATS, ERRORS, k) == pytest.approx((1 / 3 + 1 / 3 + 1 / 3) / 3)


def test_the_order_of_repeats_does_not_matter_and_disjoint_ones_share_nothing() -> None:
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
        assert variable_stability_index(REPEATS[order], 2) == pytest.approx(2 / 3)
        assert coefficient_stability_index(REPEATS[order], ERRORS, 2) == pytest.approx(1 / 6)
    disjoint = np.array([[1.0, 0.9, 0, 0], [0, 0, 1.0, 0.9]])
    assert variable_stability_index(disjoint, 2) == mean_pairwise_jaccard(disjoint, 2) == 0
    assert math.isnan(coefficient_stability_index(disjoint, np.ones((2, 4)), 2))


def test_intervals_are_of_95_percent_with_their_ends() -> None:
    def index(apart: float, error: float) -> float:
        return coefficient_stability_index(np.array([[1.0], [1.0 + apart]]), np.full((2, 1), error), 1)

    assert index(3.91, 1.0) == 1
    assert index(3.93, 1.0) == 0
    assert index(0.0, 0.0) == 1  # repeats that agree exactly are stable


def test_the_coefficient_index_of_honest_standard_errors() -> None:
    """Two draws from N(a, s) differ by less than 2 * 1.96 s with probability erf(1.96): 0.99443."""
    generator = np.random.default_rng(0)
    errors = np.broadcast_to(np.linspace(0.01, 0.1, 30), (120, 30))
    draws = generator.normal(np.arange(1, 31), errors)
    assert coefficient_stability_index(draws, errors, 30) == pytest.approx(math.erf(1.96), abs=0.0015)
    assert coefficient_stability_index(draws, errors / 4, 30) == pytest.approx(math.erf(0.49), abs=0.03)


@pytest.mark.parametrize("k", [0, 2])
def test_indices_refuse_what_has_no_pairs(k: int) -> None:
    few = REPEATS[:1] if k else REPEATS
    for index in (mean_pairwise_jaccard, variable_stability_index):
        with pytest.raises(ValueError, match="at least 2 repeats"):
            index(few, k)
    with pytest.raises(ValueError, match="at least 2 repeats"):
        coefficient_stability_index(few, few, k)


def test_indices_refuse_repeats_of_different_images() -> None:
    with pytest.raises(ValueError, match="same segments"):
        variable_stability_index(np.array([[1.0, 2.0], [1.0, NAN]]), 1)
    with pytest.raises(ValueError, match="standard_errors"):
        coefficient_stability_index(REPEATS, ERRORS[:, :3], 2)


WEIGHTS = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float32) / 16
QUARTERS = np.repeat(np.repeat(np.array([[0, 1], [2, 3]]), 2, axis=0), 2, axis=1)
SIGMA = 10 / 255


def linear(x: Tensor) -> Tensor:
    """Two `probabilities`: a sum over pixels, and half of it."""
    assert x.min() >= 0 and x.max() <= 1
    total = (x * WEIGHTS).sum((1, 2, 3))
    return torch.stack([total, total / 2], 1)


# With no ridge to speak of and a constant fill of 0, coefficients of `linear` are sums of weight * pixel of a segment.
EXACT = LimeConfig(fill=0.0, ridge=1e-9, num_samples=32)


@pytest.mark.parametrize(
    ("pixel", "share"), [(0.5, 1.0), (1.0, 0.5 - 0.5 / math.pi), (0.0, 0.5 - 0.5 / math.pi)], ids=["grey", "1", "0"]
)
def test_instability_of_a_linear_model_in_closed_form(pixel: float, share: float) -> None:
    """Var a_j = sigma^2 sum w^2; at the ends of [0, 1] half of the noise is clipped: Var min(n, 0) of a normal n."""
    images = np.full((1, 1, 4, 4), pixel, np.float32)
    got = noise_instability(
        linear, images, np.array([7]), EXACT, np.array([[0, 1]]), QUARTERS[None], copies=2000, sigma=SIGMA
    )
    squares = np.bincount(QUARTERS.flatten(), WEIGHTS.numpy().flatten() ** 2)
    expected = share * SIGMA**2 * np.array([squares, squares / 4])
    assert got[0] == pytest.approx(expected, rel=0.12)  # the standard deviation of a variance: sqrt(2 / 2000) = 3%


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    return nn.Sequential(*layers).eval()


NET = small_net()
CONFIG = LimeConfig(num_samples=48, batch_size=50)
IDS = np.array([5, 3, 11])
TARGETS = np.array([[0, 1], [4, 2], [3, 3]])
IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
SEGMENTS = np.stack([np.arange(144).reshape(12, 12) * count // 144 for count in (6, 4, 9)]).astype(np.uint16)


def predict(x: Tensor) -> Tensor:
    return NET(x).softmax(1)


def instability(rows: slice | list[int] = slice(None), **changes: Any) -> np.ndarray:
    return noise_instability(predict, IMAGES[rows], IDS[rows], CONFIG, TARGETS[rows], SEGMENTS[rows], **changes)


def test_instability_equals_a_loop_over_single_copies() -> None:
    got = instability(copies=4, seed=3)
    assert got.shape == (3, 2, 9)
    for i, image_id in enumerate(IDS):
        noise = keyed_generator("attack", 3, int(image_id)).standard_normal((4, 3, 12, 12), dtype=np.float32)
        repeats = []
        for each in noise:
            noisy = np.clip(IMAGES[i].numpy() + np.float32(SIGMA) * each, 0, 1)[None]
            one = explain_batch(predict, noisy, IDS[i : i + 1], CONFIG, TARGETS[i : i + 1], SEGMENTS[i : i + 1])
            repeats.append(one.coefficients[0])
        count = repeats[0].shape[1]
        centre = sum(repeats) / 4
        expected = sum((each - centre) ** 2 for each in repeats) / 3
        assert got[i, :, :count] == pytest.approx(expected, rel=1e-3, abs=1e-12)
        assert np.isnan(got[i, :, count:]).all()
        assert expected.max() > 1e-8  # or the comparison says nothing


def test_instability_of_an_image_does_not_depend_on_its_batch() -> None:
    together = instability()
    alone = instability([1])
    assert together[1, :, :4] == pytest.approx(alone[0], rel=1e-3, abs=1e-12)
    turned = instability([2, 1, 0])
    assert turned[::-1] == pytest.approx(together, rel=1e-3, abs=1e-12, nan_ok=True)


def test_noise_belongs_to_the_seed_and_the_image_id() -> None:
    first = instability([0])
    assert np.array_equal(first, instability([0]))
    assert not np.allclose(first, instability([0], seed=1), rtol=0.01)
    # The samples belong to config.seed and the id: with sigma 0 nothing is left that could differ between copies.
    assert instability(sigma=0.0)[~np.isnan(instability())].max() < 1e-12

    other = noise_instability(predict, IMAGES[:1], np.array([6]), CONFIG, TARGETS[:1], SEGMENTS[:1])
    assert not np.allclose(first, other, rtol=0.01)


def test_copies_share_model_batches() -> None:
    sizes = []

    def counted(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return predict(x)

    noise_instability(counted, IMAGES, IDS, CONFIG, TARGETS, SEGMENTS, copies=4)
    assert max(sizes) <= 50
    assert len(sizes) <= math.ceil(12 / 50) + math.ceil(12 * 47 / 50)


def test_instability_refuses_what_has_no_variance() -> None:
    with pytest.raises(ValueError, match="copies"):
        instability(copies=1)
    with pytest.raises(ValueError, match=r"\[3, 2, 3, 3\]"):
        noise_instability(predict, IMAGES, IDS[:2], CONFIG, TARGETS, SEGMENTS)
