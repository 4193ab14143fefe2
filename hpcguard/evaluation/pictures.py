"""Explanations of a few test images, for the report's pictures."""

from functools import partial
from typing import Any

import numpy as np
import torch

from hpcguard.attribution import Attribution, explain_batch, true_and_runner_up
from hpcguard.evaluation.case import Case
from hpcguard.evaluation.flags import finite
from hpcguard.metrics.attribution import topk_jaccard


def explain_images(case: Case) -> tuple[Attribution, dict[str, Any]]:
    """Explanations of the case's images, and the mean top-5 Jaccard index of two sampling seeds."""
    model = finite(case.model)
    with torch.inference_mode():
        targets = true_and_runner_up(model(case.x), case.y).cpu().numpy()
    run = partial(explain_batch, lambda batch: model(batch).softmax(1), case.x, case.ids, targets=targets)
    config = case.config.attribution
    first = run(config)
    second = run(config.model_copy(update={"seed": config.seed + 1}), segments=first.segments)
    pairs = zip(first.coefficients[:, 0], second.coefficients[:, 0], strict=True)
    return first, {"jaccard5": float(np.mean([topk_jaccard(one, other) for one, other in pairs]))}
