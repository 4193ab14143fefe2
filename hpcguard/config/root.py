"""The whole configuration, and the arms that it describes."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from hpcguard.config.cluster import ClusterConfig
from hpcguard.config.evaluation import EvaluationConfig
from hpcguard.config.explain import explain
from hpcguard.config.inputs import DataConfig, LimeConfig, ModelConfig
from hpcguard.config.loop import LoopConfig
from hpcguard.config.section import Section
from hpcguard.config.training import BaselineConfig, TrainingConfig
from hpcguard.errors import InputError


class Config(Section):
    run: Path = Path("runs/default")
    """The run folder: everything that the stages write."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    attribution: LimeConfig = LimeConfig()
    cluster: ClusterConfig = ClusterConfig()
    baseline: BaselineConfig | None = None
    """How refine --arm baseline trains the model to be explained, from scratch, when model.weights is null."""
    refinement: TrainingConfig = TrainingConfig()
    """The guided arm."""
    controls: dict[str, dict[str, Any]] = {}
    """Other arms by name, each a set of changes to refinement, for example {pgd: {masking: {weight: 0}}}."""
    evaluation: EvaluationConfig = EvaluationConfig()
    loop: LoopConfig = LoopConfig()

    @model_validator(mode="after")
    def _arms_are_consistent(self) -> "Config":
        if self.baseline is not None and self.model.weights is not None:
            raise ValueError("baseline: model.weights is set too; keep one of them")
        for name in self.controls:
            if name in ("baseline", "guided") or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"controls.{name}: choose another name of letters, digits, - and _ (baseline and guided are taken)"
                )
            self.arm(name)
        return self

    def arms(self) -> list[str]:
        """Names of the arms that refine trains after attribution, controls first."""
        return [*self.controls, "guided"]

    def arm(self, name: str) -> TrainingConfig:
        """How one arm is trained: baseline, guided, or a control."""
        if name == "baseline" and self.baseline is not None:
            return self.baseline
        if name == "guided":
            return self.refinement
        if name not in self.controls:
            known = [*(["baseline"] if self.baseline is not None else []), *self.arms()]
            raise InputError(f"arm {name!r} is not in this configuration: one of {', '.join(known)}")
        merged = _merge(self.refinement.model_dump(), self.controls[name])
        try:
            return TrainingConfig.model_validate(merged)
        except ValidationError as error:
            raise InputError(explain(error, TrainingConfig, f"controls.{name}")) from error

    def validation_eps(self, training: TrainingConfig) -> float:
        """Radius of the attack that an arm's epochs are compared by."""
        if training.validation_eps is not None:
            return training.validation_eps
        of_training = training.attacked and training.attack.norm == "l2"
        return training.attack.eps if of_training else self.evaluation.eps


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
