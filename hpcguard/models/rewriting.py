"""Nets rewritten to answer the same more quickly, for images of one size."""

import math
import warnings
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.optimization import fuse

WIDE = 32  # channels from which oneDNN's blocked layout pays
MORE_WEIGHTS = 2  # an unrolled convolution may have so many times the weights


def fitted_to_size(net: nn.Module, example: Tensor) -> GraphModule:
    """The net for images like `example` [n, C, H, W]: batch normalisation folded, convolutions cut to what they see.

    torchvision's ResNets shrink 32 pixels to 2x2 and 1x1 maps, where most of a 3x3 kernel meets padding. Raises
    ValueError for nets that cannot safely be rewritten, and whatever torch.fx raises for those it cannot trace.
    """
    _check_plain(net)
    graph = symbolic_trace(fuse(net))
    for name, (size, out) in _map_sizes(graph, example).items():
        layer = cast(nn.Conv2d, graph.get_submodule(name))
        if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            _cut_taps(layer, size, out)
            if _unrolling_pays(layer, size, out):
                graph.set_submodule(name, Unrolled(layer, size, out))
    return graph


def _map_sizes(graph: GraphModule, example: Tensor) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Height and width of what goes into each convolution and of what comes out."""
    sizes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        sizes[name] = inputs[0].shape[2:], output.shape[2:]

    layers = [(name, layer) for name, layer in graph.named_modules() if type(layer) is nn.Conv2d]
    handles = [layer.register_forward_hook(partial(note, name)) for name, layer in layers]
    with torch.inference_mode():
        graph(example.clone())  # a net may work in place
    for handle in handles:
        handle.remove()
    return sizes


def _check_plain(net: nn.Module) -> None:
    """Refuse what folding would change without showing it on every image: shared layers, hooks."""
    nodes = symbolic_trace(net).graph.nodes
    called = [node.target for node in nodes if node.op == "call_module"]
    shared = {
        name
        for name in called
        if called.count(name) > 1 and next(net.get_submodule(name).parameters(), None) is not None
    }
    shared |= {node.target for node in nodes if node.op == "get_attr" and node.target.rpartition(".")[0] in called}
    if shared:
        raise ValueError(f"used more than once, or outside their layer: {', '.join(sorted(shared))}")
    if any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()):
        raise ValueError("modules with hooks")


class Unrolled(nn.Module):
    """A convolution of a small map as one matrix, every output position seeing every pixel."""

    def __init__(self, layer: nn.Conv2d, size: torch.Size, out: torch.Size) -> None:
        super().__init__()
        self.out = (layer.out_channels, *out)
        weight = layer.weight.detach()
        # Each tap as it lies for each pixel: convolving single pixels copies weights, and exactly so on a CPU.
        pixel = torch.eye(math.prod(size)).view(-1, 1, *size)
        taps = weight.cpu().flatten(0, 1).unsqueeze(1)
        with torch.inference_mode():
            seen = nn.functional.conv2d(pixel, taps, None, layer.stride, layer.padding, layer.dilation)
        seen = seen.view(math.prod(size), layer.out_channels, layer.in_channels, math.prod(out))
        matrix = seen.permute(1, 3, 2, 0).reshape(math.prod(self.out), -1).clone().to(weight.device)
        self.matrix = nn.Linear(matrix.shape[1], len(matrix), bias=layer.bias is not None)
        self.matrix.weight = nn.Parameter(matrix, requires_grad=False)
        if layer.bias is not None:
            self.matrix.bias = nn.Parameter(layer.bias.repeat_interleave(math.prod(out)), requires_grad=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.matrix(maps.flatten(1)).reshape(len(maps), *self.out)


def _unrolling_pays(layer: nn.Conv2d, size: torch.Size, out: torch.Size) -> bool:
    """Fewer products, or as many in a better shape: libraries are slow at convolutions that give a single pixel."""
    taps, seen, given = math.prod(layer.kernel_size), math.prod(size), math.prod(out)
    fewer = seen < taps or (seen == taps and given == 1)
    return layer.groups == 1 and fewer and seen * given <= MORE_WEIGHTS * taps


def _cut_taps(layer: nn.Conv2d, size: torch.Size, out: torch.Size) -> None:
    """Cut the first and last taps of an axis that fall outside the input at every output position."""
    kernel, padding = list(layer.kernel_size), [int(pad) for pad in layer.padding]
    weight = layer.weight
    for axis in (0, 1):
        step, spacing = layer.stride[axis], layer.dilation[axis]
        offsets = [tap * spacing - padding[axis] for tap in range(kernel[axis])]
        seeing = [tap for tap, offset in enumerate(offsets)
                  if any(0 <= offset + step * position < size[axis] for position in range(out[axis]))]  # fmt: skip
        first, count = seeing[0], seeing[-1] + 1 - seeing[0]
        around = padding[axis] - first * spacing
        positions = (size[axis] + 2 * around - (count - 1) * spacing - 1) // step + 1
        if around >= 0 and positions == out[axis]:
            kernel[axis], padding[axis] = count, around
            weight = weight.narrow(2 + axis, first, count)
    layer.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    layer.kernel_size, layer.padding = (kernel[0], kernel[1]), (padding[0], padding[1])


class Blocked(nn.Module):
    """A net whose weights and activations lie in oneDNN's blocked layout, made once; float32 on a CPU.

    Raises ValueError for nets with grouped or narrow convolutions, which are slower so, and for padding with anything
    but zeros. The rule is of the net alone, not of a stopwatch, so that every worker computes the same bits.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
        if not layers or any(layer.groups > 1 or layer.out_channels < WIDE for layer in layers):
            raise ValueError("grouped or narrow convolutions")
        if any(layer.padding_mode != "zeros" for layer in layers):
            raise ValueError("padding with other than zeros")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit
            from torch.utils.mkldnn import to_mkldnn

            self.net = to_mkldnn(net)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to logits [B, K]; an operation without a blocked form raises torch's RuntimeError."""
        return self.net(images.to_mkldnn()).to_dense()
