"""Bounds of a Jacobian hold for every image of the ball: against autograd, and by hand."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from operator import mul

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.errors import InputError
from hpcguard.metrics.bound.activations import GELU, RELU, SILU, SOFTPLUS, Activation
from hpcguard.metrics.bound.certified import activation_ranges, jacobian_bound
from hpcguard.metrics.bound.forms import Form
from hpcguard.metrics.bound.network import trace
from hpcguard.metrics.bound.normalisation import normalise_back
from hpcguard.metrics.bound.radius import stepwise_bound
from hpcguard.models import Normalized
from hpcguard.models.resnet_cifar import ResNet20
from hpcguard.models.small_cnn import SmallCNN


class Residual(nn.Module):
    """What torchvision's and our own ResNets are made of, in small."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 1, 2)
        self.act, self.other = activation(), activation()
        self.pool, self.linear = nn.AvgPool2d(2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.left(x)) - self.other(self.right(x))  # noise of two branches
        x = functional.pad(self.pool(x), (0, 1, 1, 0)) * 2 + 0.1
        return 0.3 - self.linear(functional.silu(0.5 * x).mean((2, 3)))


def randomised(net: nn.Module) -> nn.Module:
    """Weights of every sign, and statistics as training would leave them."""
    for name, values in [*net.named_parameters(), *net.named_buffers()]:
        if values.is_floating_point():
            nn.init.uniform_(values, 0.5, 2) if "running_var" in name else nn.init.normal_(values, std=0.4)
    return net.eval()


def nets() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    for activation in (nn.ReLU, nn.GELU, nn.SiLU, nn.Softplus):
        yield activation.__name__, Residual(activation), (2, 6, 6)
    yield "small-cnn", SmallCNN(4, 2, width=3, activation="relu", norm="none"), (2, 8, 8)
    yield "default small-cnn", SmallCNN(4, 2, width=4), (2, 8, 8)
    yield "relu group", SmallCNN(4, 2, width=3, activation="relu"), (2, 8, 8)
    yield "max", nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(12, 3)), (2, 7, 7)
    yield "normalized", Normalized(nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)), (0.5, 0.2), (0.3, 2)), (2, 2, 2)  # fmt: skip  # noqa: E501


def ball(norm: str, shape: tuple[int, ...], where: Tensor, count: int) -> Tensor:
    """Corners and inner points of the unit ball, those of `where`."""
    if norm == "linf":
        points = torch.rand(count, *shape, dtype=torch.float64) * 2 - 1
        points[: count // 2] = points[: count // 2].sign()
        return points * where
    points = torch.randn(count, *shape, dtype=torch.float64) * where
    points[: count // 4] *= torch.rand(count // 4, *shape) < 0.1  # nearly along an axis
    points /= points.flatten(1).norm(dim=1).clamp_min(1e-9).view(-1, 1, 1, 1)
    points[count // 2 :] *= torch.rand(count - count // 2, 1, 1, 1)
    return points


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("name", "net", "shape"), nets(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_gradient_and_no_logit_of_the_ball_lies_outside(
    name: str, net: nn.Module, shape: tuple[int, ...], norm: str
) -> None:
    torch.manual_seed(0)
    model, image = randomised(net).double(), torch.rand(shape, dtype=torch.float64)
    steps = trace(model, torch.Size(shape))
    for radius in (1e-9, 0.02, 0.3):
        for where in (torch.ones(shape, dtype=torch.bool), torch.rand(shape) < 0.3):
            ranges, logits = activation_ranges(steps, image, radius, norm, where)
            bound = jacobian_bound(steps, ranges, label=1)
            x = (image + radius * ball(norm, shape, where, 400)).requires_grad_()
            answer = model(x)
            others = [k for k in range(answer.shape[1]) if k != 1]
            for row, k in enumerate(others):
                (gradient,) = torch.autograd.grad((answer[:, 1] - answer[:, k]).sum(), x, retain_graph=True)
                assert (gradient.abs() <= bound[row]).all()
                if radius == 1e-9:  # not so by being loose
                    assert torch.allclose(bound[row], gradient[-1].abs(), rtol=0.02, atol=1e-3)
            assert ((answer - logits.center).abs() <= logits.deviation()).all()


def test_the_gradient_of_an_unstable_unit_by_hand() -> None:
    """f_0 = 2 relu(x_0 - x_1) + x_0, f_1 = 0: df/dx is in [1, 3] x [-2, 0] where the unit may be on or off."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -1], [1, 0]]))
        net[1].bias.copy_(torch.tensor([0.0, 10]))  # the second unit is on for all images
        net[3].weight.copy_(torch.tensor([[2.0, 1], [0, 0]]))
        net[3].bias.copy_(torch.tensor([-10.0, 0]))
    steps, image = trace(net, torch.Size((1, 1, 2))), torch.tensor([[[0.5, 0.4]]], dtype=torch.float64)
    everywhere = torch.ones(1, 1, 2, dtype=torch.bool)
    expected = {0.04: [3, 2], 0.06: [3, 2], 1.0: [3, 2]}
    for radius, slopes in expected.items():
        ranges, _ = activation_ranges(steps, image, radius, "linf", everywhere)
        assert jacobian_bound(steps, ranges, 0).flatten().tolist() == pytest.approx(slopes, abs=1e-9)
    assert ranges[3][0].flatten()[0].item() == pytest.approx(0.1 - 2.0)
    image = torch.tensor([[[0.4, 0.5]]], dtype=torch.float64)  # off within 0.05, on or off beyond
    for radius, slopes in {0.04: [1, 0], 0.06: [3, 2]}.items():
        ranges, _ = activation_ranges(steps, image, radius, "linf", everywhere)
        assert jacobian_bound(steps, ranges, 0).flatten().tolist() == pytest.approx(slopes, abs=1e-9)


@pytest.mark.parametrize("activation", [RELU, GELU, SILU, SOFTPLUS], ids=lambda each: each.name)
def test_slopes_and_relaxations_hold_on_every_interval(activation: Activation) -> None:
    torch.manual_seed(0)
    low = torch.randn(500, dtype=torch.float64) * 3
    high = low + torch.rand(500, dtype=torch.float64) * torch.tensor([1e-6, 0.1, 1, 6, 30]).repeat(100)
    z = (low + (high - low) * torch.linspace(0, 1, 301, dtype=torch.float64)[:, None]).requires_grad_()
    value = activation.function(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    least, most = activation.slopes(low, high)
    assert (slope >= least).all()
    assert (slope <= most).all()
    line, shift, error = activation.relax(low, high)
    assert ((value - line * z - shift).abs() <= error + 1e-12).all()


def test_our_resnet_and_its_size_is_supported() -> None:
    steps = trace(Normalized(randomised(ResNet20(10))), torch.Size((3, 8, 8)))
    assert steps[-1].shape == (10,)
    assert sum(step.activation is not None for step in steps) == 19


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.flatten(1))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class OfBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0, keepdim=True)).flatten(1)


class Reflected(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, (1, 1, 1, 1), "reflect").flatten(1)


class Changing(nn.Module):
    """Another function each time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.flatten(1) * self.calls


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * x).flatten(1)


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (nn.Sequential(nn.InstanceNorm2d(3), nn.Flatten()), "InstanceNorm2d"),
        (Sigmoid(), "sigmoid"),
        (Branching(), "traced"),
        (Product(), "mul"),
        (OfBatch(), "mean"),
        (Reflected(), "pad"),
        (Changing(), "do not compute"),
        (nn.Sequential(nn.MaxPool2d(2, padding=1), nn.Flatten()), "max-pooling"),
        (nn.Sequential(nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten()), "Conv2d"),
        (nn.Sequential(nn.GELU(approximate="tanh"), nn.Flatten()), "GELU"),
        (nn.Sequential(nn.Conv2d(3, 2, 3)), "logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_bounded_is_refused_by_name(net: nn.Module, named: str) -> None:
    with pytest.raises(InputError, match=named):
        trace(net, torch.Size((3, 8, 8)))


def test_hooks_are_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    net[1].register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        trace(net, torch.Size((1, 2, 2)))


def test_rounding_is_counted_against_exact_arithmetic() -> None:
    """Sums of large terms that cancel: float64 is off by far more than the ball, and the box knows it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    with torch.no_grad():
        net[1].weight.mul_(1e8)
        net[1].weight[:, 15:] = -net[1].weight[:, :15] + torch.randn(20, 15) * 1e-7
    half = torch.rand(1, 1, 15, dtype=torch.float64)
    image = torch.cat([half, half], 2)
    _, logits = activation_ranges(trace(net, torch.Size((1, 1, 30))), image, 0.0, "linf", torch.zeros(1, 1, 30).bool())

    def affine(layer: nn.Module, values: list[Fraction]) -> list[Fraction]:
        weight, bias = ([*map(Fraction, each.flatten().tolist())] for each in (layer.weight, layer.bias))
        wide = len(values)
        return [sum(map(mul, weight[k * wide :], values), start=bias[k]) for k in range(len(bias))]

    hidden = [max(each, Fraction(0)) for each in affine(net[1], [*map(Fraction, image.flatten().tolist())])]
    exact = affine(net[3], hidden)
    center, error = logits.center[0].tolist(), logits.deviation()[0].tolist()
    off = [abs(Fraction(each) - true) for each, true in zip(center, exact, strict=True)]
    assert all(each <= Fraction(most) for each, most in zip(off, error, strict=True))
    assert max(off) > 1e-10  # there is something to count
    assert max(error) < 1e-3


def test_every_error_of_a_group_norm_is_counted() -> None:
    """One layer alone, changes and gradients of a few coordinates: each symbol of its error is needed."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.GroupNorm(1, 4, eps=1e-12, affine=False).double()
    net = nn.Sequential(layer, nn.Flatten())
    special = torch.tensor([[1.0, -1, 0, 0], [2, -1, -1, 0], [3, 1, -2, -2]], dtype=torch.float64)
    images = torch.cat([special, torch.randn(12, 4, dtype=torch.float64, generator=generator)])
    for image, changing in itertools.product(images.view(-1, 4, 1, 1), ([0], [1], [2], [0, 1], [2, 3], [0, 1, 2, 3])):
        where = torch.zeros(4, 1, 1).bool()
        where[changing] = True
        radius = 0.05 * float(image.std())
        corners = torch.tensor([*itertools.product([-1.0, 0, 1], repeat=4)], dtype=torch.float64).view(-1, 4, 1, 1)
        x = (image + radius * corners * where).requires_grad_()
        ranges, after = activation_ranges(trace(net, image.shape), image, radius, "linf", where)
        answer = net(x)
        assert ((answer - after.center).abs() <= after.deviation()).all()
        z = (image - image.mean()).flatten()
        for w in (z, *torch.eye(4).double(), torch.tensor([0.0, 0, 1, -1]).double(), torch.ones(4).double()):
            seed = Form(w.view(1, 4, 1, 1), *(torch.zeros(0, 4, 1, 1).double(),) * 2, torch.zeros(1, 0).double(),
                        torch.zeros(1, 4, 1, 1).double(), 0.0, "linf")  # fmt: skip
            form = normalise_back(layer, seed, ranges[1], seed.weight)
            (gradient,) = torch.autograd.grad((answer * w).sum(), x, retain_graph=True)
            assert ((gradient - form.center).abs() <= form.deviation()).all()


def test_what_overflows_is_unbounded_and_not_certified() -> None:
    """Ranges beyond float64 at the larger radius must not read as units that are off."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        net[1].weight.copy_(torch.randn(4, 4, dtype=torch.float64) * 1e149)
        net[3].weight.copy_(torch.randn(4, 4, dtype=torch.float64) * 1e149)
        net[5].weight.mul_(1e-308)
    image, everywhere = torch.full((1, 2, 2), 0.5, dtype=torch.float64), torch.ones(1, 2, 2).bool()
    ranges, _ = activation_ranges(trace(net, image.shape), image, 1e11, "linf", everywhere)
    assert jacobian_bound(trace(net, image.shape), ranges, 0).isinf().all()
    evaluated = [(1.0, np.array([np.inf])), (0.5, np.array([1.0]))]
    assert stepwise_bound(np.array([9.0]), evaluated) == pytest.approx(0.5)
