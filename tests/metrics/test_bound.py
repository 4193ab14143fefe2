"""Distortions of the three grades against exact distances, and against each other."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

from hpcguard.attacks import pgd
from hpcguard.config import DataConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.metrics.bound import (
    Distortion,
    UnsoundBoundError,
    assert_sound,
    certified,
    estimated,
    measured,
    summarise,
)
from hpcguard.metrics.bound.radius import plain_bound, search_radius, stepwise_bound
from hpcguard.models.small_cnn import SmallCNN

NORMS = ("linf", "l2")
GRADES = (certified, estimated, measured)


def linear_net(classes: int = 3) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear net, images away from the limits 0 and 1 on its right side, their labels, and flagged pixels."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, classes))
    x = torch.rand(6, 2, 2, 2) * 0.2 + 0.4
    with torch.no_grad():
        net[1].bias.sub_(net(x).mean(0))
    flagged = torch.tensor([[True, False], [False, False]]).expand(6, 1, 2, 2)
    return net, x, net(x).argmax(1), flagged


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("group", ["all", "flagged", "unflagged"])
@pytest.mark.parametrize("grade", GRADES, ids=lambda each: each.__name__)
def test_on_a_linear_net_every_grade_is_the_exact_distance(
    grade: Callable[..., Distortion], group: str, norm: str
) -> None:
    net, x, y, flagged = linear_net()
    weight = net[1].weight.detach().double().view(-1, 2, 2, 2)
    logits = net.double()(x.double()).detach()
    net.float()
    where = {"all": torch.ones(2, 2), "flagged": flagged[0, 0], "unflagged": ~flagged[0, 0]}[group]
    exact = []
    for row, label in zip(logits, y.tolist(), strict=True):
        slopes = (weight[label] - weight) * where
        length = slopes.abs().sum((1, 2, 3)) if norm == "linf" else slopes.square().sum((1, 2, 3)).sqrt()
        exact.append(min(float((row[label] - row[k]) / length[k]) for k in range(3) if k != label))
    found = grade(net, x, y, norm, flagged, group)
    assert (found.grade, found.norm, found.group) == (grade.__name__, norm, group)
    assert found.values == pytest.approx(exact, rel=2e-3 if grade is measured else 1e-9)
    if grade is certified:
        assert (found.values <= exact).all()
    if grade is measured:
        assert (found.values >= exact).all()


def test_an_estimate_of_parts_is_that_of_the_whole_on_a_linear_net() -> None:
    net, x, y, flagged = linear_net()
    for norm in NORMS:
        whole, parts = (estimated(net, x, y, norm, flagged, split=split).values for split in (False, True))
        assert parts == pytest.approx(whole, rel=1e-9)


def small_net() -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[1].weight.mul_(3)
        net[1].bias.copy_(-net[1].weight @ torch.full((2,), 0.5) + torch.randn(5) * 0.2)
        net[3].weight.mul_(3)
    return net


def exact_linf(net: nn.Module, image: np.ndarray, label: int) -> float:
    """Smallest max |delta| to a tie, by a linear programme in (delta, t) for each on-off pattern and wrong class."""
    first, last = net[1], net[3]
    w1, b1, w2, b2 = (each.detach().double().numpy() for each in (first.weight, first.bias, last.weight, last.bias))
    base, best = w1 @ image + b1, math.inf
    for pattern in itertools.product([0.0, 1.0], repeat=len(b1)):
        on = np.array(pattern)
        for k in (k for k in range(len(b2)) if k != label):
            margin = (w2[label] - w2[k]) * on
            sign = 1 - 2 * on  # on: -z <= 0, off: z <= 0
            rows = [*(sign[:, None] * w1), margin @ w1]
            limits = [*(-sign * base), -(margin @ base + b2[label] - b2[k])]
            matrix = [[*row, 0] for row in rows] + [[1, 0, -1], [-1, 0, -1], [0, 1, -1], [0, -1, -1]]
            box = [(-image[0], 1 - image[0]), (-image[1], 1 - image[1]), (0, None)]
            solved = linprog([0, 0, 1], matrix, [*limits, 0, 0, 0, 0], bounds=box)
            best = min(best, solved.fun) if solved.success else best
    return best


def test_certified_and_measured_enclose_the_exact_distance_of_a_relu_net() -> None:
    net = small_net()
    x = torch.rand(12, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    y = net(x).argmax(1)
    assert len(y.unique()) > 1
    exact = np.array([exact_linf(net, image.flatten().double().numpy(), int(k)) for image, k in zip(x, y, strict=True)])
    low, high = certified(net, x, y, "linf", evaluations=8), measured(net, x, y, "linf", steps=20)
    assert np.isfinite(exact).any()
    assert (low.values <= exact + 1e-9).all()
    assert (high.values >= exact - 1e-9).all()
    assert (low.values > 0.2 * np.minimum(exact, 1)).all()
    near = np.isfinite(high.values)
    assert (high.values[near] <= 1.05 * exact[near]).all()


def test_certified_in_l2_is_below_the_nearest_tie_in_any_direction() -> None:
    net = small_net().double()
    x = torch.rand(6, 1, 1, 2, generator=torch.Generator().manual_seed(0)).double()
    y = net(x).argmax(1)
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    rays = torch.stack([angle.cos(), angle.sin()], 1)
    lengths = torch.linspace(0, 1.4, 1401, dtype=torch.float64)
    values = certified(net, x, y, "l2", evaluations=8).values
    for image, label, value in zip(x, y, values, strict=True):
        points = image.view(1, 1, 2) + lengths[:, None, None] * rays
        changed = (net(points.reshape(-1, 1, 1, 2)).argmax(1) != label).view(len(lengths), -1).any(1)
        assert value <= (lengths[changed].min().item() if changed.any() else math.inf)
        assert value > 0


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A small-cnn trained for a few epochs, test images, labels, and a flagged left half."""
    torch.manual_seed(0)
    train, test = (load_images(DataConfig(name="digits", size=8), split) for split in ("train", "test"))
    model = SmallCNN(10, train.shape[0], width=4, activation="relu", norm="none")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    images, labels = torch.from_numpy(train.images(train.ids)), torch.from_numpy(train.labels)
    for _ in range(8):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    ids = test.ids[:8]
    x, y = torch.from_numpy(test.images(ids)), torch.from_numpy(test.labels_of(ids))
    flagged = torch.zeros(len(x), 1, 8, 8, dtype=torch.bool)
    flagged[..., :4] = True
    return model.eval(), x, y, flagged


@pytest.mark.parametrize("norm", NORMS)
def test_certified_is_below_measured_on_digits(digits: tuple[nn.Module, Tensor, Tensor, Tensor], norm: str) -> None:
    model, x, y, flagged = digits
    whole = {}
    for group in ("all", "flagged", "unflagged"):
        low, high = (
            certified(model, x, y, norm, flagged, group),
            measured(model, x, y, norm, flagged, group, steps=20, targets=2),
        )
        figures = summarise(low, high, np.arange(len(x)))
        assert figures["right"] >= 6
        assert figures["non_trivial_share"] == 1
        right = (model(x).argmax(1) == y).numpy()
        assert ((low.values > 0) == right).all()
        assert ((high.values > 0) == right).all()
        whole[group] = low.values
    # Fewer coordinates to change; but each search of a radius ends where it is close, so not to the last digit.
    assert (whole["flagged"] >= whole["all"] * 0.9).all()
    assert (whole["unflagged"] >= whole["all"] * 0.9).all()
    assert whole["flagged"].sum() > 1.2 * whole["all"].sum()


@pytest.mark.parametrize("norm", NORMS)
def test_an_attack_on_flagged_pixels_within_the_certified_distance_changes_nothing(
    digits: tuple[nn.Module, Tensor, Tensor, Tensor], norm: str
) -> None:
    model, x, y, flagged = digits
    for group, where in (("flagged", flagged), ("unflagged", ~flagged)):
        low = certified(model, x, y, norm, flagged, group).values
        for row in np.flatnonzero(low):
            part = slice(row, row + 1)
            attacked = pgd(model, x[part], y[part], float(low[row]), 20, norm=norm, where=where[part])
            assert model(attacked).argmax(1) == y[part]


def test_budgets_of_flagged_and_other_pixels_keep_the_answer(
    digits: tuple[nn.Module, Tensor, Tensor, Tensor],
) -> None:
    model, x, y, flagged = digits
    bound = certified(model, x, y, "linf", flagged)
    generator, tried = torch.Generator().manual_seed(0), 0
    for row, split in enumerate(bound.splits):
        if split is None:
            continue
        even = split.budget_of_rest(0.5 * bound.values[row])
        assert even > 0.5 * bound.values[row] * 0.9
        assert split.budget_of_rest(0.0) >= even >= split.budget_of_rest(0.9 * bound.values[row])
        assert split.budget_of_rest(split.radius * 1.01) == 0
        size = torch.where(flagged[row], 0.5 * bound.values[row], even)
        signs = torch.randint(0, 2, (200, *x.shape[1:]), generator=generator) * 2 - 1
        assert (model(x[row] + signs * size).argmax(1) == y[row]).all()
        tried += 1
    assert tried >= 6


def test_what_is_measured_is_wrong_and_in_place(digits: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    """An image that another attack is said to have found counts only if it is wrong, in [0, 1] and changed in place."""
    model, x, y, flagged = digits
    right = model(x).argmax(1) == y
    attack = partial(measured, model, x, y, "linf", steps=10, targets=0)
    plain = attack(flagged, "flagged").values
    barely = x + 1e-3 * flagged
    outside = torch.where(flagged, x, 1 - x)
    for found in (barely, outside, x - 2 * flagged):
        assert (attack(flagged, "flagged", also=[found]).values == plain).all()
    assert (plain[right.numpy()] > 0).all()
    none = attack(torch.zeros_like(flagged), "flagged").values
    assert np.isinf(none[right.numpy()]).all()


def test_wrong_images_are_at_distance_0(digits: tuple[nn.Module, Tensor, Tensor, Tensor]) -> None:
    model, x, _, _ = digits
    wrong = (model(x).argmax(1) + 1) % 10
    for grade in GRADES:
        assert (grade(model, x[:3], wrong[:3], "linf").values == 0).all()


@pytest.mark.parametrize("grade", GRADES, ids=lambda each: each.__name__)
def test_nan_is_refused(grade: Callable[..., Distortion]) -> None:
    net, x, y, _ = linear_net()
    broken = x.clone()
    broken[2, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match=r"images \[2\]"):
        grade(net, broken, y, "linf")
    with torch.no_grad():
        net[1].weight[0, 0] = math.nan
    with pytest.raises(InputError, match="NaN"):
        grade(net, x, y, "linf")


@pytest.mark.parametrize("grade", GRADES, ids=lambda each: each.__name__)
def test_masks_that_do_not_fit_are_refused(grade: Callable[..., Distortion]) -> None:
    net, x, y, flagged = linear_net()
    for mask, group in ((None, "flagged"), (flagged.float(), "flagged"), (flagged[:3], "all"), (flagged[:, 0], "all")):
        with pytest.raises(InputError, match="flagged"):
            grade(net, x, y, "linf", mask, group)


def test_a_certificate_above_an_attack_is_an_error_that_names_the_image() -> None:
    low = Distortion("certified", "linf", "all", np.array([0.1, 0.3, 0.0]))
    high = Distortion("measured", "linf", "all", np.array([0.1, 0.2, np.inf]))
    with pytest.raises(UnsoundBoundError, match=r"1 of 3 .*image 71: certified 0\.3, measured 0\.2"):
        assert_sound(low, high, [70, 71, 72])
    nan = Distortion("certified", "linf", "all", np.array([0.1, np.nan, 0.0]))
    with pytest.raises(UnsoundBoundError, match="image 71"):
        summarise(nan, high, [70, 71, 72])


def test_grades_norms_and_groups_are_not_mixed() -> None:
    values = np.ones(1)
    low = Distortion("certified", "linf", "all", values)
    for other in (("estimated", "linf", "all"), ("measured", "l2", "all"), ("measured", "linf", "flagged")):
        with pytest.raises(ValueError, match="expected"):
            assert_sound(low, Distortion(*other, values), [0])  # type: ignore[arg-type]


def test_the_summary_is_over_images_that_are_right_and_were_broken() -> None:
    low = Distortion("certified", "linf", "all", np.array([0.0, 0.1, 0.001, 0.5]))
    high = Distortion("measured", "linf", "all", np.array([0.0, 0.2, 0.2, np.inf]))
    figures = summarise(low, high, range(4))
    assert (figures["images"], figures["right"], figures["not_broken"]) == (4, 3, 1)
    assert figures["non_trivial_share"] == 0.5
    assert figures["ratio_q50"] == pytest.approx((0.5 + 0.005) / 2)


def test_steps_add_up_what_each_radius_allows() -> None:
    """Within 1 the margin falls at 2 a unit, up to 3 at 4: 2 + 4 * 1.5 = 8; no further than was looked."""
    margins, evaluated = np.array([8.0]), [(3.0, np.array([4.0])), (1.0, np.array([2.0]))]
    assert plain_bound(margins, np.array([4.0]), 3.0) == 2
    assert stepwise_bound(margins, evaluated) == pytest.approx(2.5)
    assert stepwise_bound(np.array([80.0]), evaluated) == pytest.approx(3)
    assert stepwise_bound(np.array([8.0, 1.0]), [(3.0, np.array([4.0, 1.0]))]) == pytest.approx(1)
    falling = [(1.0, np.array([9.0])), (2.0, np.array([4.0]))]  # what holds within 2 holds within 1
    assert stepwise_bound(margins, falling) == pytest.approx(2)


def test_the_search_finds_where_radius_and_ratio_meet() -> None:
    margins = np.array([1.0])
    for growth in (1.0, 5.0, 40.0):
        evaluated = search_radius(margins, lambda r, g=growth: np.array([np.exp(g * r)]), 1.0, 10.0, 10, close=0.02)
        best = max(plain_bound(margins, constant, radius) for radius, constant in evaluated)
        root = np.linspace(0, 1, 100_001)
        assert best == pytest.approx(root[np.argmin(np.abs(root * np.exp(growth * root) - 1))], rel=0.05)
