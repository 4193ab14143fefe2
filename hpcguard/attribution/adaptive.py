"""How many rows an image gets: a fixed number, or as many as its coefficients need to be precise."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcguard.attribution.forward import Perturber
from hpcguard.attribution.sampling import Drawn, coincide, distinct_rows
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
    answers = _Answers(perturber, drawn, original, labels, config.deduplicate)
    jobs = [(i, len(each.rows)) for i, each in enumerate(drawn)]
    answers.extend(jobs)
    return [_fit(drawn[i], count, answers.of(i, count), config) for i, count in jobs]


def fit_adaptively(
    perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, config: LimeConfig
) -> list[Fitted]:
    """Give each image rows until every 95% interval is within config.precision of the label's largest |coefficient|.

    config.tolerance is added to that: what a saturated model hardly reacts to needs no digits. Looks first at
    config.min_samples rows (one more where that leaves a pair whole), then at ever more, by half, up to all drawn.
    """
    answers = _Answers(perturber, drawn, original, labels, config.deduplicate)
    fitted: dict[int, Fitted] = {}
    active = list(range(len(drawn)))
    goal = config.min_samples
    while active:
        goal = _whole_pairs(goal, config.design)
        jobs = [(i, min(goal, len(drawn[i].rows))) for i in active]
        answers.extend(jobs)
        for i, count in jobs:
            # The penalty weighs as much as it would at the most rows, so that few rows are not shrunk for being few.
            fitted[i] = _fit(drawn[i], count, answers.of(i, count), config, count / config.max_samples)
        active = [i for i, count in jobs if count < len(drawn[i].rows) and not _enough(drawn[i], fitted[i], config)]
        goal = 2 * goal if config.design == "sobol" else math.ceil(1.5 * goal)
    return [fitted[i] for i in range(len(drawn))]


class _Answers:
    """What the model said to the first rows of each image; equal rows are evaluated once, if it is to be so."""

    def __init__(
        self, perturber: Perturber, drawn: list[Drawn], original: Tensor, labels: Tensor, deduplicate: bool
    ) -> None:
        self.perturber, self.original, self.labels = perturber, original, labels
        rows = [each.rows[1:] for each in drawn]
        # (rows in the order of their first appearance, which of them each row is)
        self.distinct = [distinct_rows(each) if deduplicate else (each, np.arange(len(each))) for each in rows]
        self.known = [original.new_empty(0, original.shape[1], dtype=torch.float64) for _ in drawn]

    def extend(self, jobs: list[tuple[int, int]]) -> None:
        """Evaluate what is missing for the first `count` rows of each image, for (image, count)."""
        todo = []
        for i, count in jobs:
            rows, which = self.distinct[i]
            needed = which[: count - 1].max(initial=-1) + 1
            todo.append((i, torch.from_numpy(rows[len(self.known[i]) : needed])))
        for (i, _), answer in zip(todo, self.perturber.evaluate(todo, self.labels), strict=True):
            self.known[i] = torch.cat([self.known[i], answer])

    def of(self, image: int, count: int) -> Tensor:
        """Probabilities of the image itself and of its next rows, float64 [count, L]."""
        which = torch.from_numpy(self.distinct[image][1][: count - 1])
        return torch.cat([self.original[image : image + 1].double(), self.known[image][which]])


def _fit(drawn: Drawn, count: int, probability: Tensor, config: LimeConfig, share: float = 1.0) -> Fitted:
    rows = torch.from_numpy(drawn.rows[:count])
    whole = drawn.complete and count == len(drawn.rows)
    if whole:  # all 2^d rows stand for the number asked for
        share = count / config.most_samples
    weights = lime_weights(rows, config.kernel_width)
    return Fitted(fit_surrogate(rows, probability, weights, config.ridge * share, drawn.paired, whole), count)


def _enough(drawn: Drawn, fitted: Fitted, config: LimeConfig) -> bool:
    largest = fitted.surrogate.coefficients.abs().amax(1, keepdim=True)
    precise = fitted.surrogate.interval <= config.precision * largest + config.tolerance
    # Segments that the first rows always hide together leave no residual to be seen in an interval.
    return bool(precise.all()) and not coincide(drawn.rows[1 : fitted.num_samples])


def _whole_pairs(rows: int, design: str) -> int:
    """Row 0 stands alone, so that pairs end at odd numbers."""
    return rows + 1 - rows % 2 if design in ("antithetic", "hadamard") else rows
