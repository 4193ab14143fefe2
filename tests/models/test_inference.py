"""for_inference: rewritten nets against the nets themselves."""

import itertools

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
    left = [module for module in quick.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left or name == "densenet121"  # it normalises before it convolves


def test_another_size_is_refused() -> None:
    quick = for_inference(Normalized(nn.Sequential(nn.Conv2d(3, 2, 3, 1, 1), nn.Flatten())), torch.rand(2, 3, 1, 1))
    with pytest.raises(ValueError, match=r"for images of \(3, 1, 1\), not \(3, 8, 8\)"):
        quick(torch.rand(1, 3, 8, 8))
