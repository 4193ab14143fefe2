"""How much the model's margin reacts to the pixels of each superpixel."""

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.forward import Predict


def segment_sensitivity(
    logits: Predict, images: Tensor, ids: np.ndarray, targets: np.ndarray, segments: np.ndarray, batch_size: int
) -> np.ndarray:
    """Mean |d margin / d x| over the pixels and channels of each segment, float64 [B, S]; NaN past an image's own.

    images: float32 [B, C, H, W] in [0, 1]; segments: [B, H, W], labels 0..d-1; the margin is the logit of targets[:, 0]
    less that of targets[:, 1]. logits must be differentiable, and must look at each image by itself (eval mode).
    Raises ValueError, naming the image ids, where the gradient is not finite.
    """
    labels = torch.as_tensor(np.asarray(targets)[:, :2], dtype=torch.int64, device=images.device)
    gradients = [
        _margin_gradient(logits, images[start : start + batch_size], labels[start : start + batch_size])
        for start in range(0, len(images), batch_size)
    ]
    # Averaged on the host, for a GPU adds in an order of its own, and the same unit is to have the same bytes.
    slopes = torch.cat([gradient.abs().cpu().double().mean(1) for gradient in gradients]).numpy()
    if len(bad := np.asarray(ids)[~np.isfinite(slopes).all((1, 2))]):
        raise ValueError(f"sensitivity: NaN or infinite gradients for image ids {[int(each) for each in bad[:5]]}")
    maps = np.asarray(segments).reshape(len(slopes), -1).astype(np.int64)
    out = np.full((len(maps), int(maps.max()) + 1), np.nan)
    for row, own, slope in zip(out, maps, slopes.reshape(maps.shape), strict=True):
        sizes = np.bincount(own)
        row[: len(sizes)] = np.bincount(own, slope) / sizes
    return out


def _margin_gradient(logits: Predict, images: Tensor, labels: Tensor) -> Tensor:
    # cuDNN's fastest backward convolutions add in any order.
    flags = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.enable_grad(), flags:
        x = images.detach().clone().requires_grad_()
        answers = logits(x).gather(1, labels)
        (gradient,) = torch.autograd.grad((answers[:, 0] - answers[:, 1]).sum(), x)
    return gradient
