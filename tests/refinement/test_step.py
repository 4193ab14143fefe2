"""GuidedStep's terms against hand-computed values and plain PyTorch; fills and augmentation."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcguard.config import MaskingConfig, SensitivityConfig, TrainingConfig
from hpcguard.refinement.augment import OUTSIDE, augment, draw_shifts
from hpcguard.refinement.losses import divergence, margin_gradient, sensitivity_penalty, true_class_margin
from hpcguard.refinement.masking import flagged_pixels, hide, segment_means
from hpcguard.refinement.step import GuidedStep

cross_entropy = functional.cross_entropy
UNGUIDED = {"masking": {"weight": 0}, "sensitivity": {"weight": 0}}


class Quadratic(nn.Module):
    """Logits (a, b) . x^2 for one-channel images of 2x2 pixels: margins and their gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -1.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square() @ self.weight.T


IMAGE = np.array([0.1, 0.2, 0.3, 0.4])
FLAGGED = np.array([1, 0, 1, 1])
SLOPE = np.array([1, 1, 4, 2])  # a - b


def test_the_penalty_and_its_gradient_on_a_quadratic_model() -> None:
    """Through the whole step, at the clean image."""
    config = TrainingConfig(attack={"method": "none"}, masking={"weight": 0}, clean_weight=1)
    step = GuidedStep(Quadratic(), config, torch.zeros(1))  # type: ignore[arg-type]
    x = torch.tensor(IMAGE, dtype=torch.float32).reshape(1, 1, 2, 2)
    pixels = torch.tensor(FLAGGED == 1).reshape(1, 1, 2, 2)
    y = torch.tensor([0])
    with_penalty = step(x, y, pixels, torch.zeros_like(x), 3.0)
    # margin = sum (a - b) x^2, so its gradient is 2 (a - b) x
    assert true_class_margin(step.model(x), y).item() == pytest.approx((SLOPE * IMAGE**2).sum())
    assert step.terms[3].item() == pytest.approx(((2 * SLOPE * IMAGE * FLAGGED) ** 2).sum())
    without = step(x, y, pixels, torch.zeros_like(x), 0.0)
    (gradient,) = torch.autograd.grad(with_penalty - without, step.model.weight)
    # d/da_j sum (2 (a - b) x)^2 = 8 (a - b) x^2, on flagged pixels only; the opposite for b
    expected = 3 * 8 * SLOPE * IMAGE**2 * FLAGGED
    assert gradient[0].numpy() == pytest.approx(expected, rel=1e-5)
    assert gradient[1].numpy() == pytest.approx(-expected, rel=1e-5)


def test_the_penalty_and_the_masked_loss_on_a_linear_model() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [0.0, 1.0, 1.5, -1.0]])
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    net[1].weight.data.copy_(weight)
    config = TrainingConfig(attack={"method": "none"}, masking={"weight": 1})
    step = GuidedStep(net, config, torch.tensor([0.5]))  # type: ignore[arg-type]
    x = torch.tensor(IMAGE, dtype=torch.float32).reshape(1, 1, 2, 2)
    step(x, torch.tensor([1]), torch.tensor(FLAGGED == 1).reshape(1, 1, 2, 2), torch.zeros_like(x), 1.0)
    difference = np.array([-1.0, 3.0, 1.0, -1.0]) * FLAGGED  # true class 1 less class 0
    assert step.terms[3].item() == pytest.approx((difference**2).sum())
    logits = weight.numpy() @ np.where(FLAGGED, 0.5, IMAGE)
    assert step.terms[2].item() == pytest.approx(np.log(np.exp(logits).sum()) - logits[1], rel=1e-5)


def test_the_margin_is_to_the_largest_other_logit() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 1.0, 5.0]])
    assert true_class_margin(logits, torch.tensor([0, 1])).tolist() == [0.5, -4.0]


def test_the_divergence_is_that_of_the_definition() -> None:
    one, other = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]]), torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
    p, q = one.double().softmax(1).numpy(), other.double().softmax(1).numpy()
    assert divergence(one, other).item() == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)


def make_step(**changes: object) -> GuidedStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return GuidedStep(model, TrainingConfig(**changes), torch.tensor([0.25]))  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, generator=generator)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return x, torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6, 1, 8, 8, generator=generator) > 0.6, noise


def attacked_by_hand(model: nn.Module, begin: Tensor, x: Tensor, eps: float, steps: int, loss: object) -> Tensor:
    attacked = begin
    for _ in range(steps):
        attacked.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(attacked)), attacked)  # type: ignore[operator]
        attacked = (attacked.detach() + eps / 4 * gradient.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    return attacked


def test_with_guidance_off_it_is_pgd_training() -> None:
    """Against torch alone: the cross-entropy on images attacked step by step."""
    step = make_step(**UNGUIDED, attack={"eps": 0.1, "steps": 3})
    x, y, pixels, noise = batch()
    loss = step(x, y, pixels, noise, 0.0)
    begin = (x + 0.1 * noise).clamp(0, 1)
    attacked = attacked_by_hand(step.model, begin, x, 0.1, 3, lambda logits: cross_entropy(logits, y))
    assert loss.item() == pytest.approx(cross_entropy(step.model(attacked), y).item(), abs=1e-6)


def test_with_guidance_off_it_is_trades() -> None:
    """Zhang et al. 2019: clean cross-entropy and beta times the divergence of the images that most diverge."""
    step = make_step(
        **UNGUIDED, clean_weight=1, adversarial_weight=6, attack={"method": "trades", "eps": 0.1, "steps": 3}
    )
    x, y, pixels, noise = batch()
    loss = step(x, y, pixels, noise, 0.0)
    log_p = step.model(x).log_softmax(1).detach()

    def diverges(logits: Tensor) -> Tensor:
        return functional.kl_div(logits.log_softmax(1), log_p.exp(), reduction="sum")

    attacked = attacked_by_hand(step.model, (x + 0.001 * noise).clamp(0, 1), x, 0.1, 3, diverges)
    clean = step.model(x)
    second = functional.kl_div(step.model(attacked).log_softmax(1), clean.softmax(1), reduction="batchmean")
    assert loss.item() == pytest.approx((cross_entropy(clean, y) + 6 * second).item(), abs=1e-5)
    assert second.item() > 1e-4


def test_with_guidance_off_it_is_standard_and_fgsm_training() -> None:
    x, y, pixels, noise = batch()
    standard = make_step(**UNGUIDED, clean_weight=1, adversarial_weight=0)
    assert standard(x, y, pixels, noise, 0.0).item() == pytest.approx(cross_entropy(standard.model(x), y).item())
    fast = make_step(**UNGUIDED, attack={"method": "fgsm", "eps": 0.1})
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(fast.model(leaf), y), leaf)
    expected = cross_entropy(fast.model((x + 0.1 * gradient.sign()).clamp(0, 1)), y)
    assert fast(x, y, pixels, noise, 0.0).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("at", ["start", "clean"])
def test_every_term_and_all_together(at: str) -> None:
    """At the attack's start the penalty's gradient is also the attack's first."""
    x, y, pixels, noise = batch()
    guided = make_step(
        clean_weight=0.3, adversarial_weight=0.7, attack={"eps": 0.1, "steps": 1}, masking={"weight": 0.5},
        sensitivity={"at": at},
    )  # fmt: skip
    model = guided.model
    begin = (x + 0.1 * noise).clamp(0, 1)
    leaf = (begin if at == "start" else x).clone().requires_grad_()
    over_x = margin_gradient(model(leaf), leaf, y)
    penalty = sensitivity_penalty(over_x, pixels)
    if at == "start":
        direction = -over_x
    else:
        other = begin.clone().requires_grad_()
        (direction,) = torch.autograd.grad(cross_entropy(model(other), y), other)
    attacked = (begin + 0.025 * direction.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1).detach()
    clean, adversarial = cross_entropy(model(x), y), cross_entropy(model(attacked), y)
    masked = cross_entropy(model(torch.where(pixels, torch.tensor(0.25), x)), y)
    loss = guided(x, y, pixels, noise, 2.0)
    assert loss.item() == pytest.approx((0.3 * clean + 0.7 * adversarial + 0.5 * masked + 2 * penalty).item(), abs=1e-5)
    assert guided.terms.tolist() == pytest.approx([t.item() for t in (clean, adversarial, masked, penalty)], abs=1e-5)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = torch.autograd.grad(
        0.3 * clean + 0.7 * adversarial + 0.5 * masked + 2 * penalty, list(model.parameters())
    )
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(gradients, expected, strict=True))


def test_consistency_compares_with_the_clean_answer() -> None:
    x, y, pixels, noise = batch()
    step = make_step(attack={"method": "none"}, masking={"weight": 2, "loss": "consistency"})
    clean = step.model(x).softmax(1)
    hidden = step.model(torch.where(pixels, torch.tensor(0.25), x))
    expected = functional.kl_div(hidden.log_softmax(1), clean, reduction="batchmean")
    assert step(x, y, pixels, noise, 0.0).item() == pytest.approx(2 * expected.item(), rel=1e-4)
    assert expected.item() > 1e-4


@pytest.mark.parametrize("fill", ["noise", "swap"])
def test_fills(fill: str) -> None:
    x, y, pixels, noise = batch()
    other = torch.rand_like(x)
    step = make_step(attack={"method": "none"}, masking=MaskingConfig(weight=1, fill=fill))
    expected = cross_entropy(step.model(torch.where(pixels, other if fill == "swap" else (noise + 1) / 2, x)), y)
    assert step(x, y, pixels, noise, 0.0, other).item() == pytest.approx(expected.item(), abs=1e-6)


def test_segments_have_their_mean_colours() -> None:
    x = torch.rand(2, 3, 8, 8)
    bands = torch.arange(64).reshape(8, 8).expand(2, 8, 8) // 16  # four bands of two rows
    expected = x.reshape(2, 3, 4, 16).mean(3).repeat_interleave(16, 2).reshape(2, 3, 8, 8)
    assert torch.allclose(segment_means(x, bands.to(torch.uint8)), expected, atol=1e-6)


def test_means_of_a_segment_leave_out_what_is_outside() -> None:
    x = torch.tensor([[[[1.0, 3.0], [0.0, 8.0]]]])
    segments = torch.tensor([[[0, 0], [OUTSIDE, 2]]])
    assert segment_means(x, segments).flatten().tolist() == [2, 2, 0, 8]


@pytest.mark.parametrize("where", ["flagged", "unflagged"])
def test_attacks_change_only_the_pixels_they_may(where: str) -> None:
    for method in ("fgsm", "pgd", "trades"):
        for norm in ("linf", "l2"):
            attack = {"method": method, "eps": 0.1, "norm": norm, "where": where}
            step = make_step(**UNGUIDED, attack=attack, clean_weight=1)
            x, y, pixels, noise = batch()
            seen: list[Tensor] = []
            step.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # noqa: B023
            step(x, y, pixels, noise, 0.0)
            moved = (seen[-1][len(x) :] - x).abs() > 1e-9  # behind the clean images
            assert moved.any()
            assert not (moved & (~pixels if where == "flagged" else pixels)).any()


def test_crafting_does_not_move_batch_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    config = TrainingConfig(masking=MaskingConfig(weight=0), sensitivity=SensitivityConfig(weight=1))
    step = GuidedStep(model, config, torch.zeros(1)).train()  # type: ignore[arg-type]
    step(*batch(), 1.0)
    assert int(model[1].num_batches_tracked) == 1
    assert model.training


def test_flagged_segments_become_hidden_pixels() -> None:
    segments = torch.tensor([[[0, 0], [1, 2]], [[1, 1], [0, OUTSIDE]]])
    flagged = torch.tensor([[True, False, True], [True, True, False]])
    pixels = flagged_pixels(flagged, segments)
    assert pixels[:, 0].tolist() == [[[True, True], [False, True]], [[True, True], [True, False]]]
    x = torch.arange(16.0).reshape(2, 2, 2, 2)
    hidden = hide(x, pixels, torch.tensor([-1.0, -2.0]).reshape(1, 2, 1, 1))
    assert hidden[0].tolist() == [[[-1, -1], [2, -1]], [[-2, -2], [6, -2]]]
    assert hidden[1].tolist() == [[[-1, -1], [-1, 11]], [[-2, -2], [-2, 15]]]


def test_augmentation_moves_images_and_segments_together() -> None:
    x = torch.rand(64, 2, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1
    segments = (x[:, 0] * 10).to(torch.uint8)
    shifts = draw_shifts(64, 8, "crop-flip", torch.Generator().manual_seed(3))
    moved, moved_segments = augment(x, segments, shifts)
    assert moved_segments is not None
    inside = moved[:, 0] > 0  # black is padding
    assert torch.equal(moved_segments, torch.where(inside, (moved[:, 0] * 10).long(), OUTSIDE))
    assert not inside.all()
    offsets, flipped = set(), 0
    for before, after in zip(x, moved, strict=True):
        for flip in (False, True):
            source = functional.pad(before.flip(2) if flip else before, (1, 1, 1, 1))
            for top in range(3):
                for left in range(3):
                    if torch.equal(source[:, top : top + 8, left : left + 8], after):
                        offsets.add((top, left))
                        flipped += flip
    assert offsets == {(top, left) for top in range(3) for left in range(3)}
    assert 16 <= flipped <= 48
    assert draw_shifts(64, 8, "none", torch.Generator()) is None
    assert augment(x, None, None)[0] is x
    one, _ = augment(x[5:7], None, shifts[5:7] if shifts is not None else None)
    assert torch.equal(one, moved[5:7])  # a rank moves its own share alone
