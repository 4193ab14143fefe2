"""Which images stay right: only those are attacked, nothing depends on their neighbours, curves never rise."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.metrics.robustness import Pgd, falls_at, is_right, start_noise, survives, survives_pgd


def images(count: int) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def linear() -> nn.Module:
    """Two classes: the exact Linf distance of an image is |margin| / |w|_1."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def exact_distance(model: nn.Module, x: Tensor) -> Tensor:
    weight = model[1].weight[0] - model[1].weight[1]
    return ((model(x)[:, 0] - model(x)[:, 1]).abs() / weight.abs().sum()).detach()


@pytest.fixture(scope="module")
def curved() -> nn.Module:
    """A net that no single step breaks best, in double, where batches give the same bits as single images."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    with torch.no_grad():
        net[1].weight *= 6
    return net


def test_only_images_that_are_right_are_attacked(linear: nn.Module) -> None:
    x = images(10)
    y = linear(x).argmax(1)
    right = torch.arange(10) % 3 == 0
    seen: list[int] = []

    def attack(some: Tensor, labels: Tensor) -> Tensor:
        seen.append(len(some))
        return some

    assert torch.equal(survives(linear, attack, x, y, right, 3), right)
    assert seen == [3, 1]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_answers_that_are_not_finite_are_never_right(bad: float) -> None:
    y = torch.zeros(3, dtype=torch.long)
    logits = torch.tensor([[1.0, 0.0], [1.0, bad], [bad, 0.0]])
    assert is_right(lambda x: logits[: len(x)], torch.zeros(3, 1, 8, 8), y, 3).tolist() == [True, False, False]


def test_pgd_counts_images_as_fallen_where_the_answer_is_nan() -> None:
    """The attack goes up the first pixel, and beyond 0.5 there is no answer."""

    def model(x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        logits = torch.stack([3 - first, first], 1)
        return torch.where((first > 0.5)[:, None], torch.nan, logits)

    x = torch.full((2, 1, 2, 2), 0.45)
    x[1] = 0.3
    right = torch.ones(2, dtype=torch.bool)
    zeros = torch.zeros(2, dtype=torch.long)
    assert survives_pgd(model, x, zeros, np.arange(2), right, 0.1, Pgd(10), 2).tolist() == [False, True]


def test_starts_are_an_images_own() -> None:
    ids = np.array([7, 3, 900000])
    noise = start_noise(ids, (3, 8, 8), Pgd(5, 2), 0)
    assert noise.shape == (3, 3, 8, 8)
    assert noise.min() >= -1 and noise.max() < 1
    assert abs(float(noise.mean())) < 0.1 and 0.5 < float(noise.std()) < 0.65  # uniform: 1 / sqrt(3)
    assert torch.equal(start_noise(ids[::-1], (3, 8, 8), Pgd(5, 2), 0), noise.flip(0))
    assert torch.equal(start_noise(ids[1:2], (3, 8, 8), Pgd(9, 4), 0)[0], noise[1])
    others = [
        start_noise(ids, (3, 8, 8), Pgd(5, 2), 1),
        start_noise(ids, (3, 8, 8), Pgd(5, 2, "margin"), 0),
        start_noise(ids, (3, 8, 8), Pgd(5, 2, seed=1), 0),
    ]
    assert all(abs(np.corrcoef(noise.flatten(), other.flatten())[0, 1]) < 0.15 for other in others)


def test_an_images_outcome_does_not_depend_on_its_neighbours(curved: nn.Module) -> None:
    x = images(40).double()
    y = curved(x).argmax(1)
    ids = np.arange(40) * 3 + 1
    right = torch.ones(40, dtype=torch.bool)
    how = Pgd(3, 2, "margin", seed=5)
    together = survives_pgd(curved, x, y, ids, right, 0.12, how, 40)
    assert 5 < together.sum() < 35
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = survives_pgd(curved, x[order], y[order], ids[order.numpy()], right, 0.12, how, 7)
    assert torch.equal(shuffled, together[order])


def test_restarts_only_lower_the_count(curved: nn.Module) -> None:
    x = images(200).double()
    y = curved(x).argmax(1)
    right = torch.ones(200, dtype=torch.bool)
    counts = [survives_pgd(curved, x, y, np.arange(200), right, 0.12, Pgd(1, restarts), 64) for restarts in (1, 3, 20)]
    assert (counts[1] <= counts[0]).all() and (counts[2] <= counts[1]).all()
    assert counts[2].sum() < counts[0].sum()


def test_images_fall_at_the_first_radius_beyond_their_distance(linear: nn.Module) -> None:
    x = images(100)
    y = linear(x).argmax(1)
    distance = exact_distance(linear, x)
    y[:5] = 1 - y[:5]  # wrong unattacked
    right = linear(x).argmax(1) == y
    radii = sorted(float(distance.quantile(share)) + 1e-4 for share in (0.2, 0.4, 0.6))
    attacked: list[float] = []

    def survivors(left: Tensor, radius: float) -> Tensor:
        attacked.append(radius)
        return survives_pgd(linear, x, y, np.arange(100), left, radius, Pgd(10), 100)

    found = falls_at(survivors, right, radii)
    assert attacked == radii
    expected = [next((radius for radius in radii if each < radius), np.inf) for each in distance.tolist()]
    clear = np.min(np.abs(distance.numpy()[:, None] - np.array(radii)), 1) > 5e-5
    assert (found[:5] == 0).all()
    assert np.array_equal(found[5:][clear[5:]], np.array(expected)[5:][clear[5:]])
    assert clear.sum() > 90


def test_what_fell_at_a_radius_has_fallen_at_larger_ones() -> None:
    """Even where the attack is weaker there."""

    def survivors(left: Tensor, radius: float) -> Tensor:
        return left & torch.tensor([radius != 0.1, radius != 0.4, True])

    found = falls_at(survivors, torch.ones(3, dtype=torch.bool), [0.1, 0.2, 0.4])
    assert found.tolist() == [0.1, 0.4, np.inf]
