"""Planted cheats raise their alarms, and honest nets none."""

import json
from collections.abc import Callable
from dataclasses import asdict

import pyautoattack
import pytest
import torch
from real_data import CIFAR10, needs_cifar10
from real_resnet4b import RESNET4B, resnet4b
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.attacks import pgd
from hpcguard.config import DataConfig
from hpcguard.config.alarms import AlarmConfig
from hpcguard.data import load_images
from hpcguard.metrics.alarms import Alarm, Trial, raise_alarms, trusted
from hpcguard.metrics.alarms.attack import (
    BlackBox,
    black_box_finds_more,
    fgsm_finds_more,
    larger_eps_finds_less,
    losses_apart,
    more_steps_find_more,
    transfer_finds_more,
)
from hpcguard.metrics.alarms.model import pixel_range, randomness, softmax_outputs, zero_gradients
from hpcguard.metrics.robustness import is_right
from hpcguard.models.small_cnn import SmallCNN

Digits = tuple[Tensor, Tensor]
EPS = 0.08


def square_attack(eps: float, norm: str = "Linf", queries: int = 100) -> BlackBox:
    def survive(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        attack = pyautoattack.AutoAttack(
            model, norm=norm, eps=eps, seed=0, device="cpu", version="custom", attacks=["square"]
        )
        attack.square.n_queries = queries
        return attack.run_standard_evaluation(x, y, batch_size=256)[1] == y

    return survive


def digits(split: str) -> Digits:
    held = load_images(DataConfig(name="digits", size=8), split)  # type: ignore[arg-type]
    return torch.from_numpy(held.images(held.ids)), torch.from_numpy(held.labels)


def train(eps: float, epochs: int) -> nn.Module:
    """A small net, on PGD's images where eps is more than 0."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, y = digits("train")
    net = SmallCNN(10, 1, width=8)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            seen = pgd(net, x[part], y[part], eps, 4) if eps else x[part]
            optimizer.zero_grad()
            functional.cross_entropy(net(seen), y[part]).backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return train(0, 8)


@pytest.fixture(scope="module")
def robust() -> nn.Module:
    return train(EPS, 8)


@pytest.fixture(scope="module")
def images() -> Digits:
    return digits("test")


class Around(nn.Module):
    """A net with something done to its images or logits."""

    def __init__(self, net: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.around = net, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.around(self.net, x)


def trial_of(model: nn.Module, images: Digits, **changes: object) -> Trial:
    x, y = images
    values = {"eps": EPS, "steps": 10, **changes}
    return Trial(model, x, y, is_right(model, x, y, 256), **values)  # type: ignore[arg-type]


def alarms_of(model: nn.Module, images: Digits, sibling: nn.Module | None = None, **changes: object) -> list[Alarm]:
    trial = trial_of(model, images, **changes)
    norm = {"linf": "Linf", "l2": "L2"}[trial.norm]
    return raise_alarms(trial, AlarmConfig(), square=square_attack(trial.eps, norm), sibling=sibling)


def red(rows: list[Alarm]) -> set[str]:
    return {row.name for row in rows if row.red}


# ------------------------------------------------------------------------------------------------- honest nets
@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.4)])
@pytest.mark.parametrize("which", ["plain", "robust"])
def test_an_honest_net_raises_none(
    plain: nn.Module, robust: nn.Module, images: Digits, which: str, norm: str, eps: float
) -> None:
    net, sibling = (plain, robust) if which == "plain" else (robust, plain)
    rows = alarms_of(net, images, sibling, norm=norm, eps=eps)
    assert len(rows) == 11
    assert not red(rows)
    assert trusted(rows)
    assert all(row.red is False for row in rows), "every alarm was measured"
    assert json.loads(json.dumps([asdict(row) for row in rows], allow_nan=False))[4]["name"] == "logit scale"


@needs_cifar10
@pytest.mark.skipif(not RESNET4B.is_file(), reason="needs resnet4b.pth in data/weights or HPCGUARD_WEIGHTS")
@pytest.mark.parametrize("eps", [2 / 255, 8 / 255])
def test_resnet4b_raises_none(eps: float) -> None:
    test = load_images(DataConfig(name="cifar10", root=CIFAR10), "test")
    ids = test.ids[:300]
    pair = torch.from_numpy(test.images(ids)), torch.from_numpy(test.labels_of(ids))
    assert not red(alarms_of(resnet4b(), pair, eps=eps))


# ------------------------------------------------------------------------------------------------------ cheats
def noisy(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.1 * torch.randn_like(x))


def quantised(net: nn.Module, x: Tensor) -> Tensor:
    return net((x * 8).round() / 8)


def saturated(net: nn.Module, x: Tensor) -> Tensor:
    return (1000 * net(x)).softmax(1)


CHEATS: list[tuple[str, Callable[[nn.Module, Tensor], Tensor], set[str]]] = [
    ("saturated softmax", saturated,
     {"softmax outputs", "zero gradients", "eps = 1 leaves some right", "black box beats white box"}),
    ("softmax", lambda net, x: net(x).softmax(1), {"softmax outputs"}),
    ("noise", noisy, {"randomness"}),
    ("quantiser", quantised, {"zero gradients", "eps = 1 leaves some right", "black box beats white box"}),
    ("large logits", lambda net, x: 1e4 * net(x), {"zero gradients", "logit scale"}),
    ("logits below float32's range", lambda net, x: 1e-42 * net(x), {"zero gradients"}),
]  # fmt: skip


@pytest.mark.parametrize(("forward", "expected"), [cheat[1:] for cheat in CHEATS], ids=[cheat[0] for cheat in CHEATS])
def test_a_planted_cheat_raises_its_alarms(
    plain: nn.Module, robust: nn.Module, images: Digits, forward: Callable[[nn.Module, Tensor], Tensor],
    expected: set[str],
) -> None:  # fmt: skip
    torch.manual_seed(0)
    rows = alarms_of(Around(plain, forward), images, robust)
    assert expected <= red(rows)
    assert not trusted(rows)


def test_an_attack_on_normalised_inputs(plain: nn.Module, images: Digits) -> None:
    """The images are normalised outside of the model, and the attack takes them for pixels."""
    x, y = images
    model = Around(plain, lambda net, z: net(0.25 * z + 0.5))
    rows = alarms_of(model, ((x - 0.5) / 0.25, y))
    assert "pixel range" in red(rows)
    assert not trusted(rows)


@pytest.mark.parametrize(
    ("change", "expected"),
    [(0.0, True), (0.01, True), (0.1, False), (0.1002, True), (0.4, True), (float("nan"), True)],
)
def test_a_change_that_is_not_eps(change: float, expected: bool) -> None:
    """0.4 is eps 0.1 in units of a standard deviation of 0.25, and 0.01 what a forgotten factor leaves."""
    x = torch.full((2, 3, 4, 4), 0.5)
    for sign in (-1, 1):
        assert pixel_range(x, x + sign * change, 0.1).red is expected
    length = change / 48**0.5
    assert pixel_range(x, x + length, 0.1, "l2").red is expected


def test_pixels_out_of_range() -> None:
    for x in (torch.full((1, 1, 2, 2), 1.5), torch.full((1, 1, 2, 2), -0.2), torch.full((1, 1, 2, 2), 255.0)):
        assert pixel_range(x, x + 0.1, 0.1).red is True
    black = torch.zeros(1, 1, 2, 2)
    assert pixel_range(black, black + 0.1, 0.1).red is False
    assert pixel_range(black + torch.nan, black + torch.nan, 0.1).red is True


# --------------------------------------------------------------------------------------------- each alarm alone
def linear_trial(count: int = 100) -> Trial:
    """Grey images, right until every pixel has lost 0.2."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
        model[1].bias.copy_(torch.tensor([-1.2, 1.2]))
    x = torch.full((count, 1, 2, 2), 0.5)
    return Trial(model, x, torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.bool), 0.06)


@pytest.mark.parametrize(("missed", "expected"), [(0, False), (2, False), (4, False), (5, True), (100, True)])
def test_limits_leave_room_for_the_noise_of_sampling(missed: int, expected: bool) -> None:
    """Wilson's interval of 4 of 100 begins at 1.6%, that of 5 at 2.2%; the limit is 2%."""
    trial = linear_trial()
    white = torch.ones(100, dtype=torch.bool)
    found = torch.arange(100) >= missed
    assert fgsm_finds_more(trial, white, found).red is expected


def test_what_only_the_weaker_attack_finds_is_counted_image_by_image() -> None:
    trial = linear_trial()
    white, other = torch.arange(100) < 50, torch.arange(100) >= 50
    row = fgsm_finds_more(trial, white, other)  # equal accuracies, and no image in common
    assert (row.measured["images"], row.measured["share"], row.red) == (50, 0.5, True)
    assert fgsm_finds_more(trial, white, white).red is False
    assert losses_apart(white | other, white).red is True
    assert losses_apart(white, white).red is False
    assert black_box_finds_more(trial, white, known=other).red is True
    assert (
        black_box_finds_more(trial, white, square=lambda model, x, y: torch.ones(len(x), dtype=torch.bool)).red is False
    )


def test_larger_eps_finds_less() -> None:
    """After an attack at eps that is said to have broken half: twice 0.06 breaks none of them, twice 0.15 all."""
    trial = linear_trial()
    white = torch.arange(100) < 50
    assert larger_eps_finds_less(trial, white).measured["images"] == 50
    wide = Trial(**{**vars(trial), "eps": 0.15})
    assert larger_eps_finds_less(wide, white).red is False


def test_more_steps_find_more(plain: nn.Module, images: Digits) -> None:
    """PGD of a tiny step is not converged: one step of eps / 4 from a random start."""
    for steps, expected in ((1, True), (10, False)):
        trial = trial_of(plain, images, steps=steps)
        white = trial.pgd("margin", trial.pgd("ce", trial.right))
        assert more_steps_find_more(trial, white, 2).red is expected


def test_fgsm_beats_pgd_where_only_clean_images_have_a_gradient(plain: nn.Module, images: Digits) -> None:
    """Of 17 greys, as the digits have; a random start leaves them and then sees no gradient."""

    def sees_only_greys(net: nn.Module, x: Tensor) -> Tensor:
        grey = ((16 * x).frac().flatten(1) == 0).all(1)[:, None]
        return torch.where(grey, net(x), net(x.detach()))

    trial = trial_of(Around(plain, sees_only_greys), images)
    white = trial.pgd("margin", trial.pgd("ce", trial.right))
    assert fgsm_finds_more(trial, white).red is True
    assert zero_gradients(trial).red is False, "which the gradient at the image does not show"


def test_transfer_and_black_box_without_another_model_are_not_measured(plain: nn.Module, images: Digits) -> None:
    trial = trial_of(plain, images)
    white = trial.right
    for row in (transfer_finds_more(trial, white, None), black_box_finds_more(trial, white)):
        assert (row.red, row.measured) == (None, {})
    assert trusted([row])


def test_a_model_that_depends_on_its_batch_is_random(plain: nn.Module, images: Digits) -> None:
    x = images[0][:60]
    trained = nn.Sequential(nn.BatchNorm2d(1), plain)
    assert randomness(trained.train(), x, 64).red is True
    assert randomness(trained.eval(), x, 64).red is False


def test_logits_are_no_softmax(plain: nn.Module, images: Digits) -> None:
    assert softmax_outputs(plain, images[0], 100).red is False
    assert softmax_outputs(Around(plain, lambda net, x: net(x).log_softmax(1)), images[0], 100).red is False
    assert softmax_outputs(Around(plain, lambda net, x: net(x) * torch.nan), images[0], 100).red is False


def test_gradients_that_are_not_finite_count_as_none(images: Digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    trial = trial_of(model, images)
    assert zero_gradients(trial).measured["images"] == 0
    rooted = Around(model, lambda net, x: net(x) + 0 * x.flatten(1)[:, :1].sub(x.flatten(1)[:, :1]).sqrt())
    assert zero_gradients(Trial(**{**vars(trial), "model": rooted})).measured["share"] == 1


# ---------------------------------------------------------------------------------------------------- the table
def test_known_outcomes_are_not_measured_again(plain: nn.Module, images: Digits) -> None:
    trial = trial_of(plain, (images[0][:100], images[1][:100]))
    measured = raise_alarms(trial, AlarmConfig(images=100))
    entropy = trial.pgd("ce", trial.right)
    known = {"ce": entropy, "margin": trial.pgd("margin", entropy), "square": entropy}
    again = raise_alarms(trial, AlarmConfig(images=100), known)
    assert [row for row in again if row.name != "black box beats white box"] == measured[:9] + measured[10:]
    assert again[9].red is False


def test_images_are_drawn_from_the_whole_set_and_the_same_again(plain: nn.Module, images: Digits) -> None:
    """Of labels in ascending order the first 40 would all be zeros."""
    order = images[1].argsort()
    trial = trial_of(plain, (images[0][order], images[1][order]))
    seen: list[Tensor] = []

    def spy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return torch.ones(len(x), dtype=torch.bool)

    rows = [raise_alarms(Trial(**{**vars(trial), "eps": 1e-4}), AlarmConfig(images=40), square=spy) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][4].measured["of"] == 40
    assert len(seen[0].unique()) > 5


def test_no_image_right(plain: nn.Module, images: Digits) -> None:
    """Nothing to attack, and nothing to divide by."""
    x = images[0]
    rows = raise_alarms(trial_of(plain, (x[:20], (plain(x[:20]).argmax(1) + 1) % 10)), AlarmConfig())
    assert not red(rows)
