"""How many rows an image gets: a fixed number, or as many as its coefficients need to be precise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcguard.attribution.forward import Perturber
from hpcguard.attribution.sampling import Drawn
from hpcguard.attribution.surrogate import Surrogate, fit_surrogate, lime_weights
from hpcguard.config import LimeConfig

Z95 = 1.96


@dataclass(frozen=True)
class Fitted:
    surrogate: Surrogate
    num_samples: int


def fit_all(
    perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, config: LimeConfig
) -> list[Fitted]:
    """Evaluate every drawn row, row 0 from `original` [B, L], and fit every image's surrogate."""
    rows = [torch.as_tensor(each.rows, device=original.device) for each in drawn]
    answers = perturber.evaluate([(i, each[1:]) for i, each in enumerate(rows)], labels, config.deduplicate)
    full = [torch.cat([original[i : i + 1], answer]) for i, answer in enumerate(answers)]
    return [_fit(*each, config) for each in zip(drawn, rows, full, strict=True)]


def fit_adaptively(
    perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, config: LimeConfig
) -> list[Fitted]:
    """Give each image rows until every coefficient's 95% interval is within config.precision of the label's largest.

    Looks at config.min_samples rows first, then at ever more (by half, so that looking costs little), up to all drawn.
    """
    rows = [torch.as_tensor(each.rows, device=original.device) for each in drawn]
    answers = [original[i : i + 1] for i in range(len(drawn))]
    fitted: dict[int, Fitted] = {}
    active = list(range(len(drawn)))
    goal = config.min_samples
    while active:
        jobs = [(i, rows[i][len(answers[i]) : goal]) for i in active]
        for (i, _), answer in zip(jobs, perturber.evaluate(jobs, labels, config.deduplicate), strict=True):
            answers[i] = torch.cat([answers[i], answer])
            fitted[i] = _fit(drawn[i], rows[i][: len(answers[i])], answers[i], config)
        active = [i for i in active if len(answers[i]) < len(rows[i]) and not _precise(fitted[i], config.precision)]
        goal = 2 * goal if config.design == "sobol" else 2 * math.ceil(0.75 * goal)
    return [fitted[i] for i in range(len(drawn))]


def _fit(drawn: Drawn, rows: Tensor, probability: Tensor, config: LimeConfig) -> Fitted:
    # The penalty weighs as much as at the number of rows asked for, whether fewer were enough or all 2^d are known.
    whole = drawn.complete and len(rows) == len(drawn.rows)
    share = len(rows) / config.most_samples if config.num_samples == "auto" or whole else 1.0
    weights = lime_weights(rows, config.kernel_width)
    return Fitted(fit_surrogate(rows, probability, weights, config.ridge * share, drawn.paired, whole), len(rows))


def _precise(fitted: Fitted, precision: float) -> bool:
    largest = fitted.surrogate.coefficients.abs().amax(1, keepdim=True)
    return bool((Z95 * fitted.surrogate.standard_error <= precision * largest).all())
