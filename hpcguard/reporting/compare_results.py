"""Results of several models side by side: what is read of them, and whether they may be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpcguard.errors import InputError
from hpcguard.metrics.paired import Paired, compare_paired
from hpcguard.reporting.arms import Arm
from hpcguard.runs import differences

WORST = "all of them"  # a row of its own: what is right under every attack
AGAIN = "run `python -m hpcguard.evaluate` again"
ANYWAY = ("batch_size", "explained", "images")  # no outcome depends on these, or the images' digest tells it already


class Outcomes(Protocol):
    """Per-image outcomes: image_id and label int64 [N], and by attack which images stayed right, bool [N]."""

    @property
    def image_id(self) -> np.ndarray: ...
    @property
    def label(self) -> np.ndarray: ...
    @property
    def right(self) -> Mapping[str, np.ndarray]: ...


@dataclass(frozen=True)
class Measured:
    """One model's result as `where` holds it, `arm.name` its name in this comparison."""

    where: str
    arm: Arm
    trusted: bool
    red: list[str]
    outcomes: Outcomes | None = None


def _plain_name(value: str) -> str:
    if not 0 < len(value) <= 100 or not value.isprintable() or set(value) & set(" $|,\"'`<>"):
        raise ValueError("expected a name without spaces, of at most 100 characters")
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Accuracy(_Part):
    right: int = Field(ge=0)
    of: int = Field(gt=0, le=10**9)
    accuracy: Share
    low: Share
    high: Share

    @model_validator(mode="after")
    def _fits(self) -> "_Accuracy":
        if self.right > self.of or abs(self.accuracy - self.right / self.of) > 1e-9:
            raise ValueError(f"accuracy {self.accuracy} is not {self.right} right of {self.of}")
        if not self.low <= self.accuracy <= self.high:
            raise ValueError(f"accuracy {self.accuracy} is not in its interval [{self.low}, {self.high}]")
        return self


class _Evaluation(_Part):
    model_config = ConfigDict(extra="allow")
    eps: float = Field(ge=0)


class _Identity(_Part):
    evaluation: _Evaluation
    test_sha256: str = Field(min_length=1, max_length=200)


class _AlarmRow(_Part):
    name: str = Field(min_length=1, max_length=100)
    red: bool | None


class _Result(_Part):
    """What a comparison needs of RUN/results/ARM.json."""

    arm: Name
    attacks: dict[Name, _Accuracy]
    identity: _Identity
    alarms: list[_AlarmRow] = []
    trusted: bool | None = None
    worst: _Accuracy | None = None
    outcomes_sha256: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "_Result":
        if "clean" not in self.attacks:
            raise ValueError("attacks has no row clean")
        red = [row.name for row in self.alarms if row.red]
        if self.trusted is not None and self.trusted == bool(red):
            raise ValueError(f"trusted is {self.trusted}, with {len(red)} red alarms")
        return self


def parse_result(values: Mapping[str, Any], where: str) -> Measured:
    """One result as read from JSON. Raises InputError with the first thing that is wrong."""
    try:
        result = _Result.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"])) or "result"
        raise InputError(f"{where}: damaged, {key[:200]}: {first['msg'][:200]}; {AGAIN}") from error
    red = [row.name for row in result.alarms if row.red]
    held = result.model_dump()
    if held["worst"] is not None:
        held["attacks"][WORST] = held["worst"]
    return Measured(where, Arm(result.arm, held), not red, red)


def check_alike(results: Sequence[Measured]) -> None:
    """Raise InputError with the reason if two results are not of the same images, eps and attacks."""
    first = results[0]
    for other in results[1:]:
        if reason := _unlike(first.arm, other.arm):
            raise InputError(f"{other.where} cannot be compared with {first.where}: {reason}")


def other_settings(results: Sequence[Measured]) -> list[str]:
    """Notes on settings of the attacks that differ and do not forbid comparing, such as the seed."""
    notes = []
    for other in results[1:]:
        then, now = ({k: v for k, v in one.arm.evaluation.items() if k not in ANYWAY} for one in (results[0], other))
        if changed := differences(then, now):
            notes.append(f"{other.arm.name} was measured with other settings than {results[0].arm.name}: {changed}.")
    return notes


def _unlike(first: Arm, other: Arm) -> str:
    if first.result["identity"]["test_sha256"] != other.result["identity"]["test_sha256"]:
        return "other test images; evaluate both with the same data, data.seed and evaluation.images"
    for key, default in (("norm", "linf"), ("eps", None)):
        one, two = (arm.evaluation.get(key, default) for arm in (first, other))
        if one != two:
            return f"{key} {two} against {one}; evaluate both with the same evaluation.{key}"
    if first.attacks.keys() != other.attacks.keys():
        names = [", ".join(arm.attacks) for arm in (other, first)]
        return f"attacked by {names[0]} against {names[1]}; evaluate both with the same attacks"
    for attack, row in first.attacks.items():
        if row["of"] != other.attacks[attack]["of"]:
            return f"{attack} on {other.attacks[attack]['of']} images against {row['of']}; {AGAIN}"
    return ""


def check_outcomes(result: Measured) -> None:
    """Raise InputError unless the per-image outcomes are those that the result sums up."""
    if result.outcomes is None:
        return
    for attack, row in result.arm.attacks.items():
        right = _right(result.outcomes, attack)
        if right is not None and (len(right) != row["of"] or int(right.sum()) != row["right"]):
            raise InputError(
                f"{result.where}: says {row['right']} right of {row['of']} under {attack}, its per-image outcomes "
                f"{int(right.sum())} of {len(right)}: not of one evaluation; {AGAIN}"
            )


def paired_by_attack(first: Measured, other: Measured) -> dict[str, Paired]:
    """The paired comparison under every attack of which both have per-image outcomes.

    Raises InputError if these are of other images, in another order or with other labels.
    """
    if first.outcomes is None or other.outcomes is None:
        return {}
    for column in ("image_id", "label"):
        if not np.array_equal(getattr(first.outcomes, column), getattr(other.outcomes, column)):
            raise InputError(
                f"{other.where} cannot be compared with {first.where}: per-image {column}s differ; {AGAIN}"
            )
    found = {}
    for attack in first.arm.attacks:
        one, two = _right(first.outcomes, attack), _right(other.outcomes, attack)
        if one is not None and two is not None:
            found[attack] = compare_paired(one, two)
    return found


def _right(outcomes: Outcomes, attack: str) -> np.ndarray | None:
    """bool [N]; None where there are none of this attack."""
    if attack == WORST:
        return np.logical_and.reduce(list(outcomes.right.values()))
    return outcomes.right.get(attack)
