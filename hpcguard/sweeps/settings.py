"""Cells to validated settings, each distinct section validated once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from hpcguard.config import BaselineConfig, Config, DataConfig, LimeConfig, ModelConfig, TrainingConfig
from hpcguard.config.explain import explain
from hpcguard.config.objective import AttackConfig, MaskingConfig, SensitivityConfig
from hpcguard.config.section import Section
from hpcguard.config.spurious import SpuriousConfig
from hpcguard.errors import InputError
from hpcguard.runs import digest_file, digest_json
from hpcguard.sweeps.axes import ROUNDS
from hpcguard.sweeps.grid import Cell
from hpcguard.sweeps.listing import listing_digest

KINDS: dict[str, type[Section]] = {
    "data": DataConfig, "model": ModelConfig, "attribution": LimeConfig, "baseline": BaselineConfig,
    "refinement": TrainingConfig,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A section and the digest of all that results depend on in it."""

    section: Any  # one of KINDS, or None for no baseline
    digest: str


@dataclass(frozen=True)
class Settings:
    data: Part
    model: Part
    attribution: Part
    baseline: Part
    refinement: Part
    rounds: int


class Resolver:
    """Settings of cells over one base."""

    def __init__(self, base: Config) -> None:
        # What was not written is left out: a key's default may exclude another's being set.
        self._base = base.model_dump(mode="json", exclude_unset=True)
        self._validation_eps = base.validation_eps
        self._parts: dict[tuple[str, str, bool], Part] = {}

    def settings(self, cell: Cell) -> Settings:
        """Raises InputError that names the cell, the key and what is allowed."""
        by_section: dict[str, dict[str, Any]] = {name: {} for name in KINDS}
        rounds = 1
        for key, value in cell.changes.items():
            section, _, rest = key.partition(".")
            if key == ROUNDS:
                rounds = value
            else:
                by_section[section][rest] = value
        try:
            data = self._part("data", by_section.pop("data"))
            split = bool(data.section.validation)
            parts = {"data": data, **{name: self._part(name, each, split) for name, each in by_section.items()}}
            if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
                raise InputError(f"rounds = {rounds}: write a whole number from 1")
            if parts["baseline"].section and parts["model"].section.weights:
                raise InputError("baseline: model.weights is set too; keep one of them (baseline: null removes it)")
        except InputError as error:
            raise InputError(f"cell {cell.name}: {error}") from error
        return Settings(**parts, rounds=rounds)

    def _part(self, name: str, changes: Mapping[str, Any], split: bool = False) -> Part:
        """split: whether trainings have a validation split."""
        key = (name, json.dumps(changes, sort_keys=True), split)
        if key not in self._parts:
            section = _validated(name, _changed(self._base.get(name), changes))
            if isinstance(section, TrainingConfig):
                self._parts[key] = training_part(self._with_validation(section, split))
            else:
                self._parts[key] = Part(section, _digest(section))
        return self._parts[key]

    def _with_validation(self, training: TrainingConfig, split: bool) -> TrainingConfig:
        """With the radius of the validation attack written out, as the best epoch is chosen by it, or with none."""
        if split:
            return training.model_copy(update={"validation_eps": self._validation_eps(training)})
        unused = {name: TrainingConfig.model_fields[name].default for name in ("validation_eps", "validation_images")}
        return training.model_copy(update=unused)


def _changed(values: Any, changes: Mapping[str, Any]) -> Any:
    """A section's values with dotted keys set; the key '' sets it as a whole."""
    if "" in changes:
        return changes[""]
    changed = _copied(values) if isinstance(values, dict) else {} if changes else values
    for key, value in changes.items():
        *path, last = key.split(".")
        place = changed
        for name in path:
            if not isinstance(place.get(name), dict):
                place[name] = {}
            place = place[name]
        place[last] = value
    return changed


def _copied(values: Any) -> Any:
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, dict) else values


def _validated(name: str, values: Any) -> Section | None:
    if name == "baseline" and values is None:
        return None
    kind = KINDS[name]
    try:
        return kind.model_validate({} if values is None else values)
    except ValidationError as error:
        raise InputError(explain(error, kind, name)) from error


def _digest(section: Section | None) -> str:
    if section is None:
        return ""
    identity = section.identity()
    if isinstance(section, DataConfig) and section.name == "image-folder":  # the others are the same everywhere
        identity["files"] = listing_digest(section.root)
    return digest_json(identity)


def training_part(training: TrainingConfig) -> Part:
    """A training with what it does not use set to the defaults, so that trainings that do the same are equal."""
    used = TrainingConfig(**{name: getattr(training, name) for name in TrainingConfig.model_fields} | _unused(training))
    identity = used.identity()
    if used.guided:
        masks = used.spurious.foreground if "outside" in used.spurious.criteria else None
        if masks is not None and not masks.is_file():
            raise InputError(f"refinement.spurious.foreground = {masks}: no such file")
        identity["spurious"] = {**used.spurious.identity(), "foreground": digest_file(masks) if masks else None}
    return Part(used, digest_json(identity))


def _unused(training: TrainingConfig) -> dict[str, Any]:
    unused: dict[str, Any] = {}
    if not training.attacked:
        unused |= {"attack": AttackConfig(), "adversarial_weight": 0.0}
    if not training.masking.weight:
        unused["masking"] = MaskingConfig(weight=0)
    if not training.sensitivity.weight:
        unused["sensitivity"] = SensitivityConfig(weight=0)
    if not training.guided:
        unused["spurious"] = SpuriousConfig()
    return unused


def of_round(refinement: Part, number: int) -> Part:
    """The training of one round: each has a seed of its own, as in hpcguard.loop."""
    if number == 1:
        return refinement
    seed = refinement.section.seed + number - 1
    return training_part(refinement.section.model_copy(update={"seed": seed}))
