"""Sampling designs: uniform, keyed, paired, the lime package's own stream, and guards."""

import warnings

import numpy as np
import pytest
import torch
from lime import lime_image
from torch import Tensor, nn

from hpcguard.attribution import LimeConfig, explain_batch
from hpcguard.attribution.sampling import Design, draw_samples
from hpcguard.attribution.segments import grid_segments, segment_image

DESIGNS: tuple[Design, ...] = ("iid", "antithetic", "hadamard", "sobol")


@pytest.mark.parametrize("design", DESIGNS)
def test_rows_are_uniform_and_keyed(design: Design) -> None:
    drawn = draw_samples(design, 1, 42, 8192, 24)
    rows = drawn.rows
    assert rows.shape == (8192, 24)
    assert rows[0].all()
    assert rows[1:].mean(0) == pytest.approx(0.5, abs=0.02)
    assert np.abs(np.corrcoef(rows[1:].T) - np.eye(24)).max() < 0.06
    assert np.array_equal(rows, draw_samples(design, 1, 42, 8192, 24).rows)
    assert not np.array_equal(rows, draw_samples(design, 1, 43, 8192, 24).rows)
    assert not np.array_equal(rows, draw_samples(design, 2, 42, 8192, 24).rows)


@pytest.mark.parametrize("design", ["antithetic", "hadamard"])
@pytest.mark.parametrize("count", [128, 129])
def test_pairs_are_complements(design: Design, count: int) -> None:
    drawn = draw_samples(design, 0, 5, count, 20)
    assert drawn.paired
    assert np.array_equal(drawn.rows[1 : count - 1 : 2], ~drawn.rows[2:count:2])
    assert len(drawn.rows) == count


@pytest.mark.parametrize("design", ["iid", "antithetic", "hadamard", "sobol"])
def test_longer_draws_start_with_shorter_ones(design: Design) -> None:
    short, long = (draw_samples(design, 0, 5, count, 20).rows for count in (129, 513))
    assert np.array_equal(short, long[:129])


def test_hadamard_columns_are_orthogonal_in_whole_blocks() -> None:
    signs = draw_samples("hadamard", 3, 7, 1 + 2 * 32, 28).rows[1:] * 2 - 1
    assert np.array_equal(signs.T @ signs, 64 * np.eye(28))
    products = (signs[:, :, None] * signs[:, None, :]).reshape(64, -1)
    assert (signs.T @ products == 0).all()  # folded over: free of all two-factor interactions


@pytest.mark.parametrize("design", DESIGNS)
def test_few_segments_are_enumerated(design: Design) -> None:
    drawn = draw_samples(design, 0, 0, 64, 6)
    assert drawn.complete
    assert drawn.rows[0].all()
    assert len(np.unique(drawn.rows, axis=0)) == len(drawn.rows) == 64
    assert not draw_samples(design, 0, 0, 63, 6).complete


@pytest.mark.parametrize("design", ["hadamard", "sobol"])
def test_coinciding_columns_are_replaced_with_a_warning(design: Design) -> None:
    """Two rows cannot tell thirty segments apart."""
    with pytest.warns(
        UserWarning, match=r"image 9 coincide at 3 samples of 30 segments.*Raise attribution\.num_samples"
    ):
        drawn = draw_samples(design, 0, 9, 3, 30)
    assert drawn.paired


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).eval()


@pytest.mark.parametrize("seed", [3, 11])
@pytest.mark.parametrize("method", ["slic", "grid"])
def test_the_lime_design_is_the_packages_stream(seed: int, method: str) -> None:
    """A new LimeImageExplainer(random_state=seed + id), left to itself: same coefficients, same order."""
    noise = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    image = nn.functional.avg_pool2d(noise, 5, 1, 2).numpy()
    segments = segment_image(image[0], LimeConfig(segmentation=method, num_segments=16))
    model = net().double()

    def classifier(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(np.moveaxis(batch, -1, 1))).softmax(1).numpy()

    theirs = lime_image.LimeImageExplainer(random_state=seed + 4).explain_instance(
        np.moveaxis(image[0], 0, -1).astype(np.float64), classifier, top_labels=5, num_samples=200,
        segmentation_fn=lambda _: segments,
    )  # fmt: skip
    ours = explain_batch(
        lambda x: model(x.double()).softmax(1), image, np.array([4]),
        LimeConfig(design="lime", seed=seed, num_samples=200), np.array([theirs.top_labels]), segments[None],
    ).to_lime(0)  # fmt: skip
    assert ours.top_labels == theirs.top_labels
    for label in theirs.top_labels:
        expected = dict(theirs.local_exp[label])
        assert [segment for segment, _ in ours.local_exp[label]] == [segment for segment, _ in theirs.local_exp[label]]
        for segment, weight in ours.local_exp[label]:
            assert weight == pytest.approx(expected[segment], abs=1e-7)  # its pixels are float64, ours float32
        assert ours.intercept[label] == pytest.approx(theirs.intercept[label], abs=1e-7)


def counting(calls: list[int]) -> object:
    model = net()

    def predict(x: Tensor) -> Tensor:
        calls.append(len(x))
        return model(x).softmax(1)

    return predict


def test_equal_rows_are_evaluated_once_unless_switched_off() -> None:
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    segments = grid_segments(12, 12, 9)[None]
    results = []
    for deduplicate, expected in (
        (True, len(np.unique(draw_samples("lime", 0, 0, 400, 9).rows[1:], axis=0))),
        (False, 399),
    ):
        calls: list[int] = []
        config = LimeConfig(design="lime", num_samples=400, deduplicate=deduplicate, batch_size=64)
        results.append(explain_batch(counting(calls), image, np.array([0]), config, None, segments))
        assert sum(calls) == 1 + expected
        assert max(calls) <= 64
    assert results[0].coefficients == pytest.approx(results[1].coefficients, abs=1e-7)


def test_auto_stops_when_the_intervals_are_narrow_enough() -> None:
    images = nn.functional.avg_pool2d(
        torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(1)), 5, 1, 2
    ).numpy()
    segments = np.tile(grid_segments(20, 20, 25), (3, 1, 1))
    ids = np.array([1, 2, 3])
    for precision, tolerance, most in ((10.0, 0.0, 65), (1e-9, 1.0, 65), (1e-9, 0.0, 512)):  # whole pairs and row 0
        config = LimeConfig(
            num_samples="auto", precision=precision, tolerance=tolerance, min_samples=64, max_samples=512
        )
        result = explain_batch(counting([]), images, ids, config, None, segments)
        assert (result.num_samples == most).all()
    config = LimeConfig(num_samples="auto", precision=0.003, tolerance=1e-5, min_samples=32, max_samples=4096)
    result = explain_batch(counting([]), images, ids, config, None, segments)
    largest = np.abs(result.coefficients).max(2, keepdims=True)
    reached = (result.interval <= 0.003 * largest + 1e-5).all((1, 2))
    assert (reached | (result.num_samples == 4096)).all()
    assert reached.any()


def test_what_is_in_flight_does_not_grow_with_the_samples() -> None:
    image = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    segments = np.tile(grid_segments(12, 12, 16), (2, 1, 1))
    for samples in (100, 2000):
        calls: list[int] = []
        config = LimeConfig(num_samples=samples, batch_size=50, deduplicate=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            explain_batch(counting(calls), image, np.array([0, 1]), config, None, segments)
        assert max(calls) == 50
        assert sum(calls) == 2 * samples


def test_auto_never_asks_twice_for_the_same_row() -> None:
    """Twelve segments, 2048 rows of 4096 possible ones: many come again from one look to the next."""
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    segments = np.arange(144).reshape(1, 12, 12) // 12
    calls: list[int] = []
    config = LimeConfig(num_samples="auto", design="iid", precision=1e-9, tolerance=0.0, min_samples=64)
    result = explain_batch(counting(calls), image, np.array([0]), config, None, segments)
    rows = draw_samples("iid", 0, 0, 2048, int(result.num_segments[0])).rows
    assert result.num_samples[0] == 2048
    assert sum(calls) == 1 + len(np.unique(rows[1:], axis=0))


@pytest.mark.parametrize("design", ["iid", "antithetic"])
def test_columns_that_coincide_by_chance_are_warned_of(design: Design) -> None:
    with pytest.warns(UserWarning, match="cannot be told apart"):
        draw_samples(design, 0, 9, 5, 30)


def test_ones_own_rows_have_the_penalty_asked_for() -> None:
    """... whatever auto would have scaled it to."""
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    segments = grid_segments(12, 12, 16)[None]
    samples = draw_samples("iid", 3, 0, 100, 16).rows[None]
    results = [
        explain_batch(counting([]), image, np.array([0]), LimeConfig(num_samples=number), None, segments, samples)
        for number in (256, "auto")
    ]
    assert np.array_equal(results[0].coefficients, results[1].coefficients)
