"""GroupNorm on affine forms: y = weight * u * s + bias, u the values less their group's mean, s = (u'u / n + eps)^-1/2.

Of each group the length |u| is bounded, hence s. Forward, the error of s is one noise symbol a group. Backward,
dy/dx = P s (I - z z' / n), with z = u * s and P the subtraction of means.
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
    center, deviation = centred.center, centred.deviation()
    length, most = (_grouped(layer, each).norm(dim=2, keepdim=True) for each in (center, deviation))
    # |c + e| is at least c'(c + e) / |c|, whose deviation knows how the errors cancel.
    ahead = _grouped(layer, center) / length.clamp(min=1e-150)
    along = applied(
        lambda rows: (_grouped(layer, rows) * ahead).sum(2), lambda rows: (_grouped(layer, rows) * ahead.abs()).sum(2),
        size + 4, [centred],
    ).deviation()[:, :, None]  # fmt: skip
    slack = (size + 16) * EPS
    low = (length * (1 - slack) - along * (1 + slack)).clamp(min=0)
    high = (length.square() + 2 * length * along + most.square()).sqrt() * (1 + slack)
    largest = (low.square() / size + layer.eps).rsqrt() * (1 + 8 * EPS)
    smallest = (high.square() / size + layer.eps).rsqrt() * (1 - 8 * EPS)
    middle, half = _spread(layer, form, (largest + smallest) / 2), _spread(layer, form, (largest - smallest) / 2)
    half = half + 4 * EPS * middle

    scaled = relaxed(centred, middle, torch.zeros_like(middle), torch.zeros_like(centred.box), weight)
    second = deviation * half * (1 + 4 * EPS)
    scaled = _with_noise(scaled, _indicators(layer, middle) * center * half, weight.new_ones(1, layer.num_groups))
    scaled = replace(scaled, box=scaled.box + second)
    known = scaled.center, scaled.deviation(), middle, half
    out = _weighted(layer, scaled)
    shift = _channels(layer.bias, out.center) if layer.bias is not None else torch.zeros_like(middle)
    center = out.center + shift
    return replace(out, center=center, box=out.box + EPS * (center.abs() + shift.abs())), known


def normalise_back(layer: nn.GroupNorm, form: Form, known: Normalised, weight: Tensor) -> Form:
    """The set of gradients with respect to what goes into the layer, from that with respect to its values.

    With z + e in the place of z, (I - z z' / n) w is less by z mean(e w), one symbol a group, and e mean((z + e) w),
    one a value. The error of s moves along what it multiplies, one symbol a group and margin; the rest goes to the box.
    """
    z, error, middle, half = known
    size = z[0].numel() // layer.num_groups

    def mean(values: Tensor) -> Tensor:
        return _grouped(layer, values).mean(2, keepdim=True).expand(-1, -1, size).reshape(values.shape)

    form = _weighted(layer, form)
    unsure = mean(error * (form.center.abs() + form.deviation())) * (1 + (size + 8) * EPS)
    product = applied(lambda rows: mean(z * rows), lambda rows: mean(z.abs() * rows), size + 4, [form])
    most = product.center.abs() + product.deviation() + unsure
    moved = applied(
        lambda rows: rows - z * mean(z * rows), lambda rows: rows + z.abs() * mean(z.abs() * rows), size + 8, [form]
    )
    ones, none = torch.ones_like(middle), torch.zeros_like(middle)
    moved = relaxed(moved, ones, none, error * most * (1 + 4 * EPS), weight)
    moved = _with_noise(moved, _indicators(layer, z) * z, _grouped(layer, unsure)[:, :, 0])
    scaled = relaxed(moved, middle, none, torch.zeros_like(moved.box), moved.weight)
    along = half * moved.center * (1 + 4 * EPS)
    for k in range(len(along)):
        own = torch.zeros(len(along), layer.num_groups, dtype=along.dtype)
        own[k] = 1
        scaled = _with_noise(scaled, _indicators(layer, z) * along[k : k + 1], own)
    return _centred(layer, replace(scaled, box=scaled.box + half * moved.deviation() * (1 + 4 * EPS)))


def _indicators(layer: nn.GroupNorm, like: Tensor) -> Tensor:
    """1 in each group, [G, C, H, W]."""
    size = like[0].numel() // layer.num_groups
    return torch.eye(layer.num_groups, dtype=like.dtype).repeat_interleave(size, 1).view(-1, *like.shape[1:])


def _with_noise(form: Form, rows: Tensor, weight: Tensor) -> Form:
    """With more noise symbols; weight: float64 [K, n], exact to a few roundings, which the box takes."""
    lost = 8 * EPS * (weight @ rows.flatten(1).abs()).view_as(form.box)
    return replace(
        form, rows=torch.cat([form.rows, rows]), weight=torch.cat([form.weight, weight], 1), box=form.box + lost
    )


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
