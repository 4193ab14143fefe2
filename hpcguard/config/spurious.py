"""Which segments count as spurious."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from hpcguard.config.section import Section, Share, Weight

Criterion = Literal["weight", "sensitivity", "instability", "irrelevant", "misleading", "outside"]


def _exactly_one(name: str, bound: float | None, quantile: float | None) -> None:
    if bound is None and quantile is None:
        raise ValueError(f"give {name} (a number) or quantile (a share of the image's own segments)")
    if bound is not None and quantile is not None:
        raise ValueError(f"{name} = {bound:g} and quantile = {quantile:g}: exactly one of both; set the other to null")


class Above(Section):
    above: Weight | None = None
    """Flagged where larger than this."""
    quantile: Share | None = None
    """Flagged where larger than this quantile of the image's own segments (interpolated as numpy does). Within the
    image, so that rows can be judged one by one, and consolidate counts in one pass."""

    @model_validator(mode="after")
    def _one_threshold(self) -> "Above":
        _exactly_one("above", self.above, self.quantile)
        return self


class Below(Section):
    below: Weight | None = None
    """Where smaller than this."""
    quantile: Share | None = None
    """Where smaller than this quantile of the image's own segments."""

    @model_validator(mode="after")
    def _one_threshold(self) -> "Below":
        _exactly_one("below", self.below, self.quantile)
        return self


class IrrelevantConfig(Section):
    coefficient: Below = Below(below=0.01)
    """|Coefficient| of the true label, in probability."""
    interval: Below = Below(below=0.01)
    """Half the width of its 95% interval: small where the coefficient surely is."""


class SpuriousConfig(Section):
    PLACE = frozenset({"foreground"})  # spurious_identity has its digest

    criteria: tuple[Criterion, ...] = Field(("misleading",), min_length=1)
    """Some of weight (|coefficient| of the true label), sensitivity (of the margin to the segment's pixels),
    instability (of the coefficient under noise), irrelevant (surely small weight), misleading (speaks for the wrong
    label), outside (of the foreground masks). The first three are those of arXiv:2601.00968."""
    combine: Literal["any", "all"] = "any"
    """Flag what any criterion flags, or only what all do."""
    share: Share = 0.2
    """Largest share of an image's segments that is flagged: those of strongest evidence."""
    random: bool = False
    """The control: instead, random segments of as nearly as possible the area of the flagged ones, and among them no
    more of these than chance has it."""
    weight: Above = Above(quantile=0.8)
    sensitivity: Above = Above(quantile=0.8)
    instability: Above = Above(quantile=0.8)
    irrelevant: IrrelevantConfig = IrrelevantConfig()
    misleading: Literal["difference", "against", "for-wrong"] = "difference"
    """What speaks for the wrong: a coefficient of the strongest wrong label above that of the true one; one of the true
    label below 0; one of the strongest wrong label above 0."""
    z: float = Field(1.0, ge=0)
    """misleading flags only what lies so many standard errors beyond."""
    foreground: Path | None = None
    """outside: a .npy file of bool or uint8 [images, H, W], nonzero in the foreground, one mask for each image of the
    original training part, in its order (a row a image_id); read by memory map."""
    foreground_share: Share = 0.5
    """outside: a segment with a smaller share of foreground pixels."""
    max_empty: Share = 0.5
    """Refuse to train when a larger share of images has no flagged segment, or has all segments flagged."""

    @field_validator("criteria")
    @classmethod
    def _each_once(cls, value: tuple[Criterion, ...]) -> tuple[Criterion, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: name each criterion once")
        return value

    @model_validator(mode="after")
    def _outside_of_something(self) -> "SpuriousConfig":
        if "outside" in self.criteria and self.foreground is None:
            raise ValueError("criteria = outside: foreground is null; name a .npy file of masks [images, H, W]")
        return self
