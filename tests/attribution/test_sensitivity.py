"""Sensitivity of segments: by hand on a linear model, by torch.autograd alone on a small net; as stored beside LIME."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.attribution import explain_batch, segment_sensitivity
from hpcguard.config import Config, LimeConfig, ModelConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.models import Normalized, build_model, check_gradient
from hpcguard.randomness import keyed_generator
from hpcguard.shards import classifier, explain_unit

NAN = np.nan


def test_a_linear_model_by_hand() -> None:
    """Logits of 2 channels of 2x2 pixels; the margin's gradient is a difference of weights, whatever the image."""
    weights = torch.zeros(3, 2, 2, 2)
    weights[0, 0] = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    weights[0, 1] = torch.tensor([[0.0, 4.0], [0.0, -1.0]])
    weights[2, 0, 0, 0] = 6.0

    def logits(x: Tensor) -> Tensor:
        return torch.einsum("bchw,kchw->bk", x, weights)

    segments = np.array([[[0, 0], [1, 2]], [[0, 1], [1, 1]]])
    targets = np.array([[0, 1], [2, 0]])
    images = torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    got = segment_sensitivity(logits, images, np.array([4, 9]), targets, segments, 8)
    # |channel 1| + |channel 2| of the pixels: 1 + 0, 2 + 4, 3 + 0, 0 + 1; for 2 against 0 the first is 5 + 0.
    assert got[0].tolist() == pytest.approx([(1 + 6) / 4, 3 / 2, 1 / 2])
    assert got[1, :2].tolist() == pytest.approx([5 / 2, (6 + 3 + 1) / 6])
    assert np.isnan(got[1, 2])


def small_net() -> nn.Module:
    torch.manual_seed(3)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
    net = nn.Sequential(*layers)
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net.eval()


NET = small_net()
IDS = np.array([5, 3, 11])
TARGETS = np.array([[0, 1], [4, 2], [3, 0]])
IMAGES = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
SEGMENTS = np.stack([np.arange(144).reshape(12, 12) * count // 144 for count in (6, 4, 9)]).astype(np.uint16)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_net_against_autograd_an_image_at_a_time(batch_size: int) -> None:
    got = segment_sensitivity(NET, IMAGES, IDS, TARGETS, SEGMENTS, batch_size)
    for i in range(3):
        x = IMAGES[i : i + 1].clone().requires_grad_()
        logits = NET(x)[0]
        (logits[TARGETS[i, 0]] - logits[TARGETS[i, 1]]).backward()
        assert x.grad is not None
        slope = x.grad[0].abs().numpy()
        count = int(SEGMENTS[i].max()) + 1
        expected = [slope[:, SEGMENTS[i] == k].mean() for k in range(count)]
        assert got[i, :count] == pytest.approx(expected, rel=1e-5)
        assert np.isnan(got[i, count:]).all()


def test_a_gradient_that_is_not_finite_names_its_image() -> None:
    def logits(x: Tensor) -> Tensor:
        return torch.stack([x.sum((1, 2, 3)), torch.sqrt(x[:, 0, 0, 0] - 0.5)], 1)  # infinite slope at a half

    images = torch.full((2, 1, 2, 2), 0.75)
    images[1] = 0.5
    with pytest.raises(ValueError, match=r"gradients for image ids \[7\]"):
        segment_sensitivity(logits, images, np.array([6, 7]), np.array([[0, 1]] * 2), np.zeros((2, 2, 2), int), 4)


def test_a_model_without_gradient_is_refused_in_one_line() -> None:
    class Rounding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.detach().numpy().mean((2, 3)))

    with pytest.raises(InputError, match=r"attribution.sensitivity = true: the model has no gradient .*=false$") as no:
        check_gradient(Normalized(Rounding()), torch.rand(1, 2, 4, 4))
    assert "\n" not in str(no.value)
    check_gradient(Normalized(NET), torch.rand(1, 3, 12, 12))


@pytest.mark.parametrize(("copies", "text"), [(1, "noisy_copies = 1"), (-1, "greater than")])
def test_copies_that_have_no_variance_are_refused(copies: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        LimeConfig(noisy_copies=copies)


@pytest.fixture
def digits(tmp_path: Path) -> Config:
    torch.manual_seed(0)
    model = ModelConfig(options={"width": 4}, mean=(0.5,), std=(0.25,))
    torch.save(build_model(model, 10, 1).net.state_dict(), tmp_path / "net.pth")
    attribution = {"segmentation": "slic", "num_segments": 9, "num_samples": 64, "batch_size": 48}
    values = {"data": {"size": 12}, "model": {**model.model_dump(), "weights": tmp_path / "net.pth"}}
    return Config.model_validate({**values, "attribution": attribution})


def unit_rows(config: Config, ids: np.ndarray, **changes: object) -> dict[str, np.ndarray]:
    config = config.model_copy(update={"attribution": config.attribution.model_copy(update=changes)})
    images, device = load_images(config.data, "train"), torch.device("cpu")
    model = classifier(config, images, config.model.weights, device)
    return explain_unit(model, images.images(ids), images.labels_of(ids), ids, config, device)


def test_what_a_unit_stores(digits: Config) -> None:
    """Sensitivity of the model itself and not of its copy for inference; instability against a loop over copies."""
    images = load_images(digits.data, "train")
    ids = images.ids[:5]
    rows = unit_rows(digits, ids, noisy_copies=3, noise=0.1, seed=4)
    model = build_model(digits.model, 10, 1).eval()
    model.net.load_state_dict(torch.load(digits.model.weights, weights_only=True))
    for i, image_id in enumerate(ids):
        own, targets, count = rows["segments"][i], rows["target"][i], int(rows["num_segments"][i])
        assert targets[0] == images.labels_of([image_id])[0] != targets[1]
        x = torch.from_numpy(images.images([image_id])).requires_grad_()
        logits = model(x)[0]
        (logits[targets[0]] - logits[targets[1]]).backward()
        assert x.grad is not None
        expected = [x.grad[0, 0].abs().numpy()[own == k].mean() for k in range(count)]
        assert rows["sensitivity"][i, :count] == pytest.approx(expected, rel=2.0**-12 + 1e-4)
        noise = keyed_generator("attack", 4, int(image_id)).standard_normal((3, 1, 12, 12), dtype=np.float32)
        config = digits.attribution.model_copy(update={"seed": 4})
        repeats = []
        for each in noise:
            noisy = np.clip(images.images([image_id]) + np.float32(0.1) * each, 0, 1)
            one = explain_batch(lambda x: model(x).softmax(1), noisy, np.array([image_id]), config,
                                targets[None], own[None])  # fmt: skip
            repeats.append(one.coefficients[0, 0])
        assert rows["instability"][i, :count] == pytest.approx(np.var(repeats, axis=0, ddof=1), rel=1e-2, abs=1e-10)
        assert np.max(np.var(repeats, axis=0, ddof=1)) > 1e-7  # or the comparison says nothing
        for name in ("sensitivity", "instability"):
            assert np.isnan(rows[name][i, count:]).all()


def test_an_image_has_the_same_sensitivity_in_any_unit(digits: Config) -> None:
    images = load_images(digits.data, "train")
    together = unit_rows(digits, images.ids[:7])
    alone = unit_rows(digits, images.ids[3:4])
    count = int(alone["num_segments"][0])
    assert alone["sensitivity"][0] == pytest.approx(together["sensitivity"][3, :count], rel=2.0**-11)


def test_what_is_not_computed_is_nan_and_changes_nothing_else(digits: Config) -> None:
    ids = load_images(digits.data, "train").ids[:4]
    without = unit_rows(digits, ids, sensitivity=False)
    assert np.isnan(without["sensitivity"]).all() and np.isnan(without["instability"]).all()
    both = unit_rows(digits, ids, noisy_copies=2)
    assert not np.isnan(both["sensitivity"][:, 0]).any() and not np.isnan(both["instability"][:, 0]).any()
    for name in without.keys() - {"sensitivity", "instability"}:
        assert without[name].tobytes() == both[name].tobytes(), name
