"""Masks, losses and augmentation against hand-computed values."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpcguard.config import MaskingConfig, SensitivityConfig, TrainingConfig
from hpcguard.refinement.augment import augment
from hpcguard.refinement.losses import sensitivity_penalty, true_class_margin
from hpcguard.refinement.masking import flagged_pixels, hide
from hpcguard.refinement.step import GuidedStep


def test_flagged_segments_become_hidden_pixels() -> None:
    segments = torch.tensor([[[0, 0], [1, 2]], [[1, 1], [0, 0]]])
    flagged = torch.tensor([[True, False, True], [False, True, False]])
    pixels = flagged_pixels(flagged, segments)
    assert pixels[:, 0].tolist() == [[[True, True], [False, True]], [[True, True], [False, False]]]
    x = torch.arange(16.0).reshape(2, 2, 2, 2)
    hidden = hide(x, pixels, torch.tensor([-1.0, -2.0]).reshape(1, 2, 1, 1))
    assert hidden[0].tolist() == [[[-1, -1], [2, -1]], [[-2, -2], [6, -2]]]
    assert hidden[1].tolist() == [[[-1, -1], [10, 11]], [[-2, -2], [14, 15]]]


class Quadratic(nn.Module):
    """Logits (a, b) . x^2 for one-channel images of 2x2 pixels: margins and their gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 1.0, -1.0, 2.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).square() @ self.weight.T


def test_the_penalty_and_its_gradient_on_a_quadratic_model() -> None:
    model = Quadratic()
    x = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]], requires_grad=True)
    y = torch.tensor([0])
    pixels = torch.tensor([[[[True, False], [True, True]]]])
    logits = model(x)
    # margin = sum (a - b) x^2 with a - b = (1, 1, 4, 2), so its gradient is 2 (a - b) x
    assert true_class_margin(logits, y).item() == pytest.approx(0.01 + 0.04 + 4 * 0.09 + 2 * 0.16)
    slope = 2 * np.array([1, 1, 4, 2]) * np.array([0.1, 0.2, 0.3, 0.4]) * np.array([1, 0, 1, 1])
    penalty = sensitivity_penalty(logits, x, y, pixels)
    assert penalty.item() == pytest.approx((slope**2).mean())
    (gradient,) = torch.autograd.grad(penalty, model.weight)
    # d/da_j mean (2 (a - b) x)^2 = 8 (a - b) x^2 / 4, on flagged pixels only; the opposite for b
    expected = 8 * np.array([1, 1, 4, 2]) * np.array([0.01, 0.04, 0.09, 0.16]) * np.array([1, 0, 1, 1]) / 4
    assert gradient[0].numpy() == pytest.approx(expected, rel=1e-5)
    assert gradient[1].numpy() == pytest.approx(-expected, rel=1e-5)


def test_the_margin_is_to_the_largest_other_logit() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 1.0, 5.0]])
    assert true_class_margin(logits, torch.tensor([0, 1])).tolist() == [0.5, -4.0]


def make_step(**changes: object) -> GuidedStep:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return GuidedStep(model, TrainingConfig(**changes), torch.tensor([0.25]))  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 8, 8, generator=generator)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    return x, torch.tensor([0, 1, 2, 0, 1, 2]), torch.rand(6, 1, 8, 8, generator=generator) > 0.6, noise


def test_with_guidance_off_it_is_pgd_training() -> None:
    """Against torch alone: the cross-entropy on images attacked step by step."""
    step = make_step(masking={"weight": 0}, sensitivity={"weight": 0}, attack={"eps": 0.1, "steps": 3})
    x, y, pixels, noise = batch()
    loss = step(x, y, pixels, noise, 0.0)
    attacked = (x + 0.1 * noise).clamp(0, 1)
    for _ in range(3):
        attacked.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(step.model(attacked), y), attacked)
        attacked = attacked.detach() + 0.025 * gradient.sign()
        attacked = attacked.clamp(x - 0.1, x + 0.1).clamp(0, 1)
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(step.model(attacked), y).item(), abs=1e-6)


def test_every_term_and_all_together() -> None:
    x, y, pixels, noise = batch()
    cross_entropy = nn.functional.cross_entropy
    guided = make_step(
        clean_weight=0.3, adversarial_weight=0.7, attack={"method": "fgsm", "eps": 0.1}, masking={"weight": 0.5}
    )
    model = guided.model
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
    clean = cross_entropy(model(x), y)
    adversarial = cross_entropy(model((x + 0.1 * gradient.sign()).clamp(0, 1)), y)
    masked = cross_entropy(model(torch.where(pixels, torch.tensor(0.25), x)), y)
    penalty = sensitivity_penalty(model(leaf), leaf, y, pixels)
    loss = guided(x, y, pixels, noise, 2.0)
    assert loss.item() == pytest.approx((0.3 * clean + 0.7 * adversarial + 0.5 * masked + 2 * penalty).item(), abs=1e-5)
    assert guided.terms.tolist() == pytest.approx([t.item() for t in (clean, adversarial, masked, penalty)], abs=1e-5)
    # Noise as fill, and the penalty left out of this step.
    noisy = make_step(attack={"method": "none"}, masking=MaskingConfig(weight=1, fill="noise"))
    expected = cross_entropy(noisy.model(torch.where(pixels, (noise + 1) / 2, x)), y)
    assert noisy(x, y, pixels, noise, 0.0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_crafting_does_not_move_batch_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    config = TrainingConfig(masking=MaskingConfig(weight=0), sensitivity=SensitivityConfig(weight=0))
    step = GuidedStep(model, config, torch.zeros(1)).train()  # type: ignore[arg-type]
    step(*batch(), 0.0)
    assert int(model[1].num_batches_tracked) == 1
    assert model.training


def test_augmentation_moves_images_and_masks_together() -> None:
    x = torch.rand(64, 2, 8, 8, generator=torch.Generator().manual_seed(2)) * 0.9 + 0.1
    pixels = x[:, :1] > 0.6
    moved, moved_pixels = augment(x, pixels, "crop-flip", torch.Generator().manual_seed(3))
    inside = moved[:, :1] > 0  # black is padding
    assert torch.equal(moved_pixels, (moved[:, :1] > 0.6) & inside)
    offsets, flipped = set(), 0
    for before, after in zip(x, moved, strict=True):
        for flip in (False, True):
            source = nn.functional.pad(before.flip(2) if flip else before, (1, 1, 1, 1))
            for top in range(3):
                for left in range(3):
                    if torch.equal(source[:, top : top + 8, left : left + 8], after):
                        offsets.add((top, left))
                        flipped += flip
    assert offsets == {(top, left) for top in range(3) for left in range(3)}
    assert 16 <= flipped <= 48
    assert augment(x, pixels, "none", torch.Generator())[0] is x
