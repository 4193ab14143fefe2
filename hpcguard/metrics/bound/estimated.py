"""Local Lipschitz constants as maxima over sampled points: an estimate, neither a lower nor an upper bound.

As in CLEVER (Weng et al. 2018) but without its extreme-value fit: the sampled maximum is below the true one, so the
distortion is likely above the true bound.
"""

import copy
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.metrics.bound.grades import Distortion, Group, allowed_changes, check_images
from hpcguard.metrics.bound.radius import diameter, plain_bound, search_radius


def estimated(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, flagged: Tensor | None = None, group: Group = "all",
    split: bool = False, samples: int = 64, evaluations: int = 5, seed: int = 0,
) -> Distortion:  # fmt: skip
    """Estimates of the distortions that no change of the group's coordinates below them changes the answer.

    split: add up maxima over flagged coordinates and over the rest that are taken apart, g / (L_S^q + L_R^q)^(1/q),
    in the place of the maximum of the whole. samples: points of the ball at each radius. Raises InputError for NaN or
    infinite pixels or logits.
    """
    check_images(model, x)
    allowed = allowed_changes(x, flagged, group)
    inside = allowed_changes(x, flagged, "flagged" if flagged is not None else "all")
    precise = copy.deepcopy(model).double().eval()
    values = np.zeros(len(x))
    for index, label in enumerate(y.tolist()):
        image, where = x[index].detach().double(), allowed[index].to(x.device)
        margins = margins_of(precise, image, label)
        if margins.min() <= 0:
            continue
        parts = [where & inside[index].to(x.device), where & ~inside[index].to(x.device)] if split else [where]
        points = _unit_points(samples, where, norm, seed, index)
        constants = partial(_constants, precise, image, label, points, parts, norm)
        farthest = diameter(norm, image.numel())
        first = plain_bound(margins, constants(0.0), farthest)
        found = search_radius(margins, constants, first, farthest, evaluations)
        values[index] = max(plain_bound(margins, each, radius) for radius, each in found)
    return Distortion("estimated", norm, group, values)


def margins_of(precise: nn.Module, image: Tensor, label: int) -> np.ndarray:
    """f_label - f_k for the other classes k, k ascending, float64 [K - 1]."""
    with torch.no_grad():
        logits = precise(image[None])[0].cpu().numpy()
    return np.delete(logits[label] - logits, label)


def _unit_points(samples: int, where: Tensor, norm: Norm, seed: int, index: int) -> Tensor:
    """Points [samples + 1, C, H, W] of the unit ball: its center, half of the rest on its corners or surface."""
    random = np.random.default_rng([seed, index])
    shape = (samples, *where.shape)
    if norm == "linf":
        points = random.uniform(-1, 1, shape)
        points[: samples // 2] = np.sign(points[: samples // 2])
    else:
        points = random.standard_normal(shape) * where.cpu().numpy()
        points /= np.maximum(np.sqrt((points**2).sum((1, 2, 3), keepdims=True)), 1e-300)
        points[samples // 2 :] *= random.uniform(0, 1, (samples - samples // 2, 1, 1, 1))
    rest = torch.from_numpy(points).to(where.device) * where
    return torch.cat([rest.new_zeros(1, *where.shape), rest])


def _constants(
    precise: nn.Module, image: Tensor, label: int, points: Tensor, parts: list[Tensor], norm: Norm, radius: float
) -> np.ndarray:
    """(sum over parts of max over points |grad|_q^q)^(1/q) for each margin, float64 [K - 1]."""
    batch = (image + radius * points).clamp(0, 1).requires_grad_()
    with torch.enable_grad():
        logits = precise(batch)
        columns = [torch.autograd.grad(logits[:, k].sum(), batch, retain_graph=True)[0] for k in range(logits.shape[1])]
    power = 1 if norm == "linf" else 2
    lengths = []
    for k in range(len(columns)):
        size = (columns[label] - columns[k]).abs() ** power
        lengths.append(float(sum((size * part).flatten(1).sum(1).max() for part in parts)) ** (1 / power))
    return np.delete(np.array(lengths), label)
