"""One unit of images gives the same bytes whatever the model's batch size, and an image the same in any company.

A float32 network on a CPU gives other last bits to another batch shape, which is its own affair. The models here do
arithmetic that does not depend on the batch: a network that looks at one image at a time, and exact integers.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import Attribution, LimeConfig, explain_batch
from hpcguard.attribution.segments import grid_segments

Model = Callable[[Tensor], Tensor]
DESIGNS = ("lime", "iid", "antithetic", "hadamard", "sobol")
IDS = np.array([30, 4, 17, 5])
# Superpixels of the four images: 30, 3 (fewer rows are all there are), 9 and 20.
MAPS = np.stack([np.arange(256).reshape(16, 16) * count // 256 for count in (30, 3, 9, 20)])


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    noise = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return nn.functional.avg_pool2d(noise, 3, 1, 1).numpy()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5), nn.Softmax(1))
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module", params=["one image at a time", "integers"])
def model(request: pytest.FixtureRequest, net: nn.Module) -> Model:
    if request.param == "integers":
        return integers
    return lambda batch: torch.cat([net(row[None].clone()) for row in batch])


def integers(batch: Tensor) -> Tensor:
    """Pixels rounded to 1/255, remainders of integer dot products, probabilities that are multiples of 1/1024."""
    pixels = (batch.flatten(1) * 255).round().long()
    weights = (torch.arange(4 * pixels.shape[1]).view(-1, 4) * 7919 % 31) - 15
    return ((pixels[:, :, None] * weights).sum(1) // 64 % 1024).float() / 1024


def assert_same_bytes(first: Attribution, second: Attribution) -> None:
    for field in dataclasses.fields(Attribution):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name
        assert one.tobytes() == other.tobytes(), field.name


def explained(model: Model, images: np.ndarray, **settings: object) -> Attribution:
    config = LimeConfig(**{"num_samples": 96, "seed": 2, **settings})
    return explain_batch(model, images, IDS[: len(images)], config, segments=MAPS[: len(images)])


@pytest.mark.filterwarnings("ignore:.*columns of image")
@pytest.mark.parametrize("deduplicate", [True, False])
@pytest.mark.parametrize("num_samples", [96, "auto"])
@pytest.mark.parametrize("design", DESIGNS)
def test_the_models_batch_size_changes_no_byte(
    model: Model, images: np.ndarray, design: str, num_samples: int | str, deduplicate: bool
) -> None:
    settings = {
        "design": design, "num_samples": num_samples, "deduplicate": deduplicate,
        "precision": 0.6, "tolerance": 0.0, "min_samples": 32, "max_samples": 128,
    }  # fmt: skip
    first, *others = (explained(model, images, batch_size=size, **settings) for size in (1, 3, 64))
    assert np.abs(first.coefficients[0]).max() > 0
    assert np.isfinite(first.coefficients[0]).all()
    for other in others:
        assert_same_bytes(first, other)


def test_auto_stops_at_different_numbers_of_samples(images: np.ndarray) -> None:
    """What the test above needs in order to say something about it."""
    counts = explained(
        integers,
        images,
        design="iid",
        num_samples="auto",
        precision=0.6,
        tolerance=0.0,
        min_samples=32,
        max_samples=128,
    ).num_samples
    assert len(set(counts.tolist())) > 1


@pytest.mark.filterwarnings("ignore:.*columns of image")
@pytest.mark.parametrize("design", DESIGNS)
def test_evaluating_equal_rows_once_changes_no_byte(model: Model, images: np.ndarray, design: str) -> None:
    """A model without randomness gives equal images equal answers."""
    assert_same_bytes(*(explained(model, images, design=design, deduplicate=each) for each in (True, False)))


@pytest.mark.parametrize("design", ["antithetic", "sobol", "lime"])
def test_a_batched_network_agrees(net: nn.Module, images: np.ndarray, design: str) -> None:
    first, *others = (explained(net, images, design=design, batch_size=size, num_samples=128) for size in (1, 3, 64))
    for other in others:
        assert np.array_equal(first.targets, other.targets)
        for name in ("coefficients", "standard_error", "intercept", "local_prediction", "probability"):
            assert getattr(first, name) == pytest.approx(getattr(other, name), abs=1e-6, nan_ok=True), name


@pytest.mark.filterwarnings("ignore:.*columns of image")
@pytest.mark.parametrize("num_samples", [96, "auto"])
@pytest.mark.parametrize("design", DESIGNS)
def test_an_image_has_the_same_bytes_in_any_company(
    model: Model, images: np.ndarray, design: str, num_samples: int | str
) -> None:
    """Alone, and among images with more and fewer segments, in another order, in other model batches."""
    config = LimeConfig(
        design=design, num_samples=num_samples, batch_size=50,
        precision=0.6, tolerance=0.0, min_samples=32, max_samples=128,
    )  # fmt: skip
    order = np.array([2, 0, 3, 1])
    together = explain_batch(model, images[order], IDS[order], config, segments=MAPS[order])
    for place, i in enumerate(order):
        alone = explain_batch(model, images[[i]], IDS[[i]], config, segments=MAPS[[i]])
        count = int(alone.num_segments[0])
        for field in dataclasses.fields(Attribution):
            one, several = getattr(alone, field.name)[0], getattr(together, field.name)[place]
            if field.name in ("coefficients", "standard_error", "interval"):
                assert np.isnan(several[:, count:]).all()
                several = several[:, :count]
            assert one.tobytes() == several.tobytes(), field.name


@pytest.mark.filterwarnings("ignore:.*columns of image")
@pytest.mark.parametrize("design", DESIGNS)
def test_an_explanation_follows_its_id_and_seed(images: np.ndarray, design: str) -> None:
    """The same image under the same id twice in a unit: equal; under another id or seed: other rows."""
    twice = np.repeat(images[:1], 3, axis=0)
    maps = np.repeat(MAPS[:1], 3, axis=0)
    config = LimeConfig(design=design, num_samples=96)
    result = explain_batch(integers, twice, np.array([8, 8, 9]), config, segments=maps)
    assert result.coefficients[0].tobytes() == result.coefficients[1].tobytes()
    assert np.abs(result.coefficients[0] - result.coefficients[2]).max() > 1e-6
    reseeded = explain_batch(
        integers, twice, np.array([8, 8, 9]), config.model_copy(update={"seed": 50}), segments=maps
    )
    assert np.abs(result.coefficients[0] - reseeded.coefficients[0]).max() > 1e-6


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (9, 31), (64, 64), (225, 224), (512, 512)], ids=str)
def test_images_of_8_to_512_pixels(size: tuple[int, int], channels: int) -> None:
    """A weighted sum of pixels is additive in the four quarters: all 16 rows without a ridge give what each adds."""
    rng = np.random.default_rng([*size, channels])
    images = rng.random((2, channels, *size), np.float32)
    weights = rng.normal(size=(channels, *size)) / (channels * size[0] * size[1])
    weights[:, : size[0] // 2] *= 3
    kernel = torch.from_numpy(weights).flatten()

    def predict(batch: Tensor) -> Tensor:
        p = 0.5 + batch.flatten(1).double() @ kernel
        return torch.stack([p, 1 - p], 1)

    config = LimeConfig(
        segmentation="grid", num_segments=4, num_samples=16, ridge=1e-9, fill=0.0, design="iid", batch_size=5
    )
    result = explain_batch(predict, images, np.array([0, 1]), config, np.array([[0], [0]]))
    quarters = grid_segments(*size, 4)
    assert np.array_equal(result.segments, np.stack([quarters, quarters]))
    for i in range(2):
        expected = [(weights * images[i])[:, quarters == quarter].sum() for quarter in range(4)]
        assert result.coefficients[i, 0] == pytest.approx(expected, abs=1e-6)
    assert np.abs(result.coefficients).max() > 1e-4
    assert result.images.tobytes() == images.tobytes()
