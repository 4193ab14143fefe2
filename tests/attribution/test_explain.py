"""explain_batch against the lime package, scikit-learn's Ridge, planted models and hand-made cases."""

import warnings

import numpy as np
import pytest
import torch
from lime import lime_image
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from hpcguard.attribution import Attribution, LimeConfig, explain_batch, true_and_runner_up
from hpcguard.attribution.sampling import draw_samples
from hpcguard.attribution.segments import grid_segments, segment_image

IDS = np.array([5, 9, 11])


def small_net(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(*layers).eval()


def smooth_images(count: int, channels: int = 3, size: int = 32) -> np.ndarray:
    noise = torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return nn.functional.avg_pool2d(noise, 5, 1, 2).numpy()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return small_net()


@pytest.fixture(scope="module")
def explained(net: nn.Module) -> Attribution:
    return explain_batch(lambda x: net(x).softmax(1), smooth_images(3), IDS, LimeConfig(num_samples=200))


def perturb(image: np.ndarray, segments: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Perturbed copies, segment by segment in a plain loop: float32 [N, C, H, W]."""
    copies = []
    for row in rows:
        copy = image.copy()
        for segment in np.flatnonzero(~row):
            inside = segments == segment
            copy[:, inside] = image[:, inside].mean(1, keepdims=True, dtype=np.float64)
        copies.append(copy)
    return np.stack(copies)


def kernel_weights(rows: np.ndarray) -> np.ndarray:
    distance = 1 - np.sqrt(rows.sum(1) / rows.shape[1])
    return np.sqrt(np.exp(-(distance**2) / 0.25**2))


def test_equals_a_plain_loop_with_scikit_learns_ridge(net: nn.Module, explained: Attribution) -> None:
    for i, image_id in enumerate(IDS):
        count = int(explained.num_segments[i])
        rows = draw_samples("hadamard", 0, int(image_id), 200, count).rows
        copies = perturb(explained.images[i], explained.segments[i], rows)
        with torch.no_grad():
            probability = net(torch.from_numpy(copies)).softmax(1).double().numpy()
        for j, target in enumerate(explained.targets[i]):
            y, weights = probability[:, target], kernel_weights(rows)
            ridge = Ridge(alpha=1).fit(rows.astype(float), y, sample_weight=weights)
            assert explained.coefficients[i, j, :count] == pytest.approx(ridge.coef_, abs=1e-6)
            assert explained.intercept[i, j] == pytest.approx(ridge.intercept_, abs=1e-6)
            assert explained.score[i, j] == pytest.approx(ridge.score(rows, y, sample_weight=weights), abs=1e-4)
            assert explained.local_prediction[i, j] == pytest.approx(ridge.predict(np.ones((1, count)))[0], abs=1e-6)


def test_equals_the_lime_package(net: nn.Module) -> None:
    """The package's own segments, rows and probabilities, through its public interface."""
    image = smooth_images(1)[0]
    segments = segment_image(image, LimeConfig())
    seen: dict[str, list[np.ndarray]] = {"probability": []}

    def classifier(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            answer = net(torch.from_numpy(np.moveaxis(batch, -1, 1).astype(np.float32))).softmax(1).double().numpy()
        seen["probability"].append(answer)
        return answer

    package = lime_image.LimeImageExplainer(random_state=3)
    theirs = package.explain_instance(
        np.moveaxis(image, 0, -1).astype(np.float64), classifier, labels=(0, 1, 2), top_labels=None, num_samples=150,
        segmentation_fn=lambda _: segments, random_seed=7,
    )  # fmt: skip
    count = segments.max() + 1
    rows = np.random.RandomState(3).randint(0, 2, 150 * count).reshape(150, count)
    rows[0] = 1
    answers = torch.from_numpy(np.concatenate(seen["probability"]))
    calls = iter([answers[:1], answers[1:]])
    ours = explain_batch(
        lambda _: next(calls), image[None], np.array([0]), LimeConfig(batch_size=1000), np.array([[0, 1, 2]]),
        segments[None], rows[None],
    )  # fmt: skip
    for j in range(3):
        expected = np.array([weight for _, weight in sorted(theirs.local_exp[j])])
        assert np.abs(ours.coefficients[0, j] - expected).max() <= 1e-12
        assert ours.intercept[0, j] == pytest.approx(theirs.intercept[j], abs=1e-12)
    converted = ours.to_lime(0)
    assert [segment for segment, _ in converted.local_exp[1]] == [segment for segment, _ in theirs.local_exp[1]]
    for mine, other in zip(converted.get_image_and_mask(1), theirs.get_image_and_mask(1), strict=True):
        assert mine == pytest.approx(other, abs=1e-7)


def test_a_planted_additive_model_is_recovered() -> None:
    """Probability = sum of what the visible segments add: the surrogate has nothing left to explain."""
    segments = grid_segments(8, 8, 16)
    planted = np.linspace(-0.02, 0.04, 16)
    image = np.zeros((1, 1, 8, 8), np.float32)
    image[0, 0] = 0.5 + 0.4 * (np.indices((8, 8)).sum(0) % 2 * 2 - 1)  # every segment differs from its mean

    def predict(x: Tensor) -> Tensor:
        shown = torch.stack([(x[:, 0][:, segments == s] - 0.5).abs().amax(1) > 0.2 for s in range(16)], 1)
        first = 0.3 + shown.double() @ torch.from_numpy(planted)
        return torch.stack([first, 1 - first], 1)

    config = LimeConfig(num_samples=400, ridge=1e-9)
    result = explain_batch(predict, image, np.array([0]), config, np.array([[0]]), segments[None])
    assert result.coefficients[0, 0] == pytest.approx(planted, abs=1e-8)
    assert result.intercept[0, 0] == pytest.approx(0.3, abs=1e-7)
    assert result.score[0, 0] == pytest.approx(1, abs=1e-9)
    assert result.standard_error[0, 0].max() < 1e-7


def interactions(x: Tensor) -> Tensor:
    """Probabilities with main effects, pairwise and threefold interactions of nine squares' brightness."""
    squares = nn.functional.adaptive_avg_pool2d(x[:, :1], 3).flatten(1).double() - 0.5
    score = squares @ torch.linspace(-2, 3, 9).double() + 60 * squares[:, 0] * squares[:, 4]
    return torch.stack([score, 200 * squares[:, 1] * squares[:, 2] * squares[:, 8], -score], 1).softmax(1)


@pytest.mark.parametrize("design", ["iid", "antithetic", "hadamard"])
def test_intervals_cover_what_many_samples_give(design: str) -> None:
    """95% intervals against all 512 rows: their share that holds the truth, and their width against the real error."""
    image = np.random.default_rng(0).random((1, 1, 12, 12), np.float32)
    image = (image > 0.5).astype(np.float32)
    segments = grid_segments(12, 12, 9)[None]
    config = LimeConfig(fill=0.5, design=design, num_samples=128)
    truth = explain_batch(
        interactions, image, np.array([0]), config.model_copy(update={"num_samples": 512, "ridge": 4.0}), None, segments
    )
    assert truth.num_samples[0] == 512
    assert (truth.standard_error == 0).all()
    draws = [
        explain_batch(
            interactions, image, np.array([0]), config.model_copy(update={"seed": seed}), truth.targets, segments
        )
        for seed in range(60)
    ]
    error = np.array([draw.coefficients[0] - truth.coefficients[0] for draw in draws])
    stated = np.array([draw.standard_error[0] for draw in draws])
    width = np.array([draw.interval[0] for draw in draws])
    assert 0.92 <= (np.abs(error) <= width).mean() <= 0.985
    assert (width >= 1.95 * stated).all()
    assert np.sqrt((stated**2).mean() / (error**2).mean()) == pytest.approx(1.05, abs=0.15)


def test_an_image_is_explained_alike_in_any_company(net: nn.Module, explained: Attribution) -> None:
    alone = explain_batch(
        lambda x: net(x).softmax(1), smooth_images(3)[1:2], IDS[1:2], LimeConfig(num_samples=200, batch_size=7)
    )
    count = int(alone.num_segments[0])
    assert alone.coefficients[0] == pytest.approx(explained.coefficients[1, :, :count], abs=1e-6)
    assert np.isnan(explained.coefficients[1, :, count:]).all()
    assert np.array_equal(alone.segments[0], explained.segments[1])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_any_number_of_channels(channels: int) -> None:
    other = small_net(channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = explain_batch(
            lambda x: other(x).softmax(1), smooth_images(2, channels, 24), IDS[:2], LimeConfig(num_samples=64)
        )
    assert np.isfinite(result.coefficients[0, :, : int(result.num_segments[0])]).all()


def test_constant_model_and_single_segment_are_defined() -> None:
    image = smooth_images(1, size=8)
    constant = explain_batch(lambda x: torch.full((len(x), 3), 1 / 3), image, np.array([0]), LimeConfig(num_samples=40))
    count = int(constant.num_segments[0])
    assert np.abs(constant.coefficients[0, :, :count]).max() < 1e-12
    one = explain_batch(
        lambda x: x.mean((2, 3)).softmax(1), image, np.array([0]), LimeConfig(num_samples=40),
        segments=np.zeros((1, 8, 8), int),
    )  # fmt: skip
    assert np.abs(one.coefficients).max() < 1e-6  # hidden and shown have the same channel means


def test_nan_from_the_model_names_the_image() -> None:
    def predict(x: Tensor) -> Tensor:
        answer = torch.full((len(x), 2), 0.5)
        answer[x.amax((1, 2, 3)) > 0.9] = torch.nan
        return answer

    images = np.full((3, 1, 8, 8), 0.5, np.float32)
    images[1, 0, 0, 0] = 1
    segments = np.tile(grid_segments(8, 8, 4), (3, 1, 1))
    with pytest.raises(ValueError, match=r"NaN or infinite probabilities for image ids \[9\]"):
        explain_batch(predict, images, IDS, LimeConfig(num_samples=8), segments=segments)


def test_segments_with_gaps_are_renumbered_with_a_warning(net: nn.Module) -> None:
    gaps = grid_segments(32, 32, 9)[None] * 3 + 1
    with pytest.warns(UserWarning, match="renumbered"):
        result = explain_batch(
            lambda x: net(x).softmax(1), smooth_images(1), np.array([0]), LimeConfig(num_samples=32), segments=gaps
        )
    assert result.num_segments[0] == 9


def test_true_and_runner_up() -> None:
    probability = torch.tensor([[0.1, 0.7, 0.2], [0.1, 0.7, 0.2]])
    assert true_and_runner_up(probability, torch.tensor([1, 2])).tolist() == [[1, 2], [2, 1]]


def test_wrong_shapes_are_refused(net: nn.Module) -> None:
    images = smooth_images(2)
    config = LimeConfig(num_samples=8)
    with pytest.raises(ValueError, match="expected images"):
        explain_batch(net, images[0], IDS[:1], config)
    with pytest.raises(ValueError, match="targets"):
        explain_batch(net, images, IDS[:2], config, targets=np.array([[0], [9]]))
    with pytest.raises(ValueError, match="row 0 must be all ones"):
        segments = np.tile(grid_segments(32, 32, 4), (2, 1, 1))
        explain_batch(net, images, IDS[:2], config, segments=segments, samples=np.zeros((2, 8, 4)))
    with pytest.raises(ValueError, match="expected the shape"):
        explain_batch(net, images, IDS[:2], config, segments=np.zeros((2, 8, 8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_samples", [200, "auto"])
def test_a_gpu_gives_the_same(net: nn.Module, num_samples: int | str) -> None:
    config = LimeConfig(num_samples=num_samples)
    here = explain_batch(lambda x: net(x).softmax(1), smooth_images(3), IDS, config)
    other = small_net().cuda()
    images = torch.from_numpy(smooth_images(3)).cuda()
    there = explain_batch(lambda x: other(x).softmax(1), images, IDS, config, here.targets, here.segments)
    assert np.array_equal(there.num_samples, here.num_samples)
    assert there.coefficients == pytest.approx(here.coefficients, abs=1e-5, nan_ok=True)
