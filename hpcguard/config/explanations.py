"""How explanations are judged, and the claim about flagged segments tested."""

from pydantic import Field

from hpcguard.config.section import Epsilon, Section


class ExplanationsConfig(Section):
    images: int = Field(0, ge=0)
    """So many of the evaluated test images, the first ones, have their explanations judged with every model: two or
    more explanations of each, one of its PGD example, and deletion and insertion; 0: none."""
    repeats: int = Field(2, ge=2, le=100)
    """Explanations with sampling seeds of their own, for stability."""
    top: int = Field(5, gt=0)
    """Superpixels of largest |coefficient| that two explanations are compared by."""


class VulnerabilityConfig(Section):
    images: int = Field(0, ge=0)
    """So many of the evaluated test images, the first ones, are attacked on flagged segments, on random ones of equal
    area and on the rest; 0: none."""
    radii: tuple[Epsilon, ...] = Field((1 / 255, 2 / 255, 4 / 255, 8 / 255), min_length=1)
    """Linf radii."""
    steps: int = Field(10, gt=0)
    """Steps of PGD."""
    draws: int = Field(5, gt=0, le=1000)
    """Random choices of segments for each image."""
