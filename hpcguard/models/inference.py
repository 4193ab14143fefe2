"""The same classifier, quicker to call; and whether it is a classifier at all."""

import copy

import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse

from hpcguard.errors import InputError
from hpcguard.models.normalized import Normalized

TOLERANCE = 1e-4


def for_inference(model: Normalized, example: Tensor) -> Normalized:
    """A copy in eval mode, channels last, batch normalisation folded into convolutions where that changes nothing.

    Folding rewrites the traced net, and is wrong for some (a convolution that is called twice): on the images of
    `example` its logits must agree with the model's to TOLERANCE, else the copy is left unfolded.
    """
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    quick = copy.deepcopy(plain)
    try:
        quick.net = fuse(quick.net)
        with torch.inference_mode():
            expected, found = plain(example), quick(example)
        agrees = torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    except Exception:  # tracing and rewriting somebody's net can fail in any way; the net itself still works
        agrees = False
    return (quick if agrees else plain).to(memory_format=torch.channels_last)


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
