"""Explanations of test images with everything that the rule evaluation.spurious looks at."""

import numpy as np
from torch import Tensor, nn

from hpcguard.config import Config
from hpcguard.metrics.claim import explained_rows
from hpcguard.metrics.robustness import Model


def finite(model: nn.Module) -> Model:
    """The model for explanations: a logit that is NaN or infinite says nothing, and is 0."""
    return lambda x: model(x).nan_to_num(0.0, 0.0, 0.0)


def explained(config: Config, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Rows by the store's column names, for `flag_segments`."""
    noisy = "instability" in config.evaluation.spurious.criteria
    return explained_rows(model, x, y, ids, config.attribution, noisy)
