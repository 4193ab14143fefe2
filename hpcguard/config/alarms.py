"""How masked gradients are looked for."""

from pydantic import Field

from hpcguard.config.section import Section


class AlarmConfig(Section):
    images: int = Field(128, gt=0)
    """Test images that the alarms are measured on, drawn by evaluation.seed; all if there are fewer. Limits allow for
    the noise of so few."""
    restarts: int = Field(2, gt=0)
    """Restarts of the attack of five times the steps that PGD is held against."""
    queries: int = Field(1000, gt=0)
    """Queries an image of the black-box attack (Square)."""
