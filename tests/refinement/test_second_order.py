"""The cheap double backward equals torch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.models.resnet_cifar import ResNet20
from hpcguard.refinement.losses import margin_gradient, sensitivity_penalty
from hpcguard.refinement.second_order import piecewise_linear


class Odd(nn.Module):
    """Grouped, dilated, strided, rectangular and string-padded convolutions, functional and in-place ReLUs."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 6, (3, 2), stride=(1, 2), padding=(2, 1))
        self.second = nn.Conv2d(6, 6, 3, dilation=2, padding=2, groups=3, bias=False)
        self.third = nn.Conv2d(6, 4, 3, padding="same")
        self.norm, self.plain = nn.BatchNorm2d(6), nn.BatchNorm2d(4, affine=False)
        self.activation = activation
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)), inplace=True)
        x = x + self.activation(self.second(x))
        x = functional.max_pool2d(self.plain(torch.relu(self.third(x))), 2)
        return self.head(x.mean((2, 3)))


class Dynamic(nn.Module):
    """A convolution whose kernel and bias depend on the image, one by keywords, and a ReLU called for its effect."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gate = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Linear(2, 4)
        self.last, self.head = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x.mean((0, 2, 3))).tanh()
        x = functional.conv2d(x, self.kernel * gate[:, None, None, None], gate)
        functional.relu(x, inplace=True)
        x = functional.conv2d(input=x, weight=self.last.weight, bias=self.last.bias)
        return self.head(torch.relu(input=x).mean((2, 3)))


def nets() -> dict[str, nn.Module]:
    return {"relu": Odd(nn.ReLU()), "gelu": Odd(nn.GELU()), "softplus": Odd(nn.Softplus()), "resnet20": ResNet20(3, 2),
            "dynamic": Dynamic()}  # fmt: skip


def gradients(net: nn.Module, x: Tensor, y: Tensor, cheap: bool, beside: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty's gradients, of `beside` cross-entropies on the same pass too."""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    if cheap:
        with piecewise_linear():
            logits = net(leaf)
    else:
        logits = net(leaf)
    over_x = margin_gradient(logits, leaf, y)
    loss = sensitivity_penalty(over_x, x[:, :1] > 0.5) + beside * functional.cross_entropy(logits, y)
    loss.backward()
    found = {name: each.grad.clone() if each.grad is not None else torch.zeros_like(each)
             for name, each in net.named_parameters()}  # fmt: skip
    return over_x.detach(), found


@pytest.mark.parametrize("beside", [0.0, 1.0])
@pytest.mark.parametrize("name", ["relu", "gelu", "softplus", "resnet20", "dynamic"])
def test_the_same_gradients_as_torchs_own(name: str, beside: float) -> None:
    torch.manual_seed(0)
    net = nets()[name].double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.data.uniform_(-1, 1)
                module.bias.data.normal_()
    net.eval()
    x, y = torch.rand(5, 2, 12, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    expected_x, expected = gradients(net, x, y, cheap=False, beside=beside)
    found_x, found = gradients(net, x, y, cheap=True, beside=beside)
    assert torch.allclose(found_x, expected_x, rtol=1e-10, atol=1e-14)
    assert max(float(each.abs().max()) for each in expected.values()) > 1e-8
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max()) or 1.0
        assert float((found[parameter] - gradient).abs().max()) <= 1e-10 * scale, parameter


def test_batch_statistics_are_left_to_torch() -> None:
    torch.manual_seed(0)
    net = Odd(nn.ReLU()).double().train()
    before = net.norm.running_mean.clone()
    x, y = torch.rand(5, 2, 12, 10, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    _, found = gradients(net, x, y, cheap=True, beside=0.0)
    assert not torch.equal(net.norm.running_mean, before)
    _, expected = gradients(net, x, y, cheap=False, beside=0.0)
    assert all(torch.allclose(found[name], each, rtol=1e-8, atol=1e-12) for name, each in expected.items())
