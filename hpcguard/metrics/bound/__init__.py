"""The attribution-aware lower bound on adversarial distortion, in three grades that are never mixed (docs/bound.md)."""

from hpcguard.metrics.bound.certified import certified
from hpcguard.metrics.bound.estimated import estimated
from hpcguard.metrics.bound.grades import Distortion, Split, UnsoundBoundError, assert_sound
from hpcguard.metrics.bound.measured import measured
from hpcguard.metrics.bound.table import constant_shares, summarise

__all__ = [
    "Distortion", "Split", "UnsoundBoundError", "assert_sound", "certified", "constant_shares", "estimated", "measured",
    "summarise",
]  # fmt: skip
