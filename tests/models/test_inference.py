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


def test_taps_that_meet_only_padding_change_nothing() -> None:
    """Small convolutions of every kind: the same answers, many from fewer weights."""
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
        fewer += next(quick.parameters()).numel() < layer.weight.numel()
    assert fewer >= 10


def test_the_dead_taps_of_a_resnet_on_small_images_are_cut() -> None:
    """3x3 kernels over a 1x1 map: only the middle tap sees anything."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Flatten())
    quick = for_inference(Normalized(net).eval(), torch.rand(2, 3, 4, 4))
    kernels = [layer.kernel_size for layer in quick.modules() if isinstance(layer, nn.Conv2d)]
    assert kernels == [(2, 2), (1, 1), (1, 1)]


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
