"""Input gradients that are cheap to differentiate once more.

torch's own double backward of a ReLU network takes more than half of its time for nothing: it carries zeros back
through the whole forward pass (a ReLU has no curvature), and computes weight gradients of a convolution as a
convolution with a kernel of the size of the map. Within `piecewise_linear()` the same values come from four passes of
a network instead of eight. What is not intercepted (other activations, norms, layers) is torch's own, and right too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

convolution_backward = torch.ops.aten.convolution_backward
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]  # stride, padding, dilation, groups


class piecewise_linear(TorchFunctionMode):
    """Within it, call a network in eval mode on an image, and take the gradient with create_graph=True.

    Float32, and only for that: parameters get their gradients by the second backward pass, not by the first.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        keywords = keywords or {}
        if own := OWN.get(function):
            found = own(*arguments, **keywords)
            if found is not None:
                return found
        return function(*arguments, **keywords)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return _Relu.apply(input, inplace)


def _convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:  # fmt: skip
    computed = weight.grad_fn is not None or (bias is not None and bias.grad_fn is not None)
    if isinstance(padding, str) or input.dim() != 4 or computed:
        return None  # weights that are computed, perhaps from the image, need their gradient in the first pass too
    stride, padding, dilation = ([each] * 2 if isinstance(each, int) else list(each)
                                 for each in (stride, padding, dilation))  # fmt: skip
    return _Convolution.apply(input, weight, bias, (stride, padding, dilation, groups))


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor | None:  # fmt: skip
    """With running statistics it is a scale and a shift of each channel."""
    if training or running_mean is None or running_var is None:
        return None
    scale = (running_var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    shape = (1, -1, *[1] * (input.dim() - 2))
    return torch.addcmul(shift.reshape(shape), input, scale.reshape(shape))


# The parameters of each are named as torch names them, for some call them by name.
OWN: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    torch.conv2d: _convolution,
    functional.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    functional.batch_norm: _batch_norm,
}


class _Relu(torch.autograd.Function):
    """Its slope is a constant to the second backward pass."""

    @staticmethod
    def forward(context: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            context.mark_dirty(x)
        y = x.clamp_min_(0) if inplace else x.clamp_min(0)
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Any, ...]:
        (y,) = context.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y.detach(), 0), None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        context.save_for_backward(x, weight)
        context.geometry, context.biased = geometry, bias is not None
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight = context.saved_tensors
        wanted = context.needs_input_grad
        over_x = over_weight = over_bias = None
        if wanted[0]:
            over_x = _ConvolutionOverInput.apply(gradient, weight, x.detach(), context.geometry)
        # Gradients are recorded in the first backward pass, which asks for x alone, though autograd cannot say so here.
        if not torch.is_grad_enabled():
            if wanted[1]:
                over_weight = _over_weight(gradient, x, weight, context.geometry)
            if context.biased and wanted[2]:
                over_bias = gradient.sum((0, 2, 3))
        return over_x, over_weight, over_bias, None


class _ConvolutionOverInput(torch.autograd.Function):
    """A convolution's gradient over its input, bilinear in what comes from above and in the weights."""

    @staticmethod
    def forward(context: Any, gradient: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        context.save_for_backward(gradient, weight)
        context.geometry = geometry
        stride, padding, dilation, groups = geometry
        return convolution_backward(
            gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )[0]

    @staticmethod
    def backward(context: Any, upper: Tensor) -> tuple[Any, ...]:
        gradient, weight = context.saved_tensors
        over_gradient = torch.conv2d(upper, weight, None, *context.geometry) if context.needs_input_grad[0] else None
        over_weight = None
        if context.needs_input_grad[1]:
            over_weight = _over_weight(gradient, upper, weight, context.geometry)
        return over_gradient, over_weight, None, None


def _over_weight(gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
