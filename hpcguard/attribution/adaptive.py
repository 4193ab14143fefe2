"""How many rows an image gets: a fixed number, or as many as its coefficients need to be precise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcguard.attribution.forward import Perturber
from hpcguard.attribution.sampling import Drawn, coincide
from hpcguard.attribution.surrogate import Surrogate, fit_surrogate, lime_weights
from hpcguard.config import LimeConfig


@dataclass(frozen=True)
class Fitted:
    surrogate: Surrogate
    num_samples: int


def fit_all(
    perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, config: LimeConfig
) -> list[Fitted]:
    """Evaluate every drawn row, row 0 from `original` [B, L], and fit every image's surrogate, on the host."""
    rows = [torch.from_numpy(each.rows) for each in drawn]
    answers = perturber.evaluate([(i, each[1:]) for i, each in enumerate(rows)], labels, config.deduplicate)
    full = [torch.cat([original[i : i + 1], answer]) for i, answer in enumerate(answers)]
    return [_fit(*each, config) for each in zip(drawn, rows, full, strict=True)]


def fit_adaptively(
    perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, config: LimeConfig
) -> list[Fitted]:
    """Give each image rows until every 95% interval is within config.precision of the label's largest |coefficient|.

    config.tolerance is added to that: what a saturated model hardly reacts to needs no digits. Looks first at
    config.min_samples rows (one more where that leaves a pair whole), then at ever more, by half, up to all drawn.
    """
    rows = [torch.from_numpy(each.rows) for each in drawn]
    answers = [original[i : i + 1] for i in range(len(drawn))]
    fitted: dict[int, Fitted] = {}
    active = list(range(len(drawn)))
    goal = config.min_samples
    while active:
        goal = _whole_pairs(goal, config.design)
        jobs = [(i, rows[i][len(answers[i]) : goal]) for i in active]
        for (i, _), answer in zip(jobs, perturber.evaluate(jobs, labels, config.deduplicate), strict=True):
            answers[i] = torch.cat([answers[i], answer])
            fitted[i] = _fit(drawn[i], rows[i][: len(answers[i])], answers[i], config)
        active = [i for i in active if len(answers[i]) < len(rows[i]) and not _enough(drawn[i], fitted[i], config)]
        goal = 2 * goal if config.design == "sobol" else math.ceil(1.5 * goal)
    return [fitted[i] for i in range(len(drawn))]


def _fit(drawn: Drawn, rows: Tensor, probability: Tensor, config: LimeConfig) -> Fitted:
    # The penalty weighs as much as at the number of rows asked for, whether fewer were enough or all 2^d are known.
    whole = drawn.complete and len(rows) == len(drawn.rows)
    share = len(rows) / config.most_samples if config.num_samples == "auto" or whole else 1.0
    weights = lime_weights(rows, config.kernel_width)
    return Fitted(fit_surrogate(rows, probability, weights, config.ridge * share, drawn.paired, whole), len(rows))


def _enough(drawn: Drawn, fitted: Fitted, config: LimeConfig) -> bool:
    largest = fitted.surrogate.coefficients.abs().amax(1, keepdim=True)
    precise = fitted.surrogate.interval <= config.precision * largest + config.tolerance
    # Segments that the first rows always hide together leave no residual to be seen in an interval.
    return bool(precise.all()) and not coincide(drawn.rows[1 : fitted.num_samples])


def _whole_pairs(rows: int, design: str) -> int:
    """Row 0 stands alone, so that pairs end at odd numbers."""
    return rows + 1 - rows % 2 if design in ("antithetic", "hadamard") else rows
