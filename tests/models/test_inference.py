"""for_inference: rewritten nets against the nets themselves."""

import itertools
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.fx import GraphModule

from hpcguard.models import Normalized, fastest_layout, for_inference

SHAPES = [
    shape
    for shape in itertools.product((3, 5), (1, 2), (0, 1, 2), (1, 2), (1, 2, 5))
    if shape[4] + 2 * shape[2] >= (shape[0] - 1) * shape[3] + 1
]  # kernel, stride, padding, dilation, size of the image


def layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def test_taps_that_meet_only_padding_change_nothing() -> None:
    """Small convolutions of every kind: the same answers, many of them cut or unrolled."""
    torch.manual_seed(0)
    fewer = 0
    for kernel, stride, padding, dilation, size in SHAPES:
        layer = nn.Conv2d(3, 4, (kernel, 3), stride, (padding, 3), dilation)
        model = Normalized(nn.Sequential(layer, nn.AdaptiveAvgPool2d(2), nn.Flatten())).eval()
        images = torch.rand(3, 3, size, size + 1)
        quick = for_inference(model, images)
        with torch.inference_mode():
            assert torch.allclose(quick(images), model(images), atol=1e-6)
        assert isinstance(quick.net, GraphModule), "the rewritten net was given up"
        fewer += any(isinstance(each, nn.Linear) or each.kernel_size != layer.kernel_size for each in layers(quick))
    assert fewer >= 10


def test_convolutions_of_a_single_pixel_become_matrices() -> None:
    """3x3 kernels over a 1x1 map: only the middle tap sees anything, and that is a matrix."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Flatten())
    quick = for_inference(Normalized(net).eval(), torch.rand(2, 3, 4, 4))
    convolutions = [layer.kernel_size for layer in quick.modules() if isinstance(layer, nn.Conv2d)]
    matrices = [tuple(layer.weight.shape) for layer in quick.modules() if isinstance(layer, nn.Linear)]
    assert convolutions == [(2, 2)]
    assert matrices == [(8, 4), (8, 8)]


@pytest.mark.parametrize("bias", [True, False])
def test_a_map_smaller_than_the_kernel_is_unrolled(bias: bool) -> None:
    """3x3 kernels over a 2x2 map: 16 products for 36."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1, bias=bias), nn.ReLU(), nn.Conv2d(6, 5, 3, 1, 1, bias=bias))
    model, images = Normalized(nn.Sequential(net, nn.Flatten())).eval(), torch.rand(4, 3, 2, 2)
    quick = for_inference(model, images[:2])
    assert not [layer for layer in quick.modules() if isinstance(layer, nn.Conv2d)]
    with torch.inference_mode():
        assert torch.allclose(quick(fastest_layout(images)), model(images), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "googlenet", "densenet121"])
def test_torchvisions_nets_answer_alike(name: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, num_classes=10, weights=None)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    model = Normalized(net, (0.5,), (0.25,)).eval()
    images = torch.rand(5, 3, 32, 32)
    quick = for_inference(model, images[:2])
    with torch.inference_mode():
        expected = model(images)
        found = quick(fastest_layout(images))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not isinstance(quick.net, type(net)), "given up"
    left = [module for module in quick.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left or name == "densenet121"  # it normalises before it convolves


class Gated(nn.Module):
    """A convolution used twice, the second time only for bright images: folding shows on them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.norm.running_mean.fill_(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = torch.relu(x.mean((1, 2, 3), keepdim=True) - 0.7)
        return (self.norm(self.conv(x)) + bright * self.conv(x)).mean((2, 3))


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, 1, 1)
        self.conv.register_forward_hook(lambda module, inputs, output: output.clamp(max=0.9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.sub_(0.5)).mean((2, 3))


class Borrowed(nn.Module):
    """Reads a convolution's weight beside calling it, and shows it for bright images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32)
        self.norm.running_var.fill_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = torch.relu(x.mean((1, 2, 3)) - 0.7)
        return self.norm(self.conv(x)).mean((2, 3)) + bright[:, None] * self.conv.weight.mean((1, 2, 3))


def reflecting() -> nn.Module:
    """Padding that shows nothing where borders are black."""
    return nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "net", [Gated(), Borrowed(), Clamped(), InPlace(), reflecting()], ids=lambda net: type(net).__name__
)
def test_what_rewriting_would_break_on_other_images(net: nn.Module) -> None:
    """Right on the dark example with a black border, right on bright images that were never shown."""
    dark = torch.zeros(2, 3, 8, 8)
    dark[:, :, 2:6, 2:6] = 0.2
    model, given = Normalized(net).eval(), dark.clone()
    quick = for_inference(model, dark)
    assert torch.equal(dark, given), "the example is the caller's"
    bright = 0.6 + 0.4 * torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(quick(fastest_layout(bright)), model(bright), atol=1e-5)


def test_a_net_that_cannot_be_copied_is_used_as_it_is() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model, images = Normalized(nn.Sequential(layer, nn.Flatten())).eval(), torch.rand(2, 3, 8, 8)
    model(images)  # makes weights that deepcopy refuses
    assert torch.equal(for_inference(model, images)(images), model(images))


def test_another_size_is_refused() -> None:
    quick = for_inference(Normalized(nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), nn.Flatten())), torch.rand(2, 3, 1, 1))
    with pytest.raises(ValueError, match=r"for images of \(3, 1, 1\), not \(3, 8, 8\)"):
        quick(torch.rand(1, 3, 8, 8))


def test_no_semaphores_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are killed when their work is done; what they held would be reported as leaked."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a semaphore")

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    model = Normalized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())).eval()
    assert isinstance(for_inference(model, torch.rand(2, 3, 4, 4)).net, GraphModule)
