"""load_model: a classifier ready to be called."""

from pathlib import Path

import torch

from hpcguard.config import ModelConfig
from hpcguard.models.build import build_model
from hpcguard.models.normalized import Normalized
from hpcguard.models.weights import load_weights


def load_model(
    config: ModelConfig, num_classes: int, channels: int, weights: Path | None, device: torch.device | None = None
) -> Normalized:
    """The configured classifier in eval mode, with `weights` (None: freshly initialised), on `device` (None: CPU)."""
    model = build_model(config, num_classes, channels)
    if weights is not None:
        load_weights(model, weights)
    return model.to(device or torch.device("cpu")).eval()
