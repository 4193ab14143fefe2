"""FGSM and PGD on models with a known answer; AutoAttack through its library."""

import math
from typing import Literal

import pyautoattack
import pytest
import torch
from digit_nets import digit_net
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.attacks import autoattack, fgsm, margin_loss, pgd, random_start
from hpcguard.config import DataConfig
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.metrics.accuracy import wilson_interval


@pytest.fixture
def linear() -> nn.Module:
    """Two classes; the margin of class 0 is w.x + b, so its exact Linf distance is |margin| / |w|_1."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(2, 12, generator=generator))
        model[1].bias.zero_()
    return model


def middle_images(count: int) -> Tensor:
    return 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


def exact_distance(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weight = model[1].weight[0] - model[1].weight[1]
    margin = (model(x)[:, 0] - model(x)[:, 1]) * torch.where(y == 0, 1.0, -1.0)
    return (margin / weight.abs().sum()).detach()


@pytest.mark.parametrize("start", [False, True])
def test_gradient_attacks_are_optimal_on_a_linear_model(linear: nn.Module, start: bool) -> None:
    x = middle_images(200)
    y = linear(x).argmax(1)
    distance = exact_distance(linear, x, y)
    eps = float(distance.median())
    noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    begin = random_start(x, noise, eps) if start else None
    clear = (distance - eps).abs() > 1e-4
    for attacked in (fgsm(linear, x, y, eps), pgd(linear, x, y, eps, 20, start=begin)):
        broken = linear(attacked).argmax(1) != y
        assert torch.equal(broken[clear], (distance < eps)[clear])


def test_the_margin_finds_what_a_saturated_cross_entropy_hides(linear: nn.Module) -> None:
    x = middle_images(200)
    y = linear(x).argmax(1)
    distance = exact_distance(linear, x, y)
    eps = float(distance.median())
    clear = (distance - eps).abs() > 1e-4

    def loud(images: Tensor) -> Tensor:
        return 1e5 * linear(images)

    by_margin = pgd(loud, x, y, eps, 20, loss=margin_loss(y))
    assert torch.equal((loud(by_margin).argmax(1) != y)[clear], (distance < eps)[clear])
    by_entropy = pgd(loud, x, y, eps, 20)
    assert (loud(by_entropy).argmax(1) != y).sum() < 0.2 * (distance < eps).sum()


def test_the_margin_loss_is_the_best_other_logit_less_the_true_one() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [4.0, -1.0, 0.5]], requires_grad=True)
    loss = margin_loss(torch.tensor([1, 2]))(logits)
    assert loss.item() == (2 - 5) + (4 - 0.5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[0, -1, 1], [1, 0, -1]]


@pytest.mark.parametrize("start", [False, True])
def test_l2_attacks_are_optimal_on_a_linear_model(linear: nn.Module, start: bool) -> None:
    """Far from 0 and 1 the exact L2 distance of an image is |margin| / |w|_2."""
    x = middle_images(200)
    y = linear(x).argmax(1)
    weight = linear[1].weight[0] - linear[1].weight[1]
    logits = linear(x)
    distance = ((logits[:, 0] - logits[:, 1]).abs() / weight.norm()).detach()
    eps = min(0.25, float(distance.median()))
    noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    begin = random_start(x, noise, eps, "l2") if start else None
    clear = (distance - eps).abs() > 1e-3
    assert 20 < (distance < eps).sum() < 180
    for attacked in (fgsm(linear, x, y, eps, "l2"), pgd(linear, x, y, eps, 20, start=begin, norm="l2")):
        broken = linear(attacked).argmax(1) != y
        assert torch.equal(broken[clear], (distance < eps)[clear])


def test_l2_attacks_stay_in_the_ball_and_in_the_pixel_range() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    x = torch.rand(16, 3, 8, 8).round(decimals=1)
    y = torch.randint(0, 3, (16,))
    for eps in (0.0, 0.1, 2.0):
        begin = random_start(x, torch.empty_like(x).uniform_(-1, 1), eps, "l2")
        for attacked in (begin, fgsm(model, x, y, eps, "l2"), pgd(model, x, y, eps, 5, start=begin, norm="l2")):
            lengths = (attacked - x).flatten(1).norm(dim=1)
            assert lengths.max() <= eps * (1 + 1e-5) + 1e-7
            assert lengths.min() >= 0.5 * eps
            assert attacked.min() >= 0
            assert attacked.max() <= 1


def test_attacks_stay_in_the_ball_and_in_the_pixel_range() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(4 * 49, 3))
    x = torch.rand(16, 3, 8, 8).round(decimals=1)  # many pixels at the ends of the range
    y = torch.randint(0, 3, (16,))
    for eps in (2 / 255, 0.3):
        noise = torch.empty_like(x).uniform_(-1, 1)
        for attacked in (
            fgsm(model, x, y, eps),
            pgd(model, x, y, eps, 5, start=random_start(x, noise, eps)),
            pgd(model, x, y, eps, 3, 0.5),
        ):
            assert (attacked - x).abs().max() <= eps + 1e-6
            assert attacked.min() >= 0
            assert attacked.max() <= 1
            assert not attacked.requires_grad
            before, after = (functional.cross_entropy(model(each), y) for each in (x, attacked))
            assert after > before


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that tells handwritten digits apart, and test images of them."""
    net = digit_net(size=16, width=8, epochs=6)
    test = load_images(DataConfig(name="digits", size=16), "test")
    ids = test.ids[:120]
    return net.eval(), torch.from_numpy(test.images(ids)), torch.from_numpy(test.labels_of(ids))


@pytest.mark.parametrize(("norm", "library", "eps"), [("linf", "Linf", 0.03), ("l2", "L2", 0.4)])
def test_pgd_is_as_strong_as_the_librarys_attack(
    trained: tuple[nn.Module, Tensor, Tensor], norm: Literal["linf", "l2"], library: str, eps: float
) -> None:
    """APGD on the same loss (Croce & Hein 2020), which sets its own steps, in as many of them."""
    net, x, y = trained
    right = net(x).argmax(1) == y
    noise = torch.empty_like(x).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    attacked = pgd(net, x, y, eps, 40, start=random_start(x, noise, eps, norm), norm=norm)
    ours = float((right & (net(attacked).argmax(1) == y)).double().mean())
    attack = pyautoattack.AutoAttack(
        net, norm=library, eps=eps, seed=0, device="cpu", version="custom", attacks=["apgd-ce"]
    )
    attack.apgd.n_restarts, attack.apgd.n_iter = 1, 40
    _, predicted = attack.run_standard_evaluation(x, y, batch_size=200)
    theirs = float((predicted == y).double().mean())
    assert 0.15 < theirs < float(right.double().mean()) - 0.2
    assert abs(ours - theirs) <= 0.03


def test_pgd_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = middle_images(6).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    together = pgd(model, x, y, 0.1, 5)
    alone = torch.cat([pgd(model, x[i : i + 1], y[i : i + 1], 0.1, 5) for i in range(6)])
    assert torch.allclose(together, alone, atol=1e-12)


@pytest.mark.parametrize("version", ["fast", "standard", "untargeted"])
def test_autoattack_is_exact_on_a_linear_model(version: str) -> None:
    """With few classes there are fewer than nine targets, which the library must be told."""
    torch.manual_seed(5)
    classes = 3 if version == "untargeted" else 5
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()
    x = middle_images(24)
    y = model(x).argmax(1)
    logits, weight = model(x), model[1].weight
    margins = [
        min(
            ((logits[i, y[i]] - logits[i, j]) / (weight[y[i]] - weight[j]).abs().sum()).item()
            for j in range(classes)
            if j != y[i]
        )
        for i in range(24)
    ]
    distance = torch.tensor(margins)
    eps = float(distance.median())
    robust = autoattack(model, x, y, eps, version, 0, 16)  # type: ignore[arg-type]
    clear = (distance - eps).abs() > 1e-3
    assert torch.equal(robust[clear], (distance > eps)[clear])


def test_wilson_interval_against_the_definition() -> None:
    """The ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    low, high = wilson_interval(7, 20)
    for end in (low, high):
        assert (7 / 20 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 20)
    assert low < 7 / 20 < high
    assert wilson_interval(0, 10)[0] == 0
    assert math.isclose(wilson_interval(10, 10)[1], 1)
    assert wilson_interval(0, 0) == (0, 1)


def test_autoattack_with_too_few_classes_says_what_to_use() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(InputError, match="needs 4 classes, there are 2; use untargeted"):
        autoattack(model, middle_images(2), torch.tensor([0, 1]), 0.1, "standard", 0, 16)


def test_a_list_with_too_few_classes_is_refused_where_it_must_be() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x, y = middle_images(2), torch.tensor([0, 1])
    with pytest.raises(InputError, match=r"apgd-ce\+apgd-dlr: needs 3 classes, there are 2"):
        autoattack(model, x, y, 0.1, ["apgd-ce", "apgd-dlr"], 0, 16)
    assert autoattack(model, x, model(x).argmax(1), 0.0, ["apgd-ce"], 0, 16).all()


@pytest.mark.parametrize(
    ("version", "norm", "eps"),
    [("standard", "linf", 0.12), ("fast", "l2", 0.25), (["apgd-dlr", "fab"], "linf", 0.12)],
)
def test_autoattack_is_the_library_image_by_image(
    version: str | list[str], norm: Literal["linf", "l2"], eps: float
) -> None:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 5))
    with torch.no_grad():
        net[1].weight *= 6
    x = middle_images(24)
    y = net(x).argmax(1)
    attacks = {"standard": ["apgd-ce", "apgd-t", "fab-t", "square"], "fast": ["apgd-ce", "apgd-t"]}
    library = pyautoattack.AutoAttack(
        net, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=3, device="cpu", version="custom",
        attacks=attacks[version] if isinstance(version, str) else version,
    )  # fmt: skip
    library.apgd.n_restarts = library.fab.n_restarts = 1  # as its standard version sets it
    library.apgd_targeted.n_target_classes = library.fab.n_target_classes = 4
    _, predicted = library.run_standard_evaluation(x, y, batch_size=24)
    theirs = predicted == y
    assert 3 < theirs.sum() < 21
    assert torch.equal(autoattack(net, x, y, eps, version, 3, 24, norm), theirs)


class Holed(nn.Module):
    """Class 0 everywhere, and no finite answer where the first pixel is above 0.55."""

    def __init__(self, answer: float) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, 0, 0, 0]
        logits = torch.stack([3 - first, *(0.1 * k + 0.2 * first for k in range(4))], 1)
        hole = torch.zeros_like(logits)
        hole[:, 0] = self.answer
        return torch.where((first > 0.55)[:, None], logits + hole, logits)


@pytest.mark.parametrize("answer", [math.nan, math.inf])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_answer_that_is_not_finite_is_no_robustness(answer: float, norm: Literal["linf", "l2"]) -> None:
    """The library takes NaN and infinity for the largest logit, and so the image for right."""
    x = torch.full((4, 3, 2, 2), 0.5)
    x[2:, 0, 0, 0] = 0.3  # 0.25 away from the hole
    y = torch.zeros(4, dtype=torch.long)
    library = pyautoattack.AutoAttack(
        Holed(answer), norm={"linf": "Linf", "l2": "L2"}[norm], eps=0.1, device="cpu", version="custom",
        attacks=["apgd-ce"],
    )  # fmt: skip
    _, predicted = library.run_standard_evaluation(x, y, batch_size=4)
    assert (predicted == y).all()
    assert autoattack(Holed(answer), x, y, 0.1, ["apgd-ce"], 0, 4, norm).tolist() == [False, False, True, True]
