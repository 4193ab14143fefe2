"""Sets of tensors as affine forms (zonotopes with a box), pushed through the steps of a network, and back.

A form holds K sets at once: center_k + sum_j e_j ball_j + sum_j weight_kj n_j rows_j + box_k * [-1, 1], with e in the
p-norm ball of radius `radius` and each n_j in [-1, 1]. Noise rows are numbered through all activations of a pass, so
that the forms of two branches can be added.

Rounding: all is float64. What a sum of n products loses is at most n u / (1 - n u) of the sum of their absolute values,
u = 2^-53 (Higham 2002, section 3.1), in whatever order it is added up. Every step adds more than that to the box.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hpcguard.metrics.bound.network import Linear, Step

EPS = 2.0**-52  # 2 u
UNDERFLOW = 1e-290
MOST_NOISE = 4096  # noise rows of one activation: memory


@dataclass(frozen=True)
class Form:
    """float64; center, box: [K, ...]; ball: [n, ...]; rows: [m, ...]; weight: [K, m]."""

    center: Tensor
    ball: Tensor
    rows: Tensor
    weight: Tensor
    box: Tensor
    radius: float
    norm: str

    @cached_property
    def spread(self) -> Tensor:
        """How far ball and noise move each value from the center at most, [K, ...], rounded up."""
        flat = self.ball.flatten(1)
        length = flat.abs().sum(0) if self.norm == "linf" else flat.square().sum(0).sqrt()
        moved = self.radius * length + self.weight @ self.rows.flatten(1).abs()
        return (moved * (1 + (len(self.ball) + len(self.rows) + 8) * EPS)).view_as(self.box)

    def deviation(self) -> Tensor:
        """How far each value may be from the center, [K, ...]."""
        return (self.spread + self.box) * (1 + 4 * EPS)

    def magnitude(self) -> Tensor:
        """A bound on the absolute values of all terms together, [K, ...]: what rounding errors are relative to.

        For the ball in L2 its rows' Euclidean length, not their sum: errors of the rows act through the same e.
        """
        return self.center.abs() + self.spread + self.box


def through(step: Step, inputs: Sequence[Form]) -> Form:
    """The set of the step's values for inputs of these sets, an affine step."""
    assert step.linear is not None and step.magnitude is not None and step.offset is not None
    moved = applied(step.linear, step.magnitude, step.terms, _aligned(inputs))
    center = moved.center + step.offset
    return replace(moved, center=center, box=moved.box + EPS * (step.offset.abs() + center.abs()))


def back_through(step: Step, shapes: Sequence[torch.Size], form: Form) -> list[Form]:
    """The set of gradients with respect to each input, of `shapes`, from that with respect to the step's values."""
    assert step.linear is not None and step.magnitude is not None
    return [
        applied(_transposed(step.linear, shapes, place), _transposed(step.magnitude, shapes, place), step.terms, [form])
        for place in range(len(shapes))
    ]


def plus(first: Form, second: Form) -> Form:
    """The set of sums."""
    add = lambda one, other: one + other  # noqa: E731
    return applied(add, add, 2, _aligned([first, second]))


def relaxed(form: Form, slope: Tensor, shift: Tensor, error: Tensor, weight: Tensor) -> Form:
    """slope * form + shift +- error; the MOST_NOISE largest errors get a noise row each, the rest goes to the box.

    slope, shift: one set [1, ...] for all; error: [K, ...]. weight: of all noise numbers given so far, [K, m].
    """
    form = padded(form, weight)
    center = form.center * slope + shift
    lost = 4 * EPS * (slope.abs() * form.magnitude() + shift.abs() + center.abs()) + UNDERFLOW
    largest = error.amax(0).flatten()
    places = largest.nonzero()[:, 0]
    if len(places) > MOST_NOISE:
        places = largest.topk(MOST_NOISE).indices
    left = error.flatten(1).index_fill(1, places, 0.0).view_as(error)
    fresh = form.rows.new_zeros(len(places), error[0].numel())
    fresh[torch.arange(len(places)), places] = 1
    return replace(
        form,
        center=center,
        ball=form.ball * slope,
        rows=torch.cat([form.rows * slope, fresh.view(-1, *form.rows.shape[1:])]),
        weight=torch.cat([weight, error.flatten(1)[:, places] * (1 + 4 * EPS)], 1),
        box=form.box * slope.abs() + lost + left,
    )


def applied(linear: Linear, magnitude: Linear, terms: int, inputs: Sequence[Form]) -> Form:
    """A linear map of aligned forms; `magnitude`: its absolute weights; terms: the products that an output adds up."""
    with torch.no_grad():
        lost = (terms + 8) * EPS * magnitude(*(each.magnitude() for each in inputs))
        return replace(
            inputs[0],
            center=linear(*(each.center for each in inputs)),
            ball=linear(*(each.ball for each in inputs)),
            rows=linear(*(each.rows for each in inputs)),
            box=magnitude(*(each.box for each in inputs)) + lost + UNDERFLOW,
        )


def _aligned(forms: Sequence[Form]) -> list[Form]:
    longest = max((each.weight for each in forms), key=lambda weight: weight.shape[1])
    return [padded(each, longest) for each in forms]


def padded(form: Form, weight: Tensor) -> Form:
    """With zeros for the noise numbers that were given elsewhere; `weight` begins with the form's own."""
    missing = form.rows.new_zeros(weight.shape[1] - len(form.rows), *form.rows.shape[1:])
    return replace(form, rows=torch.cat([form.rows, missing]), weight=weight) if len(missing) else form


def _transposed(function: Linear, shapes: Sequence[torch.Size], place: int) -> Linear:
    def transpose(rows: Tensor) -> Tensor:
        inputs = [rows.new_zeros(len(rows), *shape) for shape in shapes]
        if not len(rows):
            return inputs[place]
        with torch.enable_grad():
            inputs[place].requires_grad_()
            return torch.autograd.grad(function(*inputs), inputs[place], rows)[0]

    return transpose
