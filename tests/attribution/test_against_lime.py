"""explain_batch against the lime package on several images, seeds, superpixels, label sets and settings.

The package wants H x W x 3, so a grey image goes to it as three equal channels and to the model as the first of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lime import lime_image
from skimage import data, segmentation, transform
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpcguard.attribution import LimeConfig, explain_batch

Classifier = Callable[[np.ndarray], np.ndarray]
CLASSES = 7


class RecordingExplainer(lime_image.LimeImageExplainer):
    """Keeps the 0/1 rows and the probabilities that the package worked with."""

    def data_labels(self, *args: object, **kwargs: object) -> tuple[np.ndarray, np.ndarray]:
        self.rows, self.answers = super().data_labels(*args, **kwargs)
        return self.rows, self.answers


@dataclass(frozen=True)
class Case:
    image: str
    superpixels: str
    seed: int
    top_labels: int | None = 5
    labels: tuple[int, ...] = (1,)  # the package's default, which top_labels overrides
    fill: float | None = None  # its hide_color; None: mean colours
    kernel_width: float = 0.25
    num_samples: int = 150

    def explain(self, classifier: Classifier) -> tuple[RecordingExplainer, lime_image.ImageExplanation]:
        package = RecordingExplainer(kernel_width=self.kernel_width, random_state=self.seed)
        explanation = package.explain_instance(
            for_lime(picture(self.image)), classifier, labels=self.labels, hide_color=self.fill,
            top_labels=self.top_labels, num_samples=self.num_samples, segmentation_fn=superpixels(self.superpixels),
        )  # fmt: skip
        return package, explanation

    def targets(self, explanation: lime_image.ImageExplanation) -> np.ndarray:
        return np.array([explanation.top_labels if self.top_labels else self.labels])

    @property
    def config(self) -> LimeConfig:
        fill = "mean" if self.fill is None else self.fill
        return LimeConfig(fill=fill, kernel_width=self.kernel_width, deduplicate=False)


CASES = (
    Case("smooth", "slic", 3),
    Case("smooth", "slic", 4, top_labels=None, labels=(2,)),
    Case("smooth", "grid", 11, top_labels=None, labels=(6, 0, 3), fill=0.5),
    Case("smooth", "felzenszwalb", 0, kernel_width=0.5, fill=0.0),
    Case("smooth", "slic", 5, num_samples=12),
    Case("photograph", "slic", 1, kernel_width=0.1),
    Case("large photograph", "quickshift", 2),
    Case("large smooth", "quickshift", 7, top_labels=None, labels=(5, 4, 3, 2, 1, 0), fill=1.0, kernel_width=2.0),
    Case("photograph", "felzenszwalb", 8, top_labels=3, fill=0.3),
    Case("photograph", "grid", 9, num_samples=8),
    Case("digit", "slic", 12),
    Case("digit", "grid", 13, top_labels=None, labels=(4, 1), kernel_width=1.0),
    Case("digit", "felzenszwalb", 14, fill=0.0),
    Case("large digit", "quickshift", 15, top_labels=7, num_samples=400),
    Case("digit", "grid", 16, fill=0.7, num_samples=20),
)


def picture(name: str) -> np.ndarray:
    """float32 [C, H, W] in [0, 1]; the package's own quickshift needs a large one to find more than two segments."""
    if name.endswith("smooth"):
        size = 64 if name == "large smooth" else 32
        noise = torch.rand(3, size, size, generator=torch.Generator().manual_seed(1))
        smooth = nn.functional.avg_pool2d(noise, 5, 1, 2)
        return ((smooth - smooth.min()) / (smooth.max() - smooth.min())).numpy()
    if name.endswith("photograph"):
        pixels = data.astronaut() if name == "large photograph" else data.chelsea()[60:240, 120:300]
        shape = (96, 80) if name == "large photograph" else (48, 40)
        return np.moveaxis(transform.resize(pixels, shape, anti_aliasing=True), -1, 0).astype(np.float32)
    index, times = {"digit": (8, 3), "large digit": (8, 8), "other digit": (35, 3)}[name]
    return np.kron(load_digits().images[index] / 16, np.ones((times, times)))[None].astype(np.float32)


def for_lime(image: np.ndarray) -> np.ndarray:
    """float64 [H, W, 3] of the same numbers."""
    return np.repeat(np.moveaxis(image, 0, -1), 3 // len(image), axis=-1).astype(np.float64)


def superpixels(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """float64 [H, W, 3] to labels 0..d-1."""

    def grid(pixels: np.ndarray) -> np.ndarray:
        rows, columns = np.indices(pixels.shape[:2])
        return rows // 5 * (1 + columns.max() // 6) + columns // 6

    return {
        "slic": lambda pixels: segmentation.slic(pixels, n_segments=30, compactness=5, start_label=0),
        "felzenszwalb": lambda pixels: segmentation.felzenszwalb(pixels, scale=10, sigma=0.5, min_size=8),
        "quickshift": lambda pixels: segmentation.quickshift(pixels, kernel_size=4, max_dist=200, ratio=0.2, rng=42),
        "grid": grid,
    }[name]


def network(channels: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(channels, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, CLASSES), Sharpen()).eval()


class Sharpen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (40 * x).softmax(1)


def as_classifier(model: nn.Module, channels: int) -> Classifier:
    """The same float32 network for the package: [n, H, W, 3] to probabilities."""

    def classifier(batch: np.ndarray) -> np.ndarray:
        pixels = np.moveaxis(batch, -1, 1)[:, :channels].astype(np.float32)
        with torch.no_grad():
            return model(torch.from_numpy(pixels)).double().numpy()

    return classifier


def replay(answers: np.ndarray) -> Callable[[Tensor], Tensor]:
    """A model that repeats recorded answers row by row."""
    position = 0

    def predict(batch: Tensor) -> Tensor:
        nonlocal position
        position += len(batch)
        return torch.from_numpy(answers[position - len(batch) : position])

    return predict


def coefficients(explanation: lime_image.ImageExplanation, label: int) -> np.ndarray:
    return np.array([weight for _, weight in sorted(explanation.local_exp[label])])


def assert_same_order(
    ours: lime_image.ImageExplanation, theirs: lime_image.ImageExplanation, label: int, error: float
) -> None:
    """Equal order of segments, but for those whose |coefficients| are closer than two coefficients of that error."""
    magnitude = np.abs(coefficients(theirs, label))
    mine, other = ([segment for segment, _ in each.local_exp[label]] for each in (ours, theirs))
    assert sorted(mine) == sorted(other)
    assert np.abs(magnitude[mine] - magnitude[other]).max() <= 2 * error


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.image}-{case.superpixels}-{case.seed}")
def test_same_rows_and_probabilities_give_the_packages_numbers(case: Case) -> None:
    image = picture(case.image)
    package, theirs = case.explain(as_classifier(network(len(image)), len(image)))
    targets = case.targets(theirs)
    result = explain_batch(
        replay(package.answers), image[None], np.array([0]), case.config, targets, theirs.segments[None],
        package.rows[None],
    )  # fmt: skip
    assert result.num_samples[0] == case.num_samples
    assert np.abs(result.coefficients).max() > 1e-4  # the network does look at this image
    ours = result.to_lime(0)
    for j, label in enumerate(targets[0]):
        expected = coefficients(theirs, label)
        assert np.abs(result.coefficients[0, j] - expected).max() <= 1e-12
        assert result.intercept[0, j] == pytest.approx(theirs.intercept[label], abs=1e-12)
        assert_same_order(ours, theirs, label, 1e-12)
        if case.num_samples > 2 * len(expected):  # with fewer rows, columns coincide and coefficients tie
            assert [segment for segment, _ in ours.local_exp[label]] == [each for each, _ in theirs.local_exp[label]]
    # The package keeps these of the label that it explained last: the most probable, or the last one asked for.
    last = 0 if case.top_labels else -1
    assert result.score[0, last] == pytest.approx(theirs.score, abs=1e-10)
    assert result.local_prediction[0, last] == pytest.approx(theirs.local_pred[0], abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.image}-{case.superpixels}-{case.seed}")
def test_our_own_forward_gives_the_packages_numbers(case: Case) -> None:
    """Perturbed by us, batched by us, in float32; only the 0/1 rows are the package's."""
    image = picture(case.image)
    model = network(len(image))
    package, theirs = case.explain(as_classifier(model, len(image)))
    targets = case.targets(theirs)
    config = case.config.model_copy(update={"batch_size": 37, "deduplicate": True})
    result = explain_batch(
        model, image[None], np.array([0]), config, targets, theirs.segments[None], package.rows[None]
    )
    ours = result.to_lime(0)
    largest = np.abs(result.coefficients).max()
    for j, label in enumerate(targets[0]):
        error = np.abs(result.coefficients[0, j] - coefficients(theirs, label)).max()
        assert error <= min(1e-6, 1e-3 * largest)
        assert result.intercept[0, j] == pytest.approx(theirs.intercept[label], abs=1e-6)
        assert result.probability[0, j] == pytest.approx(package.answers[0, label], abs=1e-6)
        assert_same_order(ours, theirs, label, error)


DEFAULTS = (("large smooth", 0, 3), ("large photograph", 6, 1), ("large photograph", 40, 2), ("large digit", 2, 9))


@pytest.fixture(scope="module", params=DEFAULTS, ids=lambda each: f"{each[0]}-{each[1]}")
def by_default(request: pytest.FixtureRequest) -> tuple[lime_image.ImageExplanation, lime_image.ImageExplanation]:
    """(ours, the package's own) with nothing but a seed and an id in common, the package left to its defaults."""
    name, seed, image_id = request.param
    image = picture(name)
    model = network(len(image), seed)
    theirs = lime_image.LimeImageExplainer(random_state=seed + image_id).explain_instance(
        for_lime(image), as_classifier(model, len(image)), top_labels=5, num_samples=250
    )
    result = explain_batch(
        model, image[None], np.array([image_id]), LimeConfig(design="lime", seed=seed, num_samples=250),
        np.array([theirs.top_labels]), superpixels("quickshift")(for_lime(image))[None],
    )  # fmt: skip
    return result.to_lime(0), theirs


def test_the_package_left_to_itself_gives_our_numbers(
    by_default: tuple[lime_image.ImageExplanation, lime_image.ImageExplanation],
) -> None:
    ours, theirs = by_default
    assert np.array_equal(ours.segments, theirs.segments)
    assert theirs.segments.max() >= 4
    assert ours.top_labels == theirs.top_labels
    assert list(ours.local_exp) == ours.top_labels
    for label in theirs.top_labels:
        error = np.abs(coefficients(ours, label) - coefficients(theirs, label)).max()
        assert error <= 1e-6
        assert ours.intercept[label] == pytest.approx(theirs.intercept[label], abs=1e-6)
        assert_same_order(ours, theirs, label, error)
    assert ours.score == pytest.approx(theirs.score, abs=1e-4)
    assert ours.local_pred == pytest.approx(theirs.local_pred, abs=1e-6)


@pytest.mark.parametrize("signs", [{}, {"positive_only": False}, {"positive_only": False, "negative_only": True}])
@pytest.mark.parametrize("hide_rest", [False, True])
@pytest.mark.parametrize("num_features", [1, 5, 1000])
def test_images_and_masks_are_the_packages(
    by_default: tuple[lime_image.ImageExplanation, lime_image.ImageExplanation],
    signs: dict[str, bool],
    hide_rest: bool,
    num_features: int,
) -> None:
    _, theirs = by_default
    for label in theirs.top_labels:
        magnitude = np.sort(np.abs(coefficients(theirs, label)))
        for min_weight in (0.0, magnitude[len(magnitude) // 2 - 1 :][:2].mean(), 2 * magnitude[-1]):
            mine, other = (
                each.get_image_and_mask(
                    label, hide_rest=hide_rest, num_features=num_features, min_weight=min_weight, **signs
                )
                for each in by_default
            )
            assert np.array_equal(mine[0], other[0])
            assert np.array_equal(mine[1], other[1])


def test_images_of_one_batch_are_each_the_packages() -> None:
    """Two images with other numbers of segments share batches; the package sees one at a time."""
    model = network(1, 3)
    images = np.stack([picture("digit"), picture("other digit")])
    maps = np.stack([superpixels("slic")(for_lime(images[0])), superpixels("grid")(for_lime(images[1]))])
    assert maps[0].max() != maps[1].max()
    theirs = [
        lime_image.LimeImageExplainer(random_state=20 + image_id).explain_instance(
            for_lime(image), as_classifier(model, 1), top_labels=4, num_samples=180,
            segmentation_fn=lambda _, labels=labels: labels,
        )
        for image, labels, image_id in zip(images, maps, (6, 3), strict=True)
    ]  # fmt: skip
    config = LimeConfig(design="lime", seed=20, num_samples=180, batch_size=50)
    result = explain_batch(
        model, images, np.array([6, 3]), config, np.array([each.top_labels for each in theirs]), maps
    )
    for i, other in enumerate(theirs):
        for label in other.top_labels:
            assert coefficients(result.to_lime(i), label) == pytest.approx(coefficients(other, label), abs=1e-6)
