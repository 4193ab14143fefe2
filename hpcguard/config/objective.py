"""The terms of the training loss."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from hpcguard.config.section import Radius, Section, Weight


class AttackConfig(Section):
    method: Literal["none", "fgsm", "pgd", "trades"] = "pgd"
    """Attack that makes the training examples, in [0,1] pixel space. trades: PGD on the divergence from the clean
    answer, which is then the adversarial term too (adversarial_weight is its beta; set clean_weight to 1)."""
    norm: Literal["linf", "l2"] = "linf"
    """Ball that the attack stays in."""
    eps: Radius = 8 / 255
    """Its radius, as a number or a fraction such as 8/255; of l2 over all pixels and channels, such as 0.5."""
    steps: int = Field(10, gt=0)
    """Steps of pgd and trades."""
    step_size: Radius | None = None
    """Length of a step; null: eps / 4 (FGSM always steps by eps)."""
    where: Literal["everywhere", "flagged", "unflagged"] = "everywhere"
    """Pixels that the attack may change: all, or only those on, or off, flagged segments."""

    @field_validator("eps")
    @classmethod
    def _eps_of_its_norm(cls, eps: float, info: ValidationInfo) -> float:
        if info.data.get("norm") == "linf" and eps > 1:
            raise PydanticCustomError("radius", "at most 1 in linf, for pixels lie in [0, 1]; write for example 8/255")
        return eps


class MaskingConfig(Section):
    weight: Weight = 0.5
    """Weight of the loss on images whose flagged segments are hidden; 0: off."""
    loss: Literal["cross-entropy", "consistency"] = "cross-entropy"
    """cross-entropy: the hidden image must have its label; consistency: the answer of the clean image (KL)."""
    of: Literal["clean", "attacked"] = "clean"
    """Which image has them hidden: the clean one, or the one that the attack has made, for the price of no attack more.
    With clean, masking adds a clean loss, which trades robust for clean accuracy."""
    fill: Literal["mean", "segment-mean", "noise", "swap"] = "mean"
    """What flagged segments show: the training set's mean colour, their own mean colour, uniform noise, or what
    another image of the batch has there."""


class SensitivityConfig(Section):
    weight: Weight = 0.01
    """Weight of the squared norm of the true-class margin's input gradient over flagged segments; 0: off. Networks
    differ by orders of magnitude: look at the term in the log, and keep weight times term well below the loss."""
    every: int = Field(1, gt=0)
    """Apply it in every k-th step, with k times the weight."""
    at: Literal["start", "clean"] = "start"
    """Where the gradient is taken. start: where PGD begins, so that the two share a pass and the gradient gives PGD's
    first step (with other attacks: the clean image); clean: always the clean image, which costs two passes more."""
