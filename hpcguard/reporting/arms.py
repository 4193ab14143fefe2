"""Arm: all that is known of one model, checked before anything is drawn from it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcguard.errors import InputError
from hpcguard.reporting.result_schema import check_sections
from hpcguard.runs import differences

TITLES = {"all-attacks": "all attacks", "corrupted": "corruptions"}
LOSS_TERMS = ("clean", "adversarial", "masked", "sensitivity")


@dataclass(frozen=True)
class Arm:
    """One model of a run: its result, and what there is of its training and explanations."""

    name: str
    result: dict[str, Any]
    training: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    explanations: dict[str, np.ndarray] | None = None
    outcomes: Mapping[str, np.ndarray] = field(default_factory=dict)  # by attack, which images stayed right, bool [N]
    tables: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)  # of other kinds, columns by name

    @property
    def split(self) -> str:
        """The part of the data that it was measured on."""
        return str(self.result.get("split", "test"))

    @property
    def trusted(self) -> bool:
        return not self.red

    @property
    def strongest(self) -> tuple[str, dict[str, Any]]:
        """What it is to be judged by: all attacks together, or where that is not recorded, the last of them."""
        worst = self.result.get("worst")
        last = list(self.attacks)[-1]
        return ("all attacks", worst) if worst and last != "clean" else (last, self.attacks[last])

    @property
    def checked(self) -> bool:
        """Whether alarms were looked for."""
        return any(row["red"] is not None for row in self.result.get("alarms", []))

    @property
    def red(self) -> list[Mapping[str, Any]]:
        """Alarms that say its attacks failed."""
        return [row for row in self.result.get("alarms", []) if row["red"]]

    @property
    def attacks(self) -> dict[str, dict[str, Any]]:
        """Accuracy by attack, from the weakest to the strongest."""
        return self.result["attacks"]

    @property
    def evaluation(self) -> dict[str, Any]:
        """The settings that this arm was measured with."""
        return self.result["identity"]["evaluation"]


def check_result(values: Mapping[str, Any], name: str, where: str) -> None:
    """Raise InputError unless `values` is a whole result of the arm `name`."""

    def check() -> None:
        _expect(values["arm"] == name, f"arm is {values['arm']!r}, expected {name!r}")
        _expect("clean" in values["attacks"], "attacks has no row clean")
        for attack, row in values["attacks"].items():
            _check_attack(attack, row)
        if values.get("worst") is not None:
            _check_attack("worst", values["worst"])
        _number(values["identity"]["evaluation"], "eps")
        _expect(isinstance(values["identity"]["test_sha256"], str), "identity.test_sha256 is no digest")
        _number(values, "images", "seconds")
        _expect(isinstance(values["hardware"], dict), "hardware is no object")
        _expect("explanation_jaccard5" in values, "explanation_jaccard5 is missing")
        check_sections(values)

    _checked(check, where, "delete it and run `python -m hpcguard.evaluate` again")


def check_training(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless `values` is a whole training.json."""

    def check() -> None:
        _number(values, "steps", "seconds", "world_size")
        _number(values["last_epoch"], "epoch", "loss", *LOSS_TERMS)
        _expect(isinstance(values["weights_sha256"], str), "weights_sha256 is no digest")
        for key in ("clean_weight", "adversarial_weight"):
            _number(values["identity"]["training"], key)
        _expect(isinstance(values["spurious"], dict), "spurious is no object")

    _checked(check, where, "delete its folder and run `python -m hpcguard.refine` again")


def check_store(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless `values` is a whole store.json."""

    def check() -> None:
        _number(values, "images", "shards", "worker_seconds")
        _number(values["statistics"], "segments", "score", "relative_error", "samples", "accuracy")
        _expect(isinstance(values["fingerprint"], str), "fingerprint is no digest")

    _checked(check, where, "run `python -m hpcguard.consolidate` again")


def check_rounds(values: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless `values` is a whole loop.json."""

    def check() -> None:
        for each in values["rounds"]:
            _number(each, "number")
            _number(each["spurious"], "flagged")
            for key in ("jaccard", "validation_clean", "validation_robust"):
                _expect(each[key] is None or 0 <= each[key] <= 1, f"{key} is {each[key]!r}")

    _checked(check, where, "run `python -m hpcguard.loop` again")


def parse_log(text: str, where: str) -> list[dict[str, Any]]:
    """Epochs of a log.jsonl. An epoch that was trained again replaces what it and its followers had logged."""
    epochs: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            entry = json.loads(line)
            _number(entry, "epoch", "loss")
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{where}: line {number} is damaged ({error}); delete that line") from error
        epochs = [earlier for earlier in epochs if earlier["epoch"] < entry["epoch"]] + [entry]
    return epochs


def check_comparable(arms: Sequence[Arm]) -> None:
    """Raise InputError unless all arms were measured alike, and with the weights that their training describes."""
    for arm in arms:
        changed = differences(_conditions(arms[0]), _conditions(arm))
        if changed:
            raise InputError(
                f"arm {arm.name} was not measured as arm {arms[0].name} was: {changed}; "
                "run `python -m hpcguard.evaluate` again"
            )
        measured = arm.result["identity"].get("weights_sha256")
        if arm.training and arm.training["weights_sha256"] != measured:
            raise InputError(
                f"arm {arm.name} was trained again after it was measured; run `python -m hpcguard.evaluate` again"
            )


def attack_title(name: str) -> str:
    """An attack's name as the field writes it: pgd-20 is PGD-20."""
    if name in TITLES:
        return TITLES[name]
    family, dash, version = name.partition("-")
    return {"fgsm": "FGSM", "pgd": "PGD", "autoattack": "AutoAttack"}.get(family, family) + dash + version


def radius(evaluation: Mapping[str, Any]) -> str:
    """0.1 as '0.100 (25.5/255)', in L2 as '0.1 (L2)'."""
    eps = evaluation["eps"]
    return f"{eps:.3g} (L2)" if evaluation.get("norm") == "l2" else f"{eps:.3f} ({eps * 255:.3g}/255)"


def role(name: str) -> str:
    return {"baseline": "before", "guided": "after"}.get(name, "control")


def _conditions(arm: Arm) -> dict[str, Any]:
    conditions = {
        key: value for key, value in arm.result["identity"].items() if key not in ("weights_sha256", "sibling_sha256")
    }
    return {**conditions, "attacks": ", ".join(arm.attacks), "images": arm.result["images"]}


def _check_attack(name: str, row: Mapping[str, Any]) -> None:
    _number(row, "right", "of", "accuracy", "low", "high")
    _expect(0 <= row["right"] <= row["of"] > 0, f"{name} has {row['right']} right of {row['of']}")
    _expect(abs(row["accuracy"] - row["right"] / row["of"]) < 1e-9, f"{name}: accuracy is not right / of")
    _expect(0 <= row["low"] <= row["high"] <= 1, f"{name}: its interval is no interval")


def _checked(check: Callable[[], None], where: str, remedy: str) -> None:
    try:
        check()
    except KeyError as error:
        raise InputError(f"{where}: damaged, {error.args[0]} is missing; {remedy}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: damaged, {error}; {remedy}") from error


def _number(values: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        value = values[key]
        _expect(isinstance(value, int | float) and np.isfinite(value), f"{key} is {value!r}, expected a number")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
