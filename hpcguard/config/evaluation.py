"""How a model is measured."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from hpcguard.config.alarms import AlarmConfig
from hpcguard.config.bound import BoundConfig
from hpcguard.config.corruptions import CorruptionsConfig
from hpcguard.config.explanations import ExplanationsConfig, VulnerabilityConfig
from hpcguard.config.section import Radius, Section
from hpcguard.config.spurious import SpuriousConfig

VERSIONS = ("standard", "rand", "fast", "untargeted", "none")
PARTS = ("alarms", "corruptions", "spurious", "explanations", "vulnerability", "bound")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")


def check_autoattack(value: Any) -> Any:
    known = value in VERSIONS if isinstance(value, str) else isinstance(value, list | tuple) and _are_attacks(value)
    if not known:
        raise PydanticCustomError(
            "autoattack", "write one of {versions}, or a list of different ones of {attacks}",
            {"versions": ", ".join(VERSIONS), "attacks": ", ".join(ATTACKS)},
        )  # fmt: skip
    return value


def _are_attacks(names: list[Any] | tuple[Any, ...]) -> bool:
    return bool(names) and all(name in ATTACKS for name in names) and len(set(names)) == len(names)


class EvaluationConfig(Section):
    PLACE = frozenset({"workers", "threads"})
    split: Literal["test", "validation"] = "test"
    """Images that are measured: of the test part, or, to choose settings by, those that data.validation holds out."""
    images: int | None = Field(None, gt=0)
    """So many of them, drawn by data.seed; null: all."""
    norm: Literal["linf", "l2"] = "linf"
    """The ball that every attack stays in."""
    eps: Radius = 8 / 255
    """Its radius, in pixels from 0 to 1, as a number or a fraction such as 8/255."""
    pgd_steps: int = Field(20, gt=0)
    """Steps of PGD, each of a quarter of the radius."""
    pgd_restarts: int = Field(1, gt=0)
    """Random starts of PGD; an image counts as robust if it survives all."""
    pgd_losses: list[Literal["cross-entropy", "margin"]] = Field(["cross-entropy", "margin"], min_length=1)
    """What PGD ascends, each in turn on what the ones before it left right. The margin (largest other logit less the
    true one) finds what the cross-entropy of large logits hides."""
    autoattack: Annotated[str | list[str], BeforeValidator(check_autoattack)] = "standard"
    """AutoAttack's version (pyautoattack), or a list of its attacks such as [apgd-ce, square], each with one restart.
    Named so in the results: fast is apgd-ce and apgd-t alone, untargeted apgd-ce, fab and square, for fewer than 4
    classes; none leaves it out."""
    curve: list[Annotated[Radius, Field(gt=0)]] = []
    """Radii at which PGD is run too, for accuracy against radius."""
    curve_images: int = Field(1000, gt=0)
    """How many of the images are attacked at these radii: the first."""
    batch_size: int = Field(256, gt=0, le=1_000_000)
    """Consecutive images that are attacked together and published together: what a kill loses at the most."""
    explained: int = Field(8, ge=0)
    """Test images explained with every model, for the report's pictures."""
    workers: int = Field(1, gt=0, le=1024)
    """Batches attacked at once, each in a process of its own."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each worker process."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the attacks; PGD's random starts are keyed by (seed, image id)."""
    alarms: AlarmConfig = AlarmConfig()
    """Signs that attacks failed rather than that the model is robust; measured with every model."""
    corruptions: CorruptionsConfig = CorruptionsConfig()
    """Accuracy on corrupted images."""
    spurious: SpuriousConfig = SpuriousConfig()
    """Which segments of test images count as flagged in what follows, for every model alike."""
    explanations: ExplanationsConfig = ExplanationsConfig()
    """Quality of explanations; flagged are the segments that the baseline's explanations flag."""
    vulnerability: VulnerabilityConfig = VulnerabilityConfig()
    """Whether flagged segments, by the model's own explanations, are where it is vulnerable."""
    bound: BoundConfig = BoundConfig()
    """Lower bounds of the smallest distortion that changes an answer."""

    @field_validator("eps")
    @classmethod
    def _eps_fits_the_norm(cls, value: float, info: ValidationInfo) -> float:
        return _within(value, info)

    @field_validator("curve")
    @classmethod
    def _curve_ascends(cls, values: list[float], info: ValidationInfo) -> list[float]:
        return sorted({_within(value, info) for value in values})

    @field_validator("pgd_losses")
    @classmethod
    def _losses_differ(cls, values: list[str]) -> list[str]:
        return list(dict.fromkeys(values))

    @field_validator("spurious")
    @classmethod
    def _masks_are_of_training_images(cls, value: SpuriousConfig) -> SpuriousConfig:
        if "outside" in value.criteria:
            raise ValueError("criteria = outside: its masks are of training images, and test images have none")
        return value

    def identity(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).identity() for name in PARTS}
        return {**super().identity(), **parts}


def _within(value: float, info: ValidationInfo) -> float:
    if info.data.get("norm") == "linf" and value > 1:
        raise PydanticCustomError(
            "radius", "input should be less than or equal to 1, for norm linf is in pixels from 0 to 1"
        )
    return value
