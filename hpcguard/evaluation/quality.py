"""Quality of a model's explanations, image by image."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hpcguard.attacks import pgd, random_start
from hpcguard.attribution import true_and_runner_up
from hpcguard.evaluation.case import Case, Measured, spread
from hpcguard.evaluation.flags import explained, finite
from hpcguard.metrics.explanations import explanation_quality
from hpcguard.metrics.robustness import Pgd, start_noise
from hpcguard.refinement.spurious import flag_segments

FIGURES = ("stability", "deletion", "insertion", "faithfulness", "attacked_jaccard", "attacked_spearman")


def measure_quality(case: Case) -> Measured:
    """Columns of `explanation_quality`, float64 [B] each; flagged is what the baseline's explanations flag. NaN for
    images without a finite answer."""
    answered, which = case.answered()
    names = (*FIGURES, *(["flagged_share"] if case.other is not None else []))
    figures = _quality(answered) if which.any() else {name: np.zeros(0) for name in names}
    return Measured(spread(which, {name: figures[name] for name in names}))


def _quality(case: Case) -> Mapping[str, np.ndarray]:
    wanted, model = case.config.evaluation.explanations, finite(case.model)
    flagged = None
    if case.other is not None:
        rows = explained(case.config, case.other, case.x, case.y, case.ids)
        flagged = flag_segments(rows, case.config.evaluation.spurious, case.config.evaluation.seed)
    with torch.no_grad():
        targets = true_and_runner_up(case.model(case.x), case.y).cpu().numpy()
    return explanation_quality(
        lambda batch: model(batch).softmax(1), case.x, _attacked(case), case.ids, targets, case.config.attribution,
        flagged, wanted.repeats, wanted.top, lambda count: case.report(),
    )  # fmt: skip


def _attacked(case: Case) -> Tensor:
    """The PGD example of each image."""
    config = case.config.evaluation
    how = Pgd(config.pgd_steps, norm=config.norm, seed=config.seed)
    noise = start_noise(case.ids, case.x.shape[1:], how, 0).to(case.x.device)
    start = random_start(case.x, noise, config.eps, config.norm)
    return pgd(case.model, case.x, case.y, config.eps, config.pgd_steps, start=start, norm=config.norm)
