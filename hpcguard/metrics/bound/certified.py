"""Upper bounds of the margins' Jacobian over a ball, and the distortion that they certify.

Forward, affine forms bound what goes into every activation (DeepZ, Singh et al. 2018); backward, the gradient is an
affine form as well, multiplied at each activation by the range of its slope (Fast-Lip, Weng et al. 2018, with noise
symbols in the place of intervals). Sound in floating point: see forms.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks.gradient import Norm
from hpcguard.errors import InputError
from hpcguard.metrics.bound.forms import EPS, Form, back_through, plus, relaxed, through
from hpcguard.metrics.bound.grades import Distortion, Group, Split, allowed_changes, check_images
from hpcguard.metrics.bound.network import Step, trace
from hpcguard.metrics.bound.normalisation import normalise, normalise_back
from hpcguard.metrics.bound.radius import diameter, plain_bound, search_radius, stepwise_bound

LARGEST = 20_000  # coordinates of an image: a form holds a row for each of them
FIRST_SHARE = {"linf": 0.1, "l2": 0.03}  # of what the gradient promises: about what is certified for a small ResNet

Ranges = dict[int, Any]
"""Of each activation the lower and upper bounds of what goes into it; of each GroupNorm what `normalise` gives."""


def certified(
    model: nn.Module, x: Tensor, y: Tensor, norm: Norm, flagged: Tensor | None = None, group: Group = "all",
    evaluations: int = 4,
) -> Distortion:  # fmt: skip
    """Distortions below which no change of the group's coordinates changes the answer, proven, on a CPU in float64.

    flagged: bool [B, 1 or C, H, W]. evaluations: radii at which an image's Jacobian is bounded. 0 for images that are
    wrong already. Raises InputError for layers that cannot be bounded, and for NaN or infinite pixels or logits.
    """
    check_images(model, x)
    steps = check_certifiable(model, x.shape[1:])
    allowed = allowed_changes(x, flagged, group)
    inside = allowed_changes(x, flagged, "flagged" if flagged is not None else "all")
    values, splits = np.zeros(len(x)), []
    for index, (image, label) in enumerate(zip(x.detach().cpu().double(), y.tolist(), strict=True)):
        margins = sure_margins(steps, image, label)
        found = _best(steps, image, label, margins, norm, allowed[index], evaluations) if margins.min() > 0 else []
        values[index] = stepwise_bound(margins, [(radius, _lengths(bound, norm)) for radius, bound in found])
        splits.append(_split(margins, found, norm, inside[index]))
    return Distortion("certified", norm, group, values, splits)


def check_certifiable(model: nn.Module, shape: Sequence[int]) -> list[Step]:
    """The model's layers for images of a shape [C, H, W]. Raises InputError for what cannot be bounded."""
    values = math.prod(shape)
    if values > LARGEST:
        raise InputError(
            f"bound: images of {values} values, certified bounds take at most {LARGEST}; "
            "set evaluation.bound.certified to false for the other grades"
        )
    return trace(model, torch.Size(shape))


def sure_margins(steps: list[Step], image: Tensor, label: int) -> np.ndarray:
    """Lower bounds of f_label - f_k for the other classes k, k ascending: the margins less all rounding, [K - 1]."""
    _, logits = activation_ranges(steps, image, 0.0, "linf", torch.zeros_like(image, dtype=torch.bool))
    center, error = logits.center[0], logits.deviation()[0]
    margins = (center[label] - error[label]) - (center + error)
    margins -= 4 * EPS * (center[label].abs() + center.abs())
    return np.delete(margins.numpy(), label)


def _best(
    steps: list[Step], image: Tensor, label: int, margins: np.ndarray, norm: Norm, where: Tensor, evaluations: int
) -> list[tuple[float, Tensor]]:
    """Bounds of the Jacobian [K - 1, C, H, W], zero off `where`, by radius, near the best radius."""
    found: list[tuple[float, Tensor]] = []

    def bound(radius: float, ball: Tensor) -> Tensor:
        ranges, _ = activation_ranges(steps, image, radius, norm, ball)
        return torch.where(where, jacobian_bound(steps, ranges, label), 0.0)

    def constants(radius: float) -> np.ndarray:
        found.append((radius, bound(radius, where)))
        return _lengths(found[-1][1], norm)

    farthest = diameter(norm, image.numel())
    first = plain_bound(margins, _lengths(bound(0.0, torch.zeros_like(where)), norm), farthest)
    search_radius(margins, constants, first, farthest, evaluations, FIRST_SHARE[norm])
    return found


def _lengths(bound: Tensor, norm: Norm) -> np.ndarray:
    """Dual norms of gradients [K - 1, C, H, W], rounded up."""
    flat = bound.flatten(1)
    length = flat.sum(1) if norm == "linf" else flat.square().sum(1).sqrt()
    return (length * (1 + (flat.shape[1] + 4) * EPS)).numpy()


def _split(margins: np.ndarray, found: list[tuple[float, Tensor]], norm: Norm, inside: Tensor) -> Split | None:
    """The constants over flagged coordinates and over the rest, at the radius that is best for both together."""
    if not found:
        return None
    radius, bound = max(found, key=lambda each: plain_bound(margins, _lengths(each[1], norm), each[0]))
    return Split(
        norm,
        margins,
        radius,
        _lengths(torch.where(inside, bound, 0.0), norm),
        _lengths(torch.where(inside, 0.0, bound), norm),
    )


def activation_ranges(
    steps: list[Step], image: Tensor, radius: float, norm: Norm, where: Tensor
) -> tuple[Ranges, Form]:
    """Lower and upper bounds [1, ...] of what goes into each activation, by step, for images of the ball; the logits.

    image: float64 [C, H, W]; where: bool [C, H, W], the coordinates that may change.
    """
    places = where.flatten().nonzero()[:, 0]
    ball = torch.zeros(len(places), image.numel(), dtype=torch.float64)
    ball[torch.arange(len(places)), places] = 1
    center = image[None]
    forms = {
        0: Form(
            center, ball.view(-1, *image.shape), ball.new_zeros(0, *image.shape), center.new_zeros(1, 0),
            torch.zeros_like(center), radius, norm,
        )
    }  # fmt: skip
    last_use = {each: number for number, step in enumerate(steps) for each in step.inputs}
    ranges: Ranges = {}
    weight = forms[0].weight
    for number, step in enumerate(steps):
        if step.activation is not None:
            form = forms[step.inputs[0]]
            spread = form.deviation() + 4 * EPS * form.center.abs()
            low, high = form.center - spread, form.center + spread
            ranges[number] = low, high
            forms[number] = relaxed(form, *step.activation.relax(low, high), weight)
            weight = forms[number].weight
        elif step.normalisation is not None:
            forms[number], ranges[number] = normalise(step.normalisation, forms[step.inputs[0]], weight)
            weight = forms[number].weight
        elif step.inputs:
            forms[number] = through(step, [forms[each] for each in step.inputs])
        for each in step.inputs:
            if last_use[each] == number:
                forms.pop(each, None)
    return ranges, forms[len(steps) - 1]


def jacobian_bound(steps: list[Step], ranges: Ranges, label: int) -> Tensor:
    """Upper bounds of |d(f_label - f_k) / dx| for each other class k where all activations keep to `ranges`.

    float64 [K - 1, C, H, W], k ascending; infinite where a range is.
    """
    if not all(values.isfinite().all() for known in ranges.values() for values in known):
        return torch.full((steps[-1].shape[0] - 1, *steps[0].shape), torch.inf, dtype=torch.float64)
    classes = steps[-1].shape[0]
    others = [k for k in range(classes) if k != label]
    center = torch.zeros(classes - 1, classes, dtype=torch.float64)
    center[:, label] = 1
    center[range(classes - 1), others] = -1
    empty = torch.zeros(0, classes, dtype=torch.float64)
    seed = Form(center, empty, empty, center.new_zeros(classes - 1, 0), torch.zeros_like(center), 0.0, "linf")
    forms, weight = {len(steps) - 1: seed}, seed.weight
    for number in range(len(steps) - 1, 0, -1):
        if number not in forms:
            continue  # nothing that the logits depend on
        step, form = steps[number], forms.pop(number)
        if step.activation is not None:
            low, high = ranges[number]
            gradients = [_times_slope(form, *step.activation.slopes(low, high), weight)]
            weight = gradients[0].weight
        elif step.normalisation is not None:
            gradients = [normalise_back(step.normalisation, form, ranges[number], weight)]
            weight = gradients[0].weight
        else:
            gradients = back_through(step, [steps[each].shape for each in step.inputs], form)
        for each, gradient in zip(step.inputs, gradients, strict=True):
            forms[each] = plus(forms[each], gradient) if each in forms else gradient
    bound = forms[0].center.abs() * (1 + 4 * EPS) + forms[0].deviation()
    return bound.nan_to_num(nan=torch.inf, posinf=torch.inf)


def _times_slope(form: Form, least: Tensor, most: Tensor, weight: Tensor) -> Form:
    middle = (least + most) / 2
    half = torch.maximum(most - middle, middle - least) * (1 + 4 * EPS)
    return relaxed(form, middle, torch.zeros_like(middle), half * (form.center.abs() + form.deviation()), weight)
