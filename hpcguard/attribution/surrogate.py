"""lime's surrogate: one weighted ridge regression an image, all labels at once, in float64, with standard errors.

Shapes: N rows, S segments, L labels.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

STRETCH = 8192  # rows
_TINY = 1e-12


@dataclass(frozen=True)
class Surrogate:
    coefficients: Tensor  # float64 [L, S]
    standard_error: Tensor  # float64 [L, S]
    interval: Tensor  # float64 [L, S], half the width of the 95% interval
    intercept: Tensor  # float64 [L]
    score: Tensor  # float64 [L], weighted R^2
    local_prediction: Tensor  # float64 [L], the surrogate at the unperturbed image
    effective_samples: float  # (sum w)^2 / sum w^2


def lime_weights(rows_NS: Tensor, kernel_width: float) -> Tensor:
    """lime's kernel weights, float64 [N].

    The cosine distance of a 0/1 row with k ones to the row of d ones is 1 - sqrt(k / d), and 1 for the zero row;
    the weight is sqrt(exp(-distance^2 / width^2)).
    """
    shown_N = rows_NS.sum(1, dtype=torch.float64)
    distance_N = 1 - (shown_N / rows_NS.shape[1]).sqrt()
    return torch.exp(-distance_N.square() / kernel_width**2).sqrt()


def fit_surrogate(
    rows_NS: Tensor, probability_NL: Tensor, weights_N: Tensor, ridge: float, paired: bool, complete: bool = False
) -> Surrogate:
    """Weighted ridge with an unpenalised intercept, as scikit-learn's Ridge(alpha=ridge) with sample_weight.

    paired: rows 1 and 2, 3 and 4, ... were drawn together, row 0 alone; else every row was drawn by itself.
    complete: the rows are all there are, so the coefficients have no sampling error.
    """
    y, w = probability_NL.to(torch.float64), weights_N[:, None]
    total, parts = weights_N.sum(), _parts(len(rows_NS))
    z_mean = sum((weights_N[part] @ rows_NS[part].to(torch.float64) for part in parts), torch.zeros(())) / total
    y_mean = (w * y).sum(0) / total
    y = torch.where((y == y[0]).all(0), 0.0, y - y_mean)  # a constant: 0, and not what rounding leaves of it
    gram = ridge * torch.eye(rows_NS.shape[1], dtype=torch.float64)
    moment = torch.zeros(rows_NS.shape[1], y.shape[1], dtype=torch.float64)
    for part in parts:
        z = rows_NS[part].to(torch.float64) - z_mean
        weighted = w[part] * z
        gram += weighted.mT @ z
        moment += weighted.mT @ y[part]
    factor = torch.linalg.cholesky(gram)
    beta_SL = torch.cholesky_solve(moment, factor)
    residual = torch.cat([y[part] - (rows_NS[part].to(torch.float64) - z_mean) @ beta_SL for part in parts])
    error = interval = torch.zeros_like(beta_SL)
    if not complete:
        error, interval = _sampling_error(rows_NS, z_mean, weights_N, residual, factor, paired)
    intercept = y_mean - z_mean @ beta_SL
    return Surrogate(
        coefficients=beta_SL.mT,
        standard_error=error.mT,
        interval=interval.mT,
        intercept=intercept,
        score=_weighted_r2(w, residual, y),
        local_prediction=intercept + beta_SL.sum(0),
        effective_samples=float(total.square() / weights_N.square().sum()),
    )


def _parts(count: int) -> list[slice]:
    """All rows in stretches, so that no float64 copy of many rows is made at once; pairs, after row 0, stay whole."""
    starts = [0, *range(1 + STRETCH, count, STRETCH)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


def _weighted_r2(w: Tensor, residual: Tensor, centred: Tensor) -> Tensor:
    unexplained, spread = (w * residual.square()).sum(0), (w * centred.square()).sum(0)
    # scikit-learn's rule for a constant: 1, as ours is always met.
    return torch.where(spread > 0, 1 - unexplained / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)


def _sampling_error(
    rows_NS: Tensor, z_mean: Tensor, weights_N: Tensor, residual_NL: Tensor, factor: Tensor, paired: bool
) -> tuple[Tensor, Tensor]:
    """Leave-one-cluster-out (jackknife, CR3) standard errors and 95% intervals of the coefficients, [S, L] each.

    A residual that its own cluster has pulled towards 0 is undone by (I - H)^-1, H the cluster's block of the hat
    matrix (Bell & McCaffrey 2002); without it intervals are too narrow at the few hundred rows that LIME uses.
    """
    inverse = torch.cholesky_inverse(factor)
    moments = _moments_of_pairs if paired else _moments
    squares = fourth = torch.zeros(len(inverse), residual_NL.shape[1], dtype=torch.float64)
    for part in _parts(len(rows_NS)):
        root = weights_N[part].sqrt()[:, None]
        x, e = root * (rows_NS[part].to(torch.float64) - z_mean), root * residual_NL[part]
        if paired and part.start == 0:
            # Row 0 is a cluster of its own; a row of weight 0 before it makes all clusters equally long.
            x, e = (torch.nn.functional.pad(each, (0, 0, 1, 0)) for each in (x, e))
        of_part = moments(x, e, inverse)
        squares, fourth = squares + of_part[0], fourth + of_part[1]
    clusters = 1 + len(rows_NS) // 2 if paired else len(rows_NS)
    error = (squares * (clusters - 1) / clusters).sqrt()
    return error, error * _quantile(squares, fourth, clusters)


def _moments(x_NS: Tensor, e_NL: Tensor, inverse_SS: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows of the shifts of the coefficients without them, squared and to the 4th power, [S, L]."""
    solved = x_NS @ inverse_SS
    corrected = e_NL / (1 - (solved * x_NS).sum(1, keepdim=True)).clamp_min(_TINY)
    solved, corrected = solved.square(), corrected.square()
    return solved.mT @ corrected, solved.square().mT @ corrected.square()


def _moments_of_pairs(x_NS: Tensor, e_NL: Tensor, inverse_SS: Tensor) -> tuple[Tensor, Tensor]:
    """The same for rows 0 and 1, 2 and 3, ... left out together; an odd one at the end alone."""
    pad = (0, 0, 0, len(x_NS) % 2)
    x, e = torch.nn.functional.pad(x_NS, pad), torch.nn.functional.pad(e_NL, pad)
    solved = (x @ inverse_SS).reshape(-1, 2, x.shape[1])
    x, e = x.reshape(solved.shape), e.reshape(-1, 2, e.shape[1])
    identity = torch.eye(2, dtype=x.dtype)
    corrected = torch.linalg.solve((1 + _TINY) * identity - solved @ x.mT, e)
    squared = torch.einsum("cks,ckl->csl", solved, corrected).square()
    return squared.sum(0), squared.square().sum(0)


def _quantile(squares: Tensor, fourth: Tensor, clusters: int) -> Tensor:
    """Student's 97.5% quantile with as many degrees of freedom as the squared shifts show (Satterthwaite's formula).

    Where few rows decide (a saturated model that rare rows flip), the standard error is itself uncertain.
    """
    spread = fourth - squares.square() / clusters
    freedom = (2 * squares.square() / spread.clamp_min(torch.finfo(spread.dtype).tiny)).clamp(1, clusters)
    return torch.from_numpy(stdtrit(freedom.numpy(), 0.975))
