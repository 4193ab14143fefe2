"""Quality of a model's explanations, image by image."""

import torch
from torch import Tensor

from hpcguard.attacks import pgd, random_start
from hpcguard.attribution import true_and_runner_up
from hpcguard.evaluation.case import Case, Measured
from hpcguard.evaluation.flags import explained
from hpcguard.metrics.explanations import explanation_quality
from hpcguard.metrics.robustness import Pgd, start_noise
from hpcguard.refinement.spurious import flag_segments


def measure_quality(case: Case) -> Measured:
    """Columns of `explanation_quality`, float64 [B] each; flagged is what the baseline's explanations flag."""
    wanted = case.config.evaluation.explanations
    flagged = None
    if case.baseline is not None:
        rows = explained(case.config, case.baseline, case.x, case.y, case.ids)
        flagged = flag_segments(rows, case.config.evaluation.spurious, case.config.evaluation.seed)
    with torch.no_grad():
        targets = true_and_runner_up(case.model(case.x), case.y).cpu().numpy()
    return Measured(explanation_quality(
        lambda batch: case.model(batch).softmax(1), case.x, _attacked(case), case.ids, targets,
        case.config.attribution, flagged, wanted.repeats, wanted.top, lambda count: case.report(),
    ))  # fmt: skip


def _attacked(case: Case) -> Tensor:
    """The PGD example of each image."""
    config = case.config.evaluation
    how = Pgd(config.pgd_steps, norm=config.norm, seed=config.seed)
    noise = start_noise(case.ids, case.x.shape[1:], how, 0).to(case.x.device)
    start = random_start(case.x, noise, config.eps, config.norm)
    return pgd(case.model, case.x, case.y, config.eps, config.pgd_steps, start=start, norm=config.norm)
