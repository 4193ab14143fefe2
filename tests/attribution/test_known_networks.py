"""Tiny networks whose explanations are worked out by hand; every derivation stands beside its numbers.

Notation: d segments, all 2^d rows z, weights w, T = sum w, m = sum w z_j / T (the same for every j, since the rows are
symmetric), Gram matrix G = sum w (z - m)(z - m)', right-hand side r = sum w (z - m) y, coefficients (G + ridge I)^-1 r.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import Attribution, LimeConfig, explain_batch
from hpcguard.attribution.surrogate import Surrogate, fit_surrogate

# Weights of rows that show 1 of 2, 1 of 3, 2 of 3 and none of any segments: exp(-8 (1 - sqrt(shown / d))^2).
A = math.exp(-8 * (1 - math.sqrt(1 / 2)) ** 2)  # 0.50344
ONE_OF_3 = math.exp(-8 * (1 - math.sqrt(1 / 3)) ** 2)  # 0.23953
TWO_OF_3 = math.exp(-8 * (1 - math.sqrt(2 / 3)) ** 2)  # 0.76385
NONE = math.exp(-8)  # 0.00034

# Two segments: w = 1, A, A, NONE for 11, 10, 01, 00.
TOTAL = 1 + 2 * A + NONE  # 2.00721
MEAN = (1 + A) / TOTAL  # 0.74902
# G = [[p, q], [q, p]] with p = sum w z_1 - T m^2 = 0.37734 and q = w_11 - T m^2 = -0.12610. Its eigenvectors are (1, 1)
# and (1, -1), its eigenvalues p + q and p - q = A: a ridge shrinks the two directions by different factors.
SUM = 2 + A - 2 * TOTAL * MEAN**2  # p + q = 0.25123


class Affine(nn.Module):
    """Probabilities (p, 1 - p) with p = bias + pixels @ weights."""

    def __init__(self, weights: list[float], bias: float) -> None:
        super().__init__()
        self.layer = nn.Linear(len(weights), 1)
        self.layer.weight.data = torch.tensor([weights], dtype=torch.float32)
        self.layer.bias.data = torch.tensor([bias], dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        p = self.layer(x.flatten(1))
        return torch.cat([p, 1 - p], 1)


class And(nn.Module):
    """p = relu(x_1 + ... + x_d - (d - 1)): 1 where all pixels are 1, else 0."""

    def forward(self, x: Tensor) -> Tensor:
        p = torch.relu(x.flatten(1).sum(1, keepdim=True) - x[0].numel() + 1)
        return torch.cat([p, 1 - p], 1)


class Majority(nn.Module):
    """p = 1 where at least two pixels are 1, else 0: relu(s - 1) - relu(s - 2) of their sum s."""

    def forward(self, x: Tensor) -> Tensor:
        s = x.flatten(1).sum(1, keepdim=True)
        p = torch.relu(s - 1) - torch.relu(s - 2)
        return torch.cat([p, 1 - p], 1)


def explain(
    model: Callable[[Tensor], Tensor], pixels: list[float], segments: list[int] | None = None, **changes: object
) -> Attribution:
    """Pixels in a row, one segment each unless told otherwise, black where hidden, all 2^d rows, ridge 1."""
    image = np.array(pixels, np.float32).reshape(1, 1, 1, -1)
    own = np.array(segments or range(len(pixels))).reshape(1, 1, -1)
    config = LimeConfig(**{"fill": 0.0, "design": "iid", "num_samples": 2 ** (own.max() + 1), **changes})
    return explain_batch(model, image, np.array([0]), config, np.array([[0, 1]]), own)


def enumerated(y: list[float], ridge: float = 1.0, complete: bool = True) -> Surrogate:
    """All rows of log2(len(y)) segments with weight 1, y in the order 1...1 down to 0...0."""
    d = len(y).bit_length() - 1
    rows = torch.tensor([[bool(number >> j & 1) for j in reversed(range(d))] for number in reversed(range(len(y)))])
    answers = torch.tensor(y, dtype=torch.float64)[:, None]
    return fit_surrogate(rows, answers, torch.ones(len(y), dtype=torch.float64), ridge, False, complete)


def test_linear_model_with_equal_weights_in_fractions() -> None:
    """y = 1/4 + z_1/2 + z_2/8. Weights 1: m = 1/2, G = I, so ridge 1 halves: 1/4 and 1/16.

    Mean of y: 1/4 + 1/4 + 1/16 = 9/16; intercept 9/16 - 1/8 - 1/32 = 13/32; at the image 13/32 + 1/4 + 1/16 = 23/32.
    The residual is half of what varies, so R^2 = 1 - 1/4.
    """
    fit = enumerated([7 / 8, 3 / 4, 3 / 8, 1 / 4])
    assert fit.coefficients[0].tolist() == pytest.approx([1 / 4, 1 / 16], abs=1e-15)
    assert float(fit.intercept[0]) == pytest.approx(13 / 32, abs=1e-15)
    assert float(fit.local_prediction[0]) == pytest.approx(23 / 32, abs=1e-15)
    assert float(fit.score[0]) == pytest.approx(3 / 4, abs=1e-15)
    assert fit.effective_samples == 4


def test_and_with_equal_weights_in_fractions() -> None:
    """y = z_1 z_2. r_j = (1 - 1/2) 1 = 1/2, G = I, ridge 1: 1/4 each; intercept 1/4 - 1/8 - 1/8 = 0.

    y - 1/4 is 3/4, -1/4, -1/4, -1/4: squares add up to 3/4. Residuals are 1/2, -1/4, -1/4, 0: 3/8. R^2 = 1/2.
    Leaving row i out: leverage |z - m|^2 / 2 = 1/4, so coefficient j moves by (1/2)(1/2) e_i / (3/4) = e_i / 3; the
    squares add up to (3/8) / 9 = 1/24; times 3/4 that is 1/32.
    """
    fit = enumerated([1, 0, 0, 0], complete=False)
    assert fit.coefficients[0].tolist() == pytest.approx([1 / 4, 1 / 4], abs=1e-15)
    assert float(fit.intercept[0]) == pytest.approx(0, abs=1e-15)
    assert float(fit.local_prediction[0]) == pytest.approx(1 / 2, abs=1e-15)
    assert float(fit.score[0]) == pytest.approx(1 / 2, abs=1e-15)
    assert fit.standard_error[0].tolist() == pytest.approx([math.sqrt(1 / 32)] * 2, abs=1e-12)


def test_exclusive_or_has_no_linear_part() -> None:
    """y = z_1 xor z_2: r_j = (-1/2 + 1/2 + ...) = 0 with weights 1."""
    fit = enumerated([0, 1, 1, 0])
    assert fit.coefficients[0].tolist() == [0, 0]
    assert float(fit.intercept[0]) == 0.5
    assert float(fit.score[0]) == 0


def test_an_ignored_segment_is_exactly_zero_with_equal_weights() -> None:
    """Three segments, y = 1/8 + z_1/2 + z_1 z_3/4: G = 2 I, ridge 2; column 2 is orthogonal to y.

    E[y] depends on z_1 by 1/2 + 1/8 = 5/8 and on z_3 by 1/8; 2/(2 + 2) of each: 5/16, 0, 1/16.
    """
    fit = enumerated([7 / 8, 5 / 8, 7 / 8, 5 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 8], ridge=2.0)
    assert fit.coefficients[0].tolist() == [5 / 16, 0, 1 / 16]


def test_linear_network() -> None:
    """p = 1/4 + x_1/2 + x_2/8 with pixels 1: r = G c for c = (1/2, 1/8).

    c = 5/16 (1, 1) + 3/16 (1, -1); ridge 1 shrinks these by SUM / (SUM + 1) = 0.20079 and A / (A + 1) = 0.33486:
    0.062747 +- 0.062786. (That lime's own ridge turns the smaller effect's sign is how lime is.)
    """
    result = explain(Affine([1 / 2, 1 / 8], 1 / 4), [1, 1])
    common, difference = 5 / 16 * SUM / (SUM + 1), 3 / 16 * A / (A + 1)
    expected = [common + difference, common - difference]
    assert expected == pytest.approx([0.125532, -0.0000395], abs=1e-6)
    assert result.coefficients[0, 0] == pytest.approx(expected, abs=1e-15)
    assert result.coefficients[0, 1] == pytest.approx(np.negative(expected), abs=1e-15)
    # Mean of y is 1/4 + 5/8 m.
    assert result.intercept[0, 0] == pytest.approx(1 / 4 + 5 / 8 * MEAN - 2 * common * MEAN, abs=1e-15)
    assert result.local_prediction[0, 0] == pytest.approx(1 / 4 + 5 / 8 * MEAN + 2 * common * (1 - MEAN), abs=1e-15)
    assert result.probability[0].tolist() == [7 / 8, 1 / 8]
    assert (result.standard_error == 0).all()


def test_linear_network_without_ridge_gives_its_own_weights() -> None:
    result = explain(Affine([1 / 2, 1 / 8], 1 / 4), [1, 1], ridge=1e-9)
    assert result.coefficients[0, 0] == pytest.approx([1 / 2, 1 / 8], abs=1e-8)
    assert result.intercept[0, 0] == pytest.approx(1 / 4, abs=1e-8)
    assert result.score[0] == pytest.approx([1, 1], abs=1e-12)


def test_and_network() -> None:
    """p = z_1 z_2: r_j = 1 - m, along (1, 1): (1 - m) / (SUM + 1) = 0.200588 each; intercept 1 / T - 2 m of that."""
    result = explain(And(), [1, 1])
    each = (1 - MEAN) / (SUM + 1)
    assert each == pytest.approx(0.200588, abs=1e-6)
    assert result.coefficients[0, 0] == pytest.approx([each, each], abs=1e-15)
    assert result.intercept[0, 0] == pytest.approx(1 / TOTAL - 2 * MEAN * each, abs=1e-15)
    assert result.intercept[0, 0] == pytest.approx(0.197715, abs=1e-6)


def test_more_rows_asked_for_than_there_are_shrink_the_penalty() -> None:
    """8 rows asked for, 4 exist: a penalty of 1 on 8 rows is one of 1/2 on 4. (1 - m) / (SUM + 1/2) = 0.334093."""
    result = explain(And(), [1, 1], num_samples=8)
    assert result.num_samples[0] == 4
    assert result.coefficients[0, 0] == pytest.approx([(1 - MEAN) / (SUM + 1 / 2)] * 2, abs=1e-15)
    assert result.coefficients[0, 0, 0] == pytest.approx(0.334093, abs=1e-6)


def test_majority_of_three() -> None:
    """Symmetric, so all coefficients b are equal: (p + 2 q + 1) b = r.

    T = 1 + 3 TWO + 3 ONE + NONE, m = (1 + 2 TWO + ONE) / T, p = m T - T m^2, q = 1 + TWO - T m^2,
    r = (1 + 2 TWO) - m (1 + 3 TWO): b = 0.163734.
    """
    total = 1 + 3 * TWO_OF_3 + 3 * ONE_OF_3 + NONE
    mean = (1 + 2 * TWO_OF_3 + ONE_OF_3) / total
    row_of_gram = (1 + 2 * TWO_OF_3 + ONE_OF_3) + 2 * (1 + TWO_OF_3) - 3 * total * mean**2
    b = (1 + 2 * TWO_OF_3 - mean * (1 + 3 * TWO_OF_3)) / (row_of_gram + 1)
    assert b == pytest.approx(0.163734, abs=1e-6)
    result = explain(Majority(), [1, 1, 1])
    assert result.coefficients[0, 0] == pytest.approx([b, b, b], abs=1e-15)
    assert result.effective_samples[0] == pytest.approx(
        total**2 / (1 + 3 * TWO_OF_3**2 + 3 * ONE_OF_3**2 + NONE**2), rel=1e-14
    )


def test_an_ignored_segment_in_lime() -> None:
    """p = 1/4 + x_1/2. lime's weights correlate the columns, and its ridge then leaks into the ignored one:

    (1/4)(SUM / (SUM + 1) -+ A / (A + 1)) = 0.133912 and -0.033517. It is 0 where there is no ridge.
    """
    model = Affine([1 / 2, 0], 1 / 4)
    leaked = explain(model, [1, 1]).coefficients[0, 0]
    expected = [(SUM / (SUM + 1) + A / (A + 1)) / 4, (SUM / (SUM + 1) - A / (A + 1)) / 4]
    assert leaked == pytest.approx(expected, abs=1e-15)
    assert leaked == pytest.approx([0.133912, -0.033517], abs=1e-6)
    assert explain(model, [1, 1], ridge=1e-9).coefficients[0, 0] == pytest.approx([1 / 2, 0], abs=1e-8)


def test_an_ignored_image_has_no_coefficients() -> None:
    result = explain(Affine([0, 0, 0], 1 / 4), [1, 1, 1])
    assert np.abs(result.coefficients).max() < 1e-15
    assert result.intercept[0] == pytest.approx([1 / 4, 3 / 4], abs=1e-15)


def test_softmax_network_in_fractions() -> None:
    """Logits (x_1 ln 3 + x_2 ln 2, 0), so p = 6/7, 3/4, 2/3, 1/2 for 11, 10, 01, 00.

    A kernel of width 100 weighs all rows 1 but for 5e-5 of it: half of the mean effects, (6/7 + 3/4 - 2/3 - 1/2) / 4
    = 37/336 and (6/7 + 2/3 - 3/4 - 1/2) / 4 = 23/336.
    """
    p = [Fraction(6, 7), Fraction(3, 4), Fraction(2, 3), Fraction(1, 2)]
    assert (p[0] + p[1] - p[2] - p[3]) / 4 == Fraction(37, 336)
    assert (p[0] + p[2] - p[1] - p[3]) / 4 == Fraction(23, 336)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Softmax(1))
    network[1].weight.data = torch.tensor([[math.log(3), math.log(2)], [0, 0]])
    network[1].bias.data.zero_()
    coefficients = explain(network, [1, 1], kernel_width=100).coefficients[0, 0]
    assert coefficients == pytest.approx([37 / 336, 23 / 336], abs=1e-5)
    assert enumerated([float(each) for each in p]).coefficients[0].tolist() == pytest.approx(
        [37 / 336, 23 / 336], abs=1e-15
    )


def test_mean_colours_take_away_what_differs_from_the_mean() -> None:
    """Pixels 0, 1 | 1/4, 3/4 have the mean 1/2 twice; weights -1/4, 1/4 | 1/8, -1/8.

    Showing a segment adds sum of weight (pixel - 1/2): 1/8 + 1/8 = 1/4 and -1/32 - 1/32 = -1/16; hidden, all is 1/2.
    """
    model = Affine([-1 / 4, 1 / 4, 1 / 8, -1 / 8], 1 / 2)
    result = explain(model, [0, 1, 1 / 4, 3 / 4], [0, 0, 1, 1], fill="mean", ridge=1e-9)
    assert result.coefficients[0, 0] == pytest.approx([1 / 4, -1 / 16], abs=1e-8)
    assert result.intercept[0, 0] == pytest.approx(1 / 2, abs=1e-8)


def test_a_constant_takes_away_what_differs_from_it() -> None:
    """Pixels 1, 3/4 before grey 1/2, weights 1/2, 1/4: 1/2 (1 - 1/2) = 1/4 and 1/4 (3/4 - 1/2) = 1/16.

    Hidden, the network sees 1/2 twice: 1/4 + 1/8 = 3/8.
    """
    result = explain(Affine([1 / 2, 1 / 4], 0), [1, 3 / 4], fill=0.5, ridge=1e-9)
    assert result.coefficients[0, 0] == pytest.approx([1 / 4, 1 / 16], abs=1e-8)
    assert result.intercept[0, 0] == pytest.approx(3 / 8, abs=1e-8)


@pytest.mark.parametrize("design", ["iid", "antithetic", "hadamard", "sobol"])
def test_every_design_enumerates_few_segments_alike(design: str) -> None:
    result = explain(Majority(), [1, 1, 1], design=design)
    assert result.coefficients[0, 0] == pytest.approx([0.163734] * 3, abs=1e-6)


@pytest.mark.parametrize("model", [And(), Majority(), Affine([1 / 8] * 5, 1 / 4)], ids=lambda each: type(each).__name__)
def test_symmetric_models_have_equal_coefficients(model: nn.Module) -> None:
    coefficients = explain(model, [1] * 5).coefficients[0]
    assert np.ptp(coefficients, axis=1).max() < 1e-15
    assert coefficients[0] == pytest.approx(-coefficients[1], abs=1e-15)
    assert coefficients[0, 0] > 0.01
