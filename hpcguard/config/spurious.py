"""Which segments count as spurious."""

from typing import Literal

from pydantic import Field

from hpcguard.config.section import Section, Share


class SpuriousConfig(Section):
    rule: Literal["misleading", "weight", "random"] = "misleading"
    """misleading: supports the strongest wrong class more than the true one; weight: large |coefficient| (the paper's
    tau); random: as many random segments as misleading flags, the control."""
    share: Share = 0.2
    """Largest share of an image's segments that is flagged."""
    z: float = Field(1.0, ge=0)
    """misleading flags only what lies so many standard errors above zero."""
    max_empty: Share = 0.9
    """Refuse to train when a larger share of images has no flagged segment, or has all segments flagged."""
