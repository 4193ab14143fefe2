"""lime_weights and fit_surrogate against least squares, scikit-learn, the lime package and a brute-force jackknife."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lime import lime_image
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import cosine_distances

from hpcguard.attribution.surrogate import Surrogate, fit_surrogate, lime_weights

# Rows, segments: from one segment to many more segments than rows.
SHAPES = ((2, 1), (5, 3), (40, 12), (200, 50), (64, 64), (30, 80), (3, 200), (900, 120))


def problem(rows: int, segments: int, labels: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """0/1 rows with the image itself first, probabilities of an interacting model, lime's weights by their formula."""
    rng = np.random.default_rng([seed, rows, segments])
    z = rng.integers(0, 2, (rows, segments)).astype(bool)
    z[0] = True
    score = z @ rng.normal(size=(segments, labels)) + np.square(z @ rng.normal(size=(segments, labels)))
    return z, 1 / (1 + np.exp(-score / (1 + segments))), np.exp(-8 * (1 - np.sqrt(z.mean(1))) ** 2)


def fit(
    z: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: float, paired: bool = False, complete: bool = False
) -> Surrogate:
    return fit_surrogate(*map(torch.from_numpy, (z, y, weights)), ridge, paired, complete)


def least_squares(z: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [L, S] and intercepts [L] of the system [sqrt(w) Z, sqrt(w); sqrt(ridge) I, 0] by lstsq (SVD).

    The last column is the intercept; there is no row that pulls it to 0.
    """
    segments = z.shape[1]
    root = np.sqrt(weights)[:, None]
    system = np.block([[root * z, root], [np.sqrt(ridge) * np.eye(segments), np.zeros((segments, 1))]])
    target = np.concatenate([root * y, np.zeros((segments, y.shape[1]))])
    solution = np.linalg.lstsq(system, target, rcond=None)[0]
    return solution[:segments].T, solution[segments]


def normal_equations(z: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: float) -> np.ndarray:
    """[L, 1 + S]: (X' W X + diag(0, ridge, ...)) b = X' W y, the intercept a column of ones."""
    x = np.insert(z.astype(np.float64), 0, 1.0, axis=1)
    penalty = np.diag([0.0] + [ridge] * z.shape[1])
    return np.linalg.solve(x.T @ np.diag(weights) @ x + penalty, x.T @ np.diag(weights) @ y).T


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("labels", [1, 2, 7])
@pytest.mark.parametrize("ridge", [1e-4, 1.0, 300.0])
def test_equals_two_independent_solvers(shape: tuple[int, int], labels: int, ridge: float) -> None:
    z, y, weights = problem(*shape, labels)
    ours = fit(z, y, weights, ridge)
    coefficients, intercept = least_squares(z, y, weights, ridge)
    solved = normal_equations(z, y, weights, ridge)
    assert ours.coefficients.dtype == torch.float64
    assert ours.coefficients.shape == (labels, shape[1])
    assert np.abs(ours.coefficients.numpy() - coefficients).max() <= 1e-10
    assert np.abs(ours.coefficients.numpy() - solved[:, 1:]).max() <= 1e-10
    assert np.abs(ours.intercept.numpy() - intercept).max() <= 1e-9  # a sum over all segments
    assert np.abs(ours.intercept.numpy() - solved[:, 0]).max() <= 1e-9  # a sum over all segments
    prediction = intercept + coefficients.sum(1)  # row 0 shows every segment
    assert ours.local_prediction.numpy() == pytest.approx(prediction, abs=1e-10)


def test_almost_no_ridge_equals_plain_weighted_least_squares() -> None:
    z, y, weights = problem(300, 40)
    plain = normal_equations(z, y, weights, 0.0)
    assert fit(z, y, weights, 1e-9).coefficients.numpy() == pytest.approx(plain[:, 1:], abs=1e-9)


@given(
    st.integers(2, 60),
    st.integers(1, 40),
    st.integers(1, 3),
    st.floats(1e-3, 1e3),
    st.integers(0, 2**32),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rows_and_weights_equal_least_squares(
    rows: int, segments: int, labels: int, ridge: float, seed: int, sparse: bool
) -> None:
    """Any 0/1 rows, row 0 too, any answers, weights of which some are 0."""
    rng = np.random.default_rng(seed)
    z = rng.random((rows, segments)) < rng.choice([0.1, 0.5, 0.9])
    y = rng.normal(size=(rows, labels))
    weights = rng.random(rows) * (rng.random(rows) < 0.5 if sparse else 1.0)
    weights[0] = 1.0
    ours = fit(z, y, weights, ridge)
    coefficients, intercept = least_squares(z, y, weights, ridge)
    assert ours.coefficients.numpy() == pytest.approx(coefficients, abs=1e-9)
    assert ours.intercept.numpy() == pytest.approx(intercept, abs=1e-9)


def clusters_of(rows: int, paired: bool) -> list[np.ndarray]:
    """Row 0 alone; the others alone or two by two; an odd one at the end alone."""
    size = 2 if paired else 1
    return [np.array([0])] + [np.arange(first, min(first + size, rows)) for first in range(1, rows, size)]


def jackknife(
    z: np.ndarray, y: np.ndarray, weights: np.ndarray, ridge: float, paired: bool, refit_means: bool = False
) -> np.ndarray:
    """Shifts of the coefficients [G, L, S]: leave out one of the G clusters after the other and fit the rest again.

    The engine's convention: both weighted means stay those of all rows, and a fit without a cluster has no intercept of
    its own. refit_means: the textbook's jackknife instead, in which every fit has its own intercept.
    """
    zc, yc = z - np.average(z, axis=0, weights=weights), y - np.average(y, axis=0, weights=weights)

    def coefficients(kept: np.ndarray) -> np.ndarray:
        if refit_means:
            return least_squares(z[kept], y[kept], weights[kept], ridge)[0]
        root = np.sqrt(weights[kept])[:, None]
        system = np.concatenate([root * zc[kept], np.sqrt(ridge) * np.eye(z.shape[1])])
        target = np.concatenate([root * yc[kept], np.zeros((z.shape[1], y.shape[1]))])
        return np.linalg.lstsq(system, target, rcond=None)[0].T

    everything = np.arange(len(z))
    clusters = clusters_of(len(z), paired)
    full = coefficients(everything)
    return np.stack([coefficients(np.setdiff1d(everything, cluster)) - full for cluster in clusters])


def standard_errors(shifts: np.ndarray) -> np.ndarray:
    """Shifts are measured from the fit of all rows, and their squares are summed with the factor (G - 1) / G."""
    return np.sqrt(np.square(shifts).sum(0) * (len(shifts) - 1) / len(shifts))


def half_intervals(shifts: np.ndarray) -> np.ndarray:
    """Student's t with Satterthwaite's degrees of freedom, 2 m^2 / v for a sum m of squares of estimated variance v."""
    squares = np.square(shifts)
    freedom = 2 * squares.sum(0) ** 2 / (len(shifts) * squares.var(0))
    return standard_errors(shifts) * stats.t.ppf(0.975, np.clip(freedom, 1, len(shifts)))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (12, 3), (13, 3), (60, 10), (61, 10), (128, 26), (24, 40)], ids=str)
@pytest.mark.parametrize("ridge", [0.05, 1.0, 20.0])
def test_standard_errors_and_intervals_are_the_jackknifes(shape: tuple[int, int], ridge: float, paired: bool) -> None:
    z, y, weights = problem(*shape)
    if paired:
        z[2::2] = ~z[1 : len(z) - 1 : 2]
        weights = np.exp(-8 * (1 - np.sqrt(z.mean(1))) ** 2)
    ours = fit(z, y, weights, ridge, paired)
    shifts = jackknife(z, y, weights, ridge, paired)
    expected = standard_errors(shifts)
    assert ours.standard_error.numpy() == pytest.approx(expected, rel=1e-7, abs=1e-12)
    if len(z) > 3:  # with fewer all squares may be equal, and their variance rounding
        assert expected.max() > 1e-4
        assert ours.interval.numpy() == pytest.approx(half_intervals(shifts), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("paired", [False, True])
def test_fixed_means_change_standard_errors_little(paired: bool) -> None:
    """A jackknife with an intercept for every fit: one or two rows in 400 hardly move the means."""
    z, y, weights = problem(401, 20)
    expected = standard_errors(jackknife(z, y, weights, 1.0, paired, refit_means=True))
    ours = fit(z, y, weights, 1.0, paired).standard_error.numpy()
    assert ours == pytest.approx(expected, rel=0.02)


def test_pairs_give_other_standard_errors_than_single_rows() -> None:
    """Only standard errors: how rows were drawn does not change what is fitted."""
    z, y, weights = problem(101, 12)
    single, paired = fit(z, y, weights, 1.0), fit(z, y, weights, 1.0, paired=True)
    assert torch.equal(single.coefficients, paired.coefficients)
    assert (single.standard_error - paired.standard_error).abs().max() > 1e-4


def test_complete_rows_have_no_standard_error() -> None:
    z, y, weights = problem(64, 6)
    complete, drawn = fit(z, y, weights, 1.0, complete=True), fit(z, y, weights, 1.0)
    assert (complete.standard_error == 0).all()
    assert (complete.interval == 0).all()
    assert (drawn.standard_error > 0).all()
    assert torch.equal(complete.coefficients, drawn.coefficients)


@pytest.mark.parametrize("kernel_width", [0.05, 0.25, 0.75, 10.0])
@pytest.mark.parametrize("segments", [1, 7, 50])
def test_weights_are_the_packages_kernel_on_cosine_distances(segments: int, kernel_width: float) -> None:
    z = np.random.default_rng(segments).integers(0, 2, (40, segments)).astype(bool)
    z[0], z[1] = True, False
    distances = cosine_distances(z, z[:1])[:, 0]
    assert distances[1] == 1  # by definition: nothing is shown
    kernel = lime_image.LimeImageExplainer(kernel_width=kernel_width).base.kernel_fn
    ours = lime_weights(torch.from_numpy(z), kernel_width).numpy()
    assert ours == pytest.approx(kernel(distances), rel=1e-9, abs=1e-300)
    assert ours[0] == 1


def test_weights_by_hand() -> None:
    """4 segments of which 4, 2, 1, 0 are shown: distances 0, 1 - sqrt(1/2), 1/2, 1; weight exp(-8 distance^2)."""
    z = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    expected = [1, np.exp(-8 * (1 - np.sqrt(0.5)) ** 2), np.exp(-2), np.exp(-8)]
    assert lime_weights(z, 0.25).numpy() == pytest.approx(expected, rel=1e-14)
    assert lime_weights(z, 0.5).numpy() == pytest.approx(np.power(expected, 0.25), rel=1e-14)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_score_is_scikit_learns(shape: tuple[int, int]) -> None:
    z, y, weights = problem(*shape, labels=3)
    ours = fit(z, y, weights, 0.5)
    for j in range(3):
        ridge = Ridge(alpha=0.5).fit(z, y[:, j], sample_weight=weights)
        assert float(ours.score[j]) == pytest.approx(ridge.score(z, y[:, j], sample_weight=weights), abs=1e-10)
        assert float(ours.intercept[j]) == pytest.approx(ridge.intercept_, abs=1e-10)


def test_effective_samples() -> None:
    """(sum w)^2 / sum w^2: all rows when they weigh the same, about one when row 0 is alone near the image."""
    z, y, weights = problem(150, 20)
    assert fit(z, y, weights, 1.0).effective_samples == pytest.approx(sum(weights) ** 2 / sum(weights**2), rel=1e-12)
    assert fit(z, y, np.full(150, 0.3), 1.0).effective_samples == pytest.approx(150, rel=1e-12)
    assert fit(z, y, np.eye(150)[0], 1.0).effective_samples == pytest.approx(1, rel=1e-12)


@given(st.integers(0, 2**32), st.booleans())
@settings(max_examples=20, deadline=None, derandomize=True)
def test_segments_and_labels_are_interchangeable(seed: int, paired: bool) -> None:
    """Another order of segments or labels gives the same numbers in that order; a constant moves only intercepts."""
    z, y, weights = problem(51, 14, 4, seed)
    rng = np.random.default_rng(seed)
    segments, labels = rng.permutation(14), rng.permutation(4)
    first = fit(z, y, weights, 1.0, paired)
    second = fit(z[:, segments].copy(), y[:, labels] + 3.0, weights, 1.0, paired)
    for name in ("coefficients", "standard_error", "interval"):
        expected = getattr(first, name).numpy()[labels][:, segments]
        assert getattr(second, name).numpy() == pytest.approx(expected, abs=1e-10)
    assert second.intercept.numpy() == pytest.approx(first.intercept.numpy()[labels] + 3.0, abs=1e-10)
    assert second.score.numpy() == pytest.approx(first.score.numpy()[labels], abs=1e-8)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("count", [64, 65, 100])
def test_stretches_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, paired: bool, count: int) -> None:
    """Many rows are summed a stretch at a time, so that no float64 copy of them all is made."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.rand(count, 9, generator=generator) > 0.5
    answers = torch.rand(count, 2, generator=generator)
    weights = lime_weights(rows, 0.25)
    whole = fit_surrogate(rows, answers, weights, 1.0, paired)
    monkeypatch.setattr("hpcguard.attribution.surrogate.STRETCH", 16)
    parts = fit_surrogate(rows, answers, weights, 1.0, paired)
    for name in ("coefficients", "standard_error", "interval", "intercept", "score", "local_prediction"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-13), name
