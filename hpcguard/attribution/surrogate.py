"""lime's surrogate: one weighted ridge regression an image, all labels at once, in float64, with standard errors.

Shapes: N rows, S segments, L labels.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor


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
    z, y, w = rows_NS.to(torch.float64), probability_NL.to(torch.float64), weights_N[:, None]
    total = weights_N.sum()
    z_mean, y_mean = (w * z).sum(0) / total, (w * y).sum(0) / total
    constant = (y == y[0]).all(0)
    z, y = z - z_mean, torch.where(constant, 0.0, y - y_mean)  # 0 and not what rounding leaves of it
    weighted = w * z
    gram = weighted.mT @ z
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    beta_SL = torch.cholesky_solve(weighted.mT @ y, factor)
    intercept = y_mean - z_mean @ beta_SL
    residual = y - z @ beta_SL
    error = interval = torch.zeros_like(beta_SL)
    if not complete:
        error, interval = _sampling_error(z, weights_N, residual, factor, paired)
    return Surrogate(
        coefficients=beta_SL.mT,
        standard_error=error.mT,
        interval=interval.mT,
        intercept=intercept,
        score=_weighted_r2(w, residual, y),
        local_prediction=intercept + beta_SL.sum(0),
        effective_samples=float(total.square() / weights_N.square().sum()),
    )


def _weighted_r2(w: Tensor, residual: Tensor, centred: Tensor) -> Tensor:
    unexplained, spread = (w * residual.square()).sum(0), (w * centred.square()).sum(0)
    # scikit-learn's rule for a constant: 1, as ours is always met.
    return torch.where(spread > 0, 1 - unexplained / spread.clamp_min(torch.finfo(spread.dtype).tiny), 1.0)


def _sampling_error(
    z_NS: Tensor, weights_N: Tensor, residual_NL: Tensor, factor: Tensor, paired: bool
) -> tuple[Tensor, Tensor]:
    """Leave-one-cluster-out (jackknife, CR3) standard errors and 95% intervals of the coefficients, [S, L] each.

    A residual that its own cluster has pulled towards 0 is undone by (I - H)^-1, H the cluster's block of the hat
    matrix (Bell & McCaffrey 2002); without it intervals are too narrow at the few hundred rows that LIME uses.
    """
    root = weights_N.sqrt()[:, None]
    x, e, inverse = root * z_NS, root * residual_NL, torch.cholesky_inverse(factor)
    if paired:
        squares, fourth, clusters = _moments_of_pairs(x, e, inverse)
    else:
        solved = x @ inverse
        corrected = e / (1 - (solved * x).sum(1, keepdim=True)).clamp_min(_TINY)
        squares, fourth = solved.square().mT @ corrected.square(), solved.pow(4).mT @ corrected.pow(4)
        clusters = len(x)
    error = (squares * (clusters - 1) / clusters).sqrt()
    return error, error * _quantile(squares, fourth, clusters)


def _moments_of_pairs(x_NS: Tensor, e_NL: Tensor, inverse_SS: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sums over clusters of their shifts of the coefficients, squared and to the 4th, [S, L]; how many clusters."""
    # Row 0 is a cluster of its own; a row of weight 0 before it makes all clusters equally long.
    pad = (0, 0, 1, (len(x_NS) + 1) % 2)
    x, e = torch.nn.functional.pad(x_NS, pad), torch.nn.functional.pad(e_NL, pad)
    solved = (x @ inverse_SS).reshape(-1, 2, x.shape[1])
    x, e = x.reshape(solved.shape), e.reshape(-1, 2, e.shape[1])
    identity = torch.eye(2, dtype=x.dtype, device=x.device)
    corrected = torch.linalg.solve((1 + _TINY) * identity - solved @ x.mT, e)
    squared = torch.einsum("cks,ckl->csl", solved, corrected).square()
    return squared.sum(0), squared.square().sum(0), len(x)


def _quantile(squares: Tensor, fourth: Tensor, clusters: int) -> Tensor:
    """Student's 97.5% quantile with as many degrees of freedom as the squared shifts show (Satterthwaite's formula).

    Where few rows decide (a saturated model that rare rows flip), the standard error is itself uncertain.
    """
    spread = fourth - squares.square() / clusters
    freedom = (2 * squares.square() / spread.clamp_min(torch.finfo(spread.dtype).tiny)).clamp(1, clusters)
    return torch.from_numpy(stdtrit(freedom.cpu().numpy(), 0.975)).to(squares)


_TINY = 1e-12
