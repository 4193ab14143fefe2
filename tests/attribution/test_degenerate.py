"""Degenerate input: every case is a defined result, checked against a hand computation, or an error that says what."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import Attribution, LimeConfig, explain_batch
from hpcguard.attribution.sampling import draw_samples
from hpcguard.attribution.segments import grid_segments

Model = Callable[[Tensor], Tensor]
DESIGNS = ("lime", "iid", "antithetic", "hadamard", "sobol")
ID = np.array([7])
NINE = grid_segments(12, 12, 9)[None]


def auto(design: str, min_samples: int = 128) -> LimeConfig:
    return LimeConfig(
        design=design, fill=0.0, num_samples="auto", precision=0.1, tolerance=0.0, min_samples=min_samples
    )


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).random((1, 1, 12, 12), np.float32)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5), nn.Softmax(1))
    return nn.Sequential(*layers).eval()


def brightness(x: Tensor) -> Tensor:
    """(p, 1 - p) with p = mean pixel."""
    p = x.mean((1, 2, 3))
    return torch.stack([p, 1 - p], 1)


def constant(value: float) -> Model:
    return lambda x: torch.full((len(x), 2), value)


def additive(segments: np.ndarray, effects: np.ndarray) -> Model:
    """p = 1/2 + the effects of the segments that are shown, for an image of ones before black; float64."""
    first = torch.from_numpy(np.unique(segments, return_index=True)[1])

    def predict(x: Tensor) -> Tensor:
        p = 0.5 + x[:, 0].flatten(1)[:, first].double() @ torch.from_numpy(effects)
        return torch.stack([p, 1 - p], 1)

    return predict


def weighted_ridge(z: np.ndarray, y: np.ndarray, ridge: float) -> np.ndarray:
    """[1 + S]: intercept and coefficients by lstsq; lime's weights, exp(-8) where nothing is shown."""
    distance = np.where(z.any(1), 1 - np.sqrt(z.mean(1)), 1.0)
    root = np.exp(-4 * distance**2)[:, None]
    penalty = np.sqrt(ridge) * np.insert(np.eye(z.shape[1]), 0, 0.0, axis=1)
    system = np.concatenate([root * np.insert(z.astype(float), 0, 1.0, axis=1), penalty])
    return np.linalg.lstsq(system, np.concatenate([root[:, 0] * y, np.zeros(z.shape[1])]), rcond=None)[0]


def assert_finite(result: Attribution) -> None:
    for name in ("coefficients", "standard_error", "intercept", "score", "local_prediction", "effective_samples"):
        assert np.isfinite(getattr(result, name)).all(), name


@pytest.mark.parametrize("design", DESIGNS)
def test_one_segment(image: np.ndarray, design: str) -> None:
    """Two different rows of weights a (shown), b (hidden), g = a b / (a + b): the coefficient is g / (g + ridge) p."""
    config = LimeConfig(fill=0.0, num_samples=20, design=design)
    result = explain_batch(brightness, image, ID, config, np.array([[0]]), np.zeros((1, 12, 12), int))
    rows = draw_samples(design, 0, 7, 20, 1).rows
    shown, hidden = rows.sum(), (~rows).sum() * math.exp(-8)
    g = shown * hidden / (shown + hidden)
    ridge = 1.0 if design == "lime" else 2 / 20  # lime draws 20 rows, the others have enumerated both
    assert result.num_samples[0] == (20 if design == "lime" else 2)
    assert result.coefficients[0, 0] == pytest.approx([g / (g + ridge) * image.mean()], abs=1e-7)
    assert result.to_lime(0).get_image_and_mask(0)[1].all()
    assert_finite(result)


@pytest.mark.parametrize("num_samples", [40, 300, 512])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1 / 3, 0.1])
def test_a_constant_model_is_explained_perfectly_by_nothing(
    image: np.ndarray, probability: float, num_samples: int
) -> None:
    """scikit-learn's rule for a constant that is met: R^2 is 1. It may not depend on how the constant rounds."""
    config = LimeConfig(design="iid", num_samples=num_samples)
    result = explain_batch(constant(probability), image, ID, config, None, grid_segments(12, 12, 16)[None])
    assert np.abs(result.coefficients).max() < 1e-15
    assert result.standard_error.max() < 1e-15
    assert result.intercept == pytest.approx(np.full((1, 2), probability), abs=1e-7)
    assert result.score.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("probability", [0.5, 1 / 3, 0.1])
def test_auto_spends_no_samples_on_a_constant_model(image: np.ndarray, probability: float) -> None:
    config = auto("iid", 64)
    result = explain_batch(constant(probability), image, ID, config, None, grid_segments(12, 12, 16)[None])
    assert result.num_samples[0] == 64


@pytest.mark.parametrize("fill", ["mean", 0.25])
def test_an_image_of_one_colour(net: nn.Module, fill: str | float) -> None:
    """Hidden by its own colour, nothing changes: no coefficients. Hidden by another, it is an image like any other."""
    flat = np.full((1, 1, 12, 12), 0.75, np.float32)
    result = explain_batch(net, flat, ID, LimeConfig(fill=fill, num_samples=64), None, NINE)
    largest = np.abs(result.coefficients).max()
    assert largest < 1e-8 if fill == "mean" else largest > 1e-5
    assert_finite(result)


def test_rows_that_hide_everything(image: np.ndarray) -> None:
    """Such a row has distance 1 by definition and weight exp(-8), here and in lstsq."""
    rows = np.random.default_rng(1).integers(0, 2, (400, 9)).astype(bool)
    rows[0], rows[1::2] = True, False
    config = LimeConfig(fill=0.9)
    seen: list[Tensor] = []

    def predict(x: Tensor) -> Tensor:
        seen.append(brightness(x) ** 2)
        return seen[-1]

    config = config.model_copy(update={"deduplicate": False})
    result = explain_batch(predict, image, ID, config, np.array([[0]]), NINE, rows[None])
    expected = weighted_ridge(rows, torch.cat(seen)[:, 0].double().numpy(), 1.0)
    assert result.coefficients[0, 0] == pytest.approx(expected[1:], abs=1e-12)
    assert result.intercept[0, 0] == pytest.approx(expected[0], abs=1e-12)
    assert torch.equal(seen[1][0], brightness(torch.full((1, 1, 12, 12), 0.9))[0] ** 2)


def test_rows_that_all_show_everything(image: np.ndarray) -> None:
    result = explain_batch(brightness, image, ID, LimeConfig(), None, NINE, np.ones((1, 30, 9)))
    assert (result.coefficients == 0).all()
    assert result.local_prediction[0] == pytest.approx(result.probability[0], abs=1e-7)
    assert result.effective_samples[0] == 30
    assert_finite(result)


@pytest.mark.parametrize("design", ["lime", "iid", "antithetic"])
@pytest.mark.parametrize("num_samples", [2, 3, 17, 60])
def test_more_segments_than_samples(image: np.ndarray, design: str, num_samples: int) -> None:
    segments = np.arange(144).reshape(1, 12, 12)
    config = LimeConfig(fill=0.0, design=design, num_samples=num_samples, ridge=0.5)
    result = explain_batch(brightness, image, ID, config, np.array([[0]]), segments)
    rows = draw_samples(design, 0, 7, num_samples, 144).rows
    expected = weighted_ridge(rows, (rows * image[0, 0].flatten().astype(np.float64)).mean(1), 0.5)
    assert result.coefficients[0, 0] == pytest.approx(expected[1:], abs=1e-7)
    assert result.intercept[0, 0] == pytest.approx(expected[0], abs=1e-6)
    assert_finite(result)


@pytest.mark.filterwarnings("ignore:.*columns of image")
@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize(
    "settings", [{"num_samples": 2}, {"ridge": 1e-9}, {"kernel_width": 0.01}, {"kernel_width": 100}]
)
def test_extreme_settings_are_finite(
    image: np.ndarray, net: nn.Module, design: str, settings: dict[str, float]
) -> None:
    for segments in (NINE, np.arange(144).reshape(1, 12, 12)):
        config = LimeConfig(**{"num_samples": 50, "design": design, **settings})
        assert_finite(explain_batch(net, image, ID, config, None, segments))


@pytest.mark.parametrize("count", [8, 9, 10, 11])
def test_auto_hides_every_one_of_a_few_segments(count: int) -> None:
    """An additive model leaves no residual, so auto stops at once: by then every segment must have been hidden."""
    segments = np.arange(144).reshape(1, 12, 12) * count // 144
    effects = np.linspace(0.001, 0.03, count)
    config = auto("iid")
    ones = np.ones((1, 1, 12, 12), np.float32)
    result = explain_batch(additive(segments, effects), ones, ID, config, np.array([[0]]), segments)
    assert result.coefficients[0, 0] == pytest.approx(effects, abs=0.1 * effects.max())


@pytest.mark.parametrize("count", [50, 100])
@pytest.mark.parametrize("design", DESIGNS)
def test_auto_stops_at_rows_that_tell_all_segments_apart(design: str, count: int) -> None:
    """Two segments that are always shown and hidden together share their effects, and no residual gives that away."""
    segments = np.arange(144).reshape(1, 12, 12) * count // 144
    effects = np.random.default_rng(0).normal(size=count) * 0.004
    config = auto(design)
    ones, ids = np.ones((3, 1, 12, 12), np.float32), np.arange(3)
    maps = np.repeat(segments, 3, axis=0)
    result = explain_batch(additive(segments, effects), ones, ids, config, np.zeros((3, 1), int), maps)
    for each in result.coefficients[:, 0]:
        assert each == pytest.approx(effects, abs=config.precision * np.abs(effects).max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["the image", "a perturbed copy", "a class that is not explained"])
def test_numbers_that_are_not_finite_name_their_images(value: float, where: str) -> None:
    """The second and third of three images have a bright pixel; where it is hidden, or shown, the model fails."""
    images = np.full((3, 1, 8, 8), 0.25, np.float32)
    images[1:, 0, 0, 0] = 1

    def predict(x: Tensor) -> Tensor:
        answer = torch.full((len(x), 3), 1 / 3)
        bright, dimmed = x.amax((1, 2, 3)) == 1, (x.amax((1, 2, 3)) > 0.25) & (x.amax((1, 2, 3)) < 1)
        answer[dimmed if where == "a perturbed copy" else bright, 2 if where.startswith("a class") else 0] = value
        return answer

    maps = np.tile(grid_segments(8, 8, 4), (3, 1, 1))
    for batch_size in (1, 2, 64):
        config = LimeConfig(num_samples=16, batch_size=batch_size)
        with pytest.raises(ValueError, match=r"NaN or infinite probabilities for image ids \[6") as raised:
            explain_batch(predict, images, np.array([5, 6, 9]), config, np.array([[0, 1]] * 3), maps)
        assert "5" not in str(raised.value)


def test_a_pixel_that_is_not_a_number_names_its_image(net: nn.Module, image: np.ndarray) -> None:
    images = np.concatenate([image, image])
    images[1, 0, 3, 3] = np.nan
    with pytest.raises(ValueError, match=r"image ids \[8\]"):
        explain_batch(net, images, np.array([7, 8]), LimeConfig(num_samples=16), None, np.concatenate([NINE, NINE]))


WRONG: dict[str, Model] = {
    "no classes' axis": lambda x: x.mean((1, 2, 3)),
    "three axes": lambda x: x[:, 0],
    "too few rows": lambda x: brightness(x)[:-1],
    "too many rows": lambda x: brightness(x).repeat(2, 1),
    "no classes": lambda x: brightness(x)[:, :0],
    "fewer classes later": lambda x: torch.full((len(x), 5 if len(x) == 1 else 1), 0.2),
    "more classes later": lambda x: torch.full((len(x), 2 if len(x) == 1 else 3), 0.2),
    "an array": lambda x: brightness(x).numpy(),
    "a tuple": lambda x: (brightness(x), x),
}


@pytest.mark.parametrize("answer", WRONG)
def test_a_model_that_does_not_answer_with_rows_of_classes_is_refused(image: np.ndarray, answer: str) -> None:
    with pytest.raises(ValueError, match="predict"):
        explain_batch(WRONG[answer], image, ID, LimeConfig(num_samples=16), None, NINE)


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_any_number_of_classes(image: np.ndarray, classes: int) -> None:
    """Explained by default: the most probable class and the runner-up, if there are two."""

    def predict(x: Tensor) -> Tensor:
        return (brightness(x)[:, :1] * torch.arange(1.0, classes + 1)).softmax(1)

    result = explain_batch(predict, image, ID, LimeConfig(num_samples=16), None, NINE)
    assert result.targets.tolist() == [list(range(classes))[::-1][:2]]
    assert result.to_lime(0).top_labels == result.targets[0].tolist()
    assert result.coefficients.shape == (1, min(classes, 2), 9)
    assert_finite(result)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_the_models_precision_does_not_change_the_results_types(image: np.ndarray, dtype: torch.dtype) -> None:
    reference = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), None, NINE)
    result = explain_batch(lambda x: brightness(x).to(dtype), image, ID, LimeConfig(num_samples=64), None, NINE)
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-6, torch.int64: 1}[dtype]
    assert result.coefficients == pytest.approx(reference.coefficients, abs=tolerance)
    assert result.probability.dtype == np.float32
    assert result.coefficients.dtype == np.float64


def test_a_float64_models_answers_are_used_as_they_are() -> None:
    """Effects of 1e-9 beside a bias of 1/2 are below float32's resolution there (6e-8)."""
    effects = np.linspace(-1e-9, 2e-9, 9)
    config = LimeConfig(fill=0.0, design="iid", num_samples=512, ridge=1e-9)
    ones = np.ones((1, 1, 12, 12), np.float32)
    result = explain_batch(additive(NINE, effects), ones, ID, config, np.array([[0]]), NINE)
    assert result.coefficients[0, 0] == pytest.approx(effects, abs=1e-13)


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray | Tensor]] = {
    "every other pixel": lambda x: np.repeat(np.repeat(x, 2, 2), 2, 3)[:, :, ::2, ::2],
    "float64": lambda x: x.astype(np.float64),
    "transposed axes": lambda x: np.ascontiguousarray(np.moveaxis(x, 1, -1)).transpose(0, 3, 1, 2),
    "tensor": torch.from_numpy,
    "channels_last": lambda x: torch.from_numpy(x).contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: torch.from_numpy(x[:1]).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_images_lie_in_memory_does_not_matter(layout: str) -> None:
    image = np.random.default_rng(0).random((1, 3, 12, 12), np.float32)
    images = np.concatenate([image, image])
    kernel = torch.linspace(-1, 1, 3 * 144).double()

    def predict(x: Tensor) -> Tensor:
        p = torch.sigmoid((x.double() * kernel.view(3, 12, 12)).sum((1, 2, 3)))
        return torch.stack([p, 1 - p], 1)

    maps, ids = np.concatenate([NINE, NINE]), np.array([7, 8])
    config = LimeConfig(num_samples=64)
    expected = explain_batch(predict, images, ids, config, None, maps)
    result = explain_batch(predict, LAYOUTS[layout](images), ids, config, None, maps)
    assert result.coefficients == pytest.approx(expected.coefficients, abs=1e-7)
    assert np.array_equal(result.images, images)


def test_flipped_views_are_refused_with_advice(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="negative"):
        explain_batch(brightness, image[..., ::-1], ID, LimeConfig(num_samples=16), None, NINE)


def test_pixels_from_0_to_255_are_refused(image: np.ndarray) -> None:
    """Taken as they are, the model would see an image 255 times too bright."""
    with pytest.raises((TypeError, ValueError), match="uint8"):
        explain_batch(brightness, (255 * image).astype(np.uint8), ID, LimeConfig(num_samples=16), None, NINE)


def test_a_model_that_works_in_place_harms_nothing(image: np.ndarray) -> None:
    given = image.copy()
    expected = explain_batch(lambda x: brightness(x - 0.1), image, ID, LimeConfig(num_samples=64), None, NINE)
    result = explain_batch(lambda x: brightness(x.sub_(0.1)), given, ID, LimeConfig(num_samples=64), None, NINE)
    assert np.array_equal(given, image)
    assert result.coefficients == pytest.approx(expected.coefficients, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_segment_maps_of_any_type(image: np.ndarray, dtype: type) -> None:
    expected = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), None, NINE)
    result = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), None, NINE.astype(dtype))
    assert np.array_equal(result.coefficients, expected.coefficients)
    assert result.segments.dtype == np.uint16


def test_negative_labels_are_renumbered_in_order(image: np.ndarray) -> None:
    with pytest.warns(UserWarning, match="renumbered"):
        result = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), None, 5 * NINE - 17)
    assert np.array_equal(result.segments, NINE)
    expected = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), None, NINE)
    assert np.array_equal(result.coefficients, expected.coefficients)


def test_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match="0 ids"):
        explain_batch(brightness, np.zeros((0, 1, 12, 12), np.float32), np.zeros(0, int), LimeConfig(), None, NINE[:0])


def test_other_numbers_of_ids_and_images_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="2 ids"):
        explain_batch(brightness, image, np.array([1, 2]), LimeConfig(), None, NINE)


@pytest.mark.parametrize("design", ["iid", "sobol"])
def test_negative_ids_are_refused(image: np.ndarray, design: str) -> None:
    with pytest.raises(ValueError, match="-1"):
        explain_batch(brightness, image, np.array([-1]), LimeConfig(num_samples=16, design=design), None, NINE)


@pytest.mark.parametrize(
    "targets", [np.zeros((1, 0), int), np.array([0]), np.array([[-1]]), np.array([[2]]), np.array([[0], [1]])]
)
def test_targets_that_name_no_class_are_refused(image: np.ndarray, targets: np.ndarray) -> None:
    with pytest.raises(ValueError, match="targets"):
        explain_batch(brightness, image, ID, LimeConfig(num_samples=16), targets, NINE)


@pytest.mark.parametrize(
    "samples",
    [np.ones((1, 0, 9)), np.ones((1, 4, 8)), np.ones((2, 4, 9)), np.ones((4, 9)), np.full((1, 4, 9), 0.5)],
    ids=["no rows", "too few segments", "two images", "two axes", "halves"],
)
def test_samples_that_are_not_rows_of_0_and_1_are_refused(image: np.ndarray, samples: np.ndarray) -> None:
    with pytest.raises(ValueError, match="samples"):
        explain_batch(brightness, image, ID, LimeConfig(), None, NINE, samples)


def test_the_same_target_twice_is_explained_twice(image: np.ndarray) -> None:
    result = explain_batch(brightness, image, ID, LimeConfig(num_samples=64), np.array([[1, 1]]), NINE)
    assert result.coefficients[0, 0] == pytest.approx(result.coefficients[0, 1], rel=1e-9)
