"""How a model is measured on corrupted images."""

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator

from hpcguard.config.section import Section

Corruption = Literal[
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
"""The 15 of Hendrycks & Dietterich 2019 in their order, by the names of CIFAR-10-C's files."""
SEVERITIES = (1, 2, 3, 4, 5)


class CorruptionsConfig(Section):
    PLACE = frozenset({"folder", "reference"})  # results carry the files' digest; the mCE is the report's

    images: int | None = Field(0, ge=0)
    """So many of the evaluated test images, the first ones, with every corruption and severity; null: all; 0: do not
    measure corruptions."""
    folder: Path | None = None
    """CIFAR-10-C's or CIFAR-100-C's folder of .npy files; null: hpcguard-c, made from the test images."""
    names: tuple[Corruption, ...] = Field(CORRUPTIONS, min_length=1)
    """Corruptions; means over fewer than the 15 compare with nobody's."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of hpcguard-c."""
    reference: str = "baseline"
    """The arm whose errors are 100% of the mCE."""

    @field_validator("names")
    @classmethod
    def _each_once(cls, value: tuple[Corruption, ...]) -> tuple[Corruption, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"{', '.join(value)}: name each corruption once")
        return value
