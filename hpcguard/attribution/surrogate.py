"""lime's surrogate: one weighted ridge regression an image, all labels at once, in float64, with standard errors.

Shapes: N rows, S segments, L labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    coefficients: Tensor  # float64 [L, S]
    standard_error: Tensor  # float64 [L, S]
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
    z, y = z - z_mean, y - y_mean
    weighted = w * z
    gram = weighted.mT @ z
    gram.diagonal().add_(ridge)
    factor = torch.linalg.cholesky(gram)
    beta_SL = torch.cholesky_solve(weighted.mT @ y, factor)
    intercept = y_mean - z_mean @ beta_SL
    residual = y - z @ beta_SL
    if complete:
        error = torch.zeros_like(beta_SL)
    else:
        error = _standard_error(z, weights_N, residual, factor, paired)
    return Surrogate(
        coefficients=beta_SL.mT,
        standard_error=error.mT,
        intercept=intercept,
        score=_weighted_r2(w, residual, y),
        local_prediction=intercept + beta_SL.sum(0),
        effective_samples=float(total.square() / weights_N.square().sum()),
    )


def _weighted_r2(w: Tensor, residual: Tensor, centred: Tensor) -> Tensor:
    unexplained, spread = (w * residual.square()).sum(0), (w * centred.square()).sum(0)
    # A constant model: scikit-learn calls a perfect fit 1 and anything else 0.
    constant = torch.where(unexplained > 0, 0.0, 1.0).to(spread.dtype)
    return torch.where(spread > 0, 1 - unexplained / spread.clamp_min(torch.finfo(spread.dtype).tiny), constant)


def _standard_error(z_NS: Tensor, weights_N: Tensor, residual_NL: Tensor, factor: Tensor, paired: bool) -> Tensor:
    """Leave-one-cluster-out (jackknife, CR3) sandwich errors of the coefficients, [S, L] (Bell & McCaffrey 2002).

    A residual that its own cluster has pulled towards 0 is undone by (I - H)^-1, H the cluster's block of the hat
    matrix; without it intervals are too narrow at the few hundred rows that LIME uses.
    """
    root = weights_N.sqrt()[:, None]
    # Row 0 is a cluster of its own; a row of weight 0 before it makes all clusters equally long.
    size = 2 if paired else 1
    pad = (len(z_NS) + 1) % 2 if paired else 0
    front = 1 if paired else 0
    x = torch.nn.functional.pad(root * z_NS, (0, 0, front, pad))
    e = torch.nn.functional.pad(root * residual_NL, (0, 0, front, pad))
    solved = torch.cholesky_solve(x.mT, factor).mT.reshape(-1, size, x.shape[1])
    x, e = x.reshape(-1, size, x.shape[1]), e.reshape(-1, size, e.shape[1])
    remaining = torch.eye(size, dtype=x.dtype, device=x.device) - solved @ x.mT
    if size == 1:
        corrected = e / remaining.clamp_min(_TINY)
    else:
        corrected = torch.linalg.solve(remaining + _TINY * torch.eye(size, dtype=x.dtype, device=x.device), e)
    shifts = torch.einsum("cks,ckl->csl", solved, corrected)  # how far each cluster moves each coefficient
    clusters = len(shifts)
    return (shifts.square().sum(0) * (clusters - 1) / clusters).sqrt()


_TINY = 1e-12
