"""The terms of the training loss."""

from typing import Literal

from pydantic import Field

from hpcguard.config.section import Epsilon, Section, Weight


class AttackConfig(Section):
    method: Literal["none", "fgsm", "pgd"] = "pgd"
    """Attack that makes the training examples, Linf in [0,1] pixel space."""
    eps: Epsilon = 8 / 255
    """Radius, as a number or a fraction such as 8/255."""
    steps: int = Field(10, gt=0)
    """Steps of PGD."""
    step_size: Epsilon | None = None
    """Step of PGD; null: eps / 4 (FGSM always steps by eps)."""


class MaskingConfig(Section):
    weight: Weight = 0.5
    """Weight of the cross-entropy on images whose flagged segments are hidden; 0: off."""
    fill: Literal["mean", "noise"] = "mean"
    """What flagged segments show: the training set's mean colour, or uniform noise."""


class SensitivityConfig(Section):
    weight: Weight = 1.0
    """Weight of the squared input gradient of the true-class margin over flagged segments; 0: off."""
    every: int = Field(1, gt=0)
    """Apply it in every k-th step, with k times the weight."""
