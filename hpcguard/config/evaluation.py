"""How a model is measured."""

from typing import Literal

from pydantic import Field

from hpcguard.config.section import Epsilon, Section


class EvaluationConfig(Section):
    PLACE = frozenset({"workers", "threads"})
    images: int | None = Field(None, gt=0)
    """Test images, drawn by data.seed; null: all."""
    eps: Epsilon = 8 / 255
    """Linf radius of every attack, as a number or a fraction such as 8/255."""
    pgd_steps: int = Field(20, gt=0)
    """Steps of PGD."""
    pgd_restarts: int = Field(1, gt=0)
    """Random restarts of PGD; an image counts as robust if it survives all."""
    autoattack: Literal["standard", "rand", "fast", "untargeted", "none"] = "standard"
    """AutoAttack's version (pyautoattack). Named so in the results: fast is its apgd-ce and apgd-t alone, untargeted
    its apgd-ce, fab and square, for fewer than 4 classes."""
    batch_size: int = Field(256, gt=0, le=1_000_000)
    """Images in one forward pass."""
    explained: int = Field(8, ge=0)
    """Test images explained with every model, for the report's pictures."""
    workers: int = Field(1, gt=0, le=1024)
    """Models evaluated at once, each in a process of its own."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each worker process."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the attacks."""
