"""GroupNorm on affine forms: y = weight * u * s + bias, u the values less their group's mean, s = (u'u / n + eps)^-1/2.

Of each group the length |u| is bounded by that of its center and of its deviations, hence s. Forward, the error of s is
one noise symbol a group. Backward, dy/dx = P s (I - z z' / n), with z = u * s and P the subtraction of means, and the
errors of z and s go to the box.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hpcguard.metrics.bound.forms import EPS, Form, applied, padded, relaxed

Normalised = tuple[Tensor, Tensor, Tensor, Tensor]
"""z's center and deviation, and the middle and half the range of s, [1, C, H, W] each."""


def normalise(layer: nn.GroupNorm, form: Form, weight: Tensor) -> tuple[Form, Normalised]:
    """The set of values after the layer, and what `normalise_back` needs. weight: of all noise numbers so far."""
    size = form.center[0].numel() // layer.num_groups
    centred = padded(_centred(layer, form), weight)
    deviation = centred.deviation()
    length, most = (_grouped(layer, each).norm(dim=2, keepdim=True) for each in (centred.center, deviation))
    slack = (size + 8) * EPS
    low, high = (length * (1 - slack) - most * (1 + slack)).clamp(min=0), (length + most) * (1 + slack)
    largest = (low.square() / size + layer.eps).rsqrt() * (1 + 8 * EPS)
    smallest = (high.square() / size + layer.eps).rsqrt() * (1 - 8 * EPS)
    middle, half = _spread(layer, form, (largest + smallest) / 2), _spread(layer, form, (largest - smallest) / 2)
    half = half + 4 * EPS * middle

    scaled = relaxed(centred, middle, torch.zeros_like(middle), torch.zeros_like(centred.box), weight)
    groups = torch.eye(layer.num_groups, dtype=middle.dtype).repeat_interleave(size, 1).view(-1, *form.center.shape[1:])
    scaled = replace(
        scaled,
        rows=torch.cat([scaled.rows, groups * (centred.center * half)]),
        weight=torch.cat([weight, weight.new_ones(1, layer.num_groups)], 1),
        box=scaled.box + deviation * half * (1 + 4 * EPS) + EPS * (centred.center * half).abs(),
    )
    known = scaled.center, scaled.deviation(), middle, half
    out = _weighted(layer, scaled)
    shift = _channels(layer.bias, out.center) if layer.bias is not None else torch.zeros_like(middle)
    center = out.center + shift
    return replace(out, center=center, box=out.box + EPS * (center.abs() + shift.abs())), known


def normalise_back(layer: nn.GroupNorm, form: Form, known: Normalised, weight: Tensor) -> Form:
    """The set of gradients with respect to what goes into the layer, from that with respect to its values."""
    z, error, middle, half = known
    size = z[0].numel() // layer.num_groups

    def mean(values: Tensor) -> Tensor:
        return _grouped(layer, values).mean(2, keepdim=True).expand(-1, -1, size).reshape(values.shape)

    form = _weighted(layer, form)
    most = form.center.abs() + form.deviation()
    moved = applied(
        lambda rows: rows - z * mean(z * rows), lambda rows: rows + z.abs() * mean(z.abs() * rows), size + 8, [form]
    )
    lost = z.abs() * mean(error * most) + error * mean((z.abs() + error) * most)
    moved = replace(moved, box=moved.box + lost * (1 + (size + 8) * EPS))
    scaled = relaxed(moved, middle, torch.zeros_like(middle), torch.zeros_like(moved.box), weight)
    unsure = half * (moved.center.abs() + moved.deviation()) * (1 + 4 * EPS)
    return _centred(layer, replace(scaled, box=scaled.box + unsure))


def _centred(layer: nn.GroupNorm, form: Form) -> Form:
    def less_mean(rows: Tensor) -> Tensor:
        groups = _grouped(layer, rows)
        return (groups - groups.mean(2, keepdim=True)).view_as(rows)

    def magnitude(rows: Tensor) -> Tensor:
        groups = _grouped(layer, rows)
        return (groups + groups.mean(2, keepdim=True)).view_as(rows)

    return applied(less_mean, magnitude, form.center[0].numel() // layer.num_groups + 2, [form])


def _weighted(layer: nn.GroupNorm, form: Form) -> Form:
    factor = _channels(layer.weight, form.center) if layer.weight is not None else torch.ones_like(form.center[:1])
    return applied(lambda rows: rows * factor, lambda rows: rows * factor.abs(), 2, [form])


def _grouped(layer: nn.GroupNorm, values: Tensor) -> Tensor:
    return values.reshape(len(values), layer.num_groups, values[0].numel() // layer.num_groups if len(values) else 1)


def _spread(layer: nn.GroupNorm, form: Form, groups: Tensor) -> Tensor:
    """[1, G, 1] to [1, C, H, W]."""
    return groups.expand(-1, -1, form.center[0].numel() // layer.num_groups).reshape(1, *form.center.shape[1:])


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.detach().view(1, -1, *[1] * (like.ndim - 2))
