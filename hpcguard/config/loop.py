"""When the closed loop ends."""

from pydantic import Field

from hpcguard.config.section import Section, Share


class LoopConfig(Section):
    rounds: int = Field(3, gt=0)
    """Rounds of attribute, consolidate, refine and evaluate at the most."""
    min_gain: float | None = Field(0.0, ge=0, lt=1)
    """Stop when a round's robust accuracy on the validation split is not by more than this above the best one before
    it; null: never. Needs data.validation."""
    max_jaccard: Share | None = 0.95
    """Stop when the flagged segments of a round are those of the round before: mean Jaccard index over the images at
    least this; null: never."""
