"""model.activation: ReLU modules of any net replaced, everything else as before."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpcguard.config import ModelConfig
from hpcguard.errors import InputError
from hpcguard.models import Normalized, build_model, fastest_layout, for_inference, load_weights, save_weights
from hpcguard.models.activations import swap_relu

POINTS = torch.tensor([-2.0, -0.5, 0.0, 1.5])
FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "softplus": lambda x: math.log1p(math.exp(x)),
}


class ByHand(nn.Module):
    """ReLUs in every place: an attribute used twice, one module under two names, in a sequence, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first = self.second = nn.ReLU()
        self.layers = nn.Sequential(nn.Identity(), nn.ModuleDict({"deep": nn.ReLU(inplace=True)})["deep"])

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x - 1) + self.relu(x) + 2 * self.first(x) + 4 * self.second(-x) + 8 * self.layers(x * 1)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_every_relu_of_a_net_made_by_hand_is_swapped(name: str) -> None:
    net = ByHand()
    swap_relu(net, name, "by hand")
    f = FORMULAS[name]
    expected = [f(x - 1) + f(x) + 2 * f(x) + 4 * f(-x) + 8 * f(x) for x in POINTS.tolist()]
    assert net(POINTS.clone()).tolist() == pytest.approx(expected, abs=1e-5)


def build(name: str, **values: object) -> Normalized:
    torch.manual_seed(0)
    return build_model(ModelConfig(name=name, **values), 10, 3).eval()


@pytest.mark.parametrize("name", ["resnet20-cifar", "resnet18-cifar", "vgg11", "mobilenet_v3_small"])
def test_weights_and_keys_stay(name: str, tmp_path: Path) -> None:
    plain, swapped = build(name), build(name, activation="gelu")
    assert not [module for module in swapped.modules() if isinstance(module, nn.ReLU)]
    save_weights(plain, tmp_path / "plain.safetensors", {})
    load_weights(swapped, tmp_path / "plain.safetensors")
    assert all(torch.equal(plain.state_dict()[key], values) for key, values in swapped.state_dict().items())
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert not torch.allclose(plain(images), swapped(images), rtol=1e-3, atol=0)
        # With its own activation, a net stays what it is.
        load_weights(same := build(name, activation="relu"), tmp_path / "plain.safetensors")
        assert torch.equal(plain(images), same(images))


def test_resnet20_with_another_activation_is_that_function_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same net whose ReLU modules are told to compute GELU."""
    plain, swapped = build("resnet20-cifar"), build("resnet20-cifar", activation="gelu")
    images = torch.rand(2, 3, 32, 32)
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: nn.functional.gelu(x))
    assert torch.equal(plain(images), swapped(images))
    assert sum(isinstance(module, nn.GELU) for module in swapped.modules()) == 1 + 9


@pytest.mark.parametrize("activation", ["gelu", "softplus", "silu"])
@pytest.mark.parametrize("name", ["resnet20-cifar", "resnet18-cifar"])
def test_the_quick_copy_of_a_swapped_net_answers_alike(name: str, activation: str) -> None:
    model = build(name, activation=activation)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    images = torch.rand(4, 3, 32, 32)
    quick = for_inference(model, images[:2])
    with torch.inference_mode():
        expected = model(images)
        assert torch.allclose(quick(fastest_layout(images)), expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    assert not [module for module in quick.modules() if isinstance(module, nn.BatchNorm2d)], "given up"


def test_refused_where_there_is_none() -> None:
    with pytest.raises(InputError, match=r"^model.activation = softplus: small-cnn has no.*options.activation") as no:
        build("small-cnn", activation="softplus")
    assert "\n" not in str(no.value)
    with pytest.raises(InputError, match=r"googlenet has no torch.nn.ReLU module to swap; write null"):
        build("googlenet", activation="gelu")
    swapped = build("small-cnn", activation="softplus", options={"activation": "relu"})
    named = build("small-cnn", options={"activation": "softplus"})
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(swapped(images), named(images))
