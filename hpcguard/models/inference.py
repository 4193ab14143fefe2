"""The same classifier, quicker to call; and whether it is a classifier at all."""

import copy
import io
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial

import torch
from torch import Tensor, nn

from hpcguard.errors import InputError
from hpcguard.models.normalized import Normalized
from hpcguard.models.rewriting import Blocked, fitted_to_size

TOLERANCE = 1e-4


def for_inference(model: Normalized, example: Tensor) -> Normalized:
    """A copy on the device of `example` [n, C, H, W], in eval mode, rewritten for images of just that size.

    Batch normalisation is folded into convolutions, these are cut to what they see of small maps, memory is laid out
    channels last or, on a CPU and where it pays, in oneDNN's blocks. Rewriting somebody's net can be wrong (a
    convolution that is called twice): a rewritten net whose logits differ from the model's on `example`, noise, black
    or white is not used. A model that cannot be copied is given back as it is.
    """
    try:
        plain = copy.deepcopy(model)
    except RuntimeError:  # such as a net with torch.nn.utils.weight_norm
        return model.to(example.device).eval().requires_grad_(False)
    plain = plain.to(example.device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
    noise = torch.rand(example[:2].shape, generator=torch.Generator().manual_seed(0)).to(example)
    example = torch.cat([example, noise, torch.zeros_like(example[:1]), torch.ones_like(example[:1])])
    with torch.inference_mode():
        expected = plain(example.clone())
    rewritings: list[Callable[[nn.Module, Tensor], nn.Module]] = [fitted_to_size]
    if example.device.type == "cpu":
        rewritings.insert(0, lambda net, images: Blocked(fitted_to_size(net, images)))
    for rewrite in rewritings:
        quick = copy.deepcopy(plain)
        quick.normalizes = bool((quick.mean != 0).any() or (quick.std != 1).any())
        try:
            quick.net = rewrite(quick.net, example)
            with torch.inference_mode(), redirect_stderr(io.StringIO()):  # torch.fx prints what it then raises
                same = torch.allclose(quick(example.clone()), expected, rtol=TOLERANCE, atol=TOLERANCE)
        except Exception:  # tracing and rewriting somebody's net can fail in any way; the net itself still works
            continue
        if same:
            quick.register_forward_pre_hook(partial(_check_size, example.shape[1:]))
            return quick
    return plain


def _check_size(shape: torch.Size, _: nn.Module, arguments: tuple[Tensor]) -> None:
    if arguments[0].shape[1:] != shape:
        raise ValueError(f"this copy is for images of {tuple(shape)}, not {tuple(arguments[0].shape[1:])}")


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


def check_gradient(model: Normalized, image: Tensor) -> None:
    """Raises InputError unless the logits depend differentiably on the image [1, C, H, W]."""
    x = image.clone().requires_grad_()
    try:
        with torch.enable_grad():
            torch.autograd.grad(model(x)[0, 0], x)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"attribution.sensitivity = true: the model has no gradient ({reason}); set attribution.sensitivity=false"
        ) from error
