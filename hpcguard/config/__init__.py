"""Configuration: one pydantic model a section, read from YAML with dotted overrides.

Every key's meaning stands under its field; `--help` of a stage prints it from there.
"""

from hpcguard.config.cluster import ClusterConfig, JobConfig, SlurmConfig
from hpcguard.config.evaluation import EvaluationConfig
from hpcguard.config.explain import describe_keys
from hpcguard.config.inputs import SEGMENTATION_OPTIONS, DataConfig, LimeConfig, ModelConfig
from hpcguard.config.load import RECORDED, load_config
from hpcguard.config.loop import LoopConfig
from hpcguard.config.objective import AttackConfig, MaskingConfig, SensitivityConfig
from hpcguard.config.root import Config
from hpcguard.config.spurious import SpuriousConfig
from hpcguard.config.training import BaselineConfig, TrainingConfig

__all__ = [
    "RECORDED",
    "SEGMENTATION_OPTIONS",
    "AttackConfig",
    "BaselineConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "JobConfig",
    "LimeConfig",
    "LoopConfig",
    "MaskingConfig",
    "ModelConfig",
    "SensitivityConfig",
    "SlurmConfig",
    "SpuriousConfig",
    "TrainingConfig",
    "describe_keys",
    "load_config",
]
