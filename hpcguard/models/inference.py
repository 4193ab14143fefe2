"""The same classifier, quicker to call; and whether it is a classifier at all."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.experimental.optimization import fuse, optimize_for_inference
from torch.fx.passes.shape_prop import ShapeProp

from hpcguard.errors import InputError
from hpcguard.models.normalized import Normalized

TOLERANCE = 1e-4
WIDE = 32  # channels from which oneDNN's blocked layout pays


def for_inference(model: Normalized, example: Tensor) -> Normalized:
    """A copy on the device of `example` [n, C, H, W], in eval mode, rewritten for images of just that size.

    Batch normalisation is folded into convolutions, kernel taps that meet only padding are cut, memory is laid out
    channels last or, on a CPU and where it pays, in oneDNN's blocks. Rewriting somebody's net can be wrong (a
    convolution that is called twice): a rewritten net whose logits differ from the model's on `example` is not used.
    """
    plain = copy.deepcopy(model).to(example.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    with torch.inference_mode():
        expected = plain(example)
    rewritings: list[Callable[[nn.Module, Tensor], nn.Module]] = [_trimmed]
    if example.device.type == "cpu":
        rewritings.insert(0, _blocked)
    for rewrite in rewritings:
        quick = copy.deepcopy(plain)
        try:
            quick.net = rewrite(quick.net, example)
            with torch.inference_mode():
                same = torch.allclose(quick(example), expected, rtol=TOLERANCE, atol=TOLERANCE)
        except Exception:  # tracing and rewriting somebody's net can fail in any way; the net itself still works
            continue
        if same:
            quick.register_forward_pre_hook(partial(_check_size, example.shape[1:]))
            return quick
    return plain


def _check_size(shape: torch.Size, _: nn.Module, arguments: tuple[Tensor]) -> None:
    if arguments[0].shape[1:] != shape:
        raise ValueError(f"this copy is for images of {tuple(shape)}, not {tuple(arguments[0].shape[1:])}")


def _trimmed(net: nn.Module, example: Tensor) -> GraphModule:
    """The net with folded batch normalisation and without kernel taps that only ever meet zero padding.

    torchvision's ResNets shrink 32 pixels to 1 before their last convolutions, where 8 of 9 taps see nothing.
    """
    graph = symbolic_trace(fuse(net))
    with torch.inference_mode():
        ShapeProp(graph).propagate(example)
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in graph.graph.nodes:
        if node.op == "call_module" and called.count(node.target) == 1:
            layer = graph.get_submodule(node.target)
            if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                _cut_taps(layer, node.args[0].meta["tensor_meta"].shape[2:], node.meta["tensor_meta"].shape[2:])
    return graph


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


def _blocked(net: nn.Module, example: Tensor) -> nn.Module:
    """The trimmed net with weights and activations in oneDNN's blocked layout. Raises ValueError where that is slower.

    The rule is of the net alone, not of a stopwatch, so that every worker computes the same bits.
    """
    trimmed = _trimmed(net, example)
    convolutions = [layer for layer in trimmed.modules() if isinstance(layer, nn.Conv2d)]
    if not convolutions or any(c.groups > 1 for c in convolutions) or min(c.out_channels for c in convolutions) < WIDE:
        raise ValueError("grouped or narrow convolutions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own use of torch.jit
        blocked = optimize_for_inference(trimmed, {"conv_bn_fuse": False})
    if sum(node.target == "to_mkldnn" for node in cast(GraphModule, blocked).graph.nodes) > 1:
        raise ValueError("operations without a blocked form split the net")
    return blocked


def fastest_layout(images: Tensor) -> Tensor:
    """The images in the memory layout that `for_inference` models want."""
    return images.contiguous(memory_format=torch.channels_last)


def check_answers(model: Normalized, image: Tensor, num_classes: int) -> None:
    """Call the model once, [1, C, H, W]. Raises InputError unless it gives finite logits [1, num_classes]."""
    size = "x".join(map(str, image.shape[1:]))
    try:
        with torch.inference_mode():
            logits = model(image)
    except Exception as error:  # somebody's net can fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"model: cannot look at an image of {size} ({reason}); change data.size or model.name"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"model: gives {found} for one image, the data have {num_classes} classes: [1, {num_classes}]")
    if not logits.isfinite().all():
        raise InputError(
            f"model: gives NaN or infinite logits for an image of {size}; check model.weights and model.std"
        )
