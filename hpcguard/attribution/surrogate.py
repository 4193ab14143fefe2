"""lime's surrogate: a weighted ridge regression per image and label, with standard errors, solved together in float64.

Shapes: B images, N samples, S segments (padded), L labels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Surrogate:
    coefficients: Tensor  # float64 [B, L, S], 0 past an image's segments
    standard_error: Tensor  # float64 [B, L, S]
    intercept: Tensor  # float64 [B, L]
    score: Tensor  # float64 [B, L], weighted R^2
    local_prediction: Tensor  # float64 [B, L], the surrogate at the unperturbed image


def lime_weights(samples_BNS: Tensor, num_segments_B: Tensor, kernel_width: float) -> Tensor:
    """lime's kernel weights, float64 [B, N].

    The cosine distance of a 0/1 row with k ones to the row of d ones is 1 - sqrt(k / d), and 1 for the zero row;
    the weight is sqrt(exp(-distance^2 / width^2)).
    """
    shown_BN = samples_BNS.sum(-1, dtype=torch.float64)
    distance_BN = 1 - (shown_BN / num_segments_B[:, None]).sqrt()
    return torch.exp(-distance_BN.square() / kernel_width**2).sqrt()


def fit_surrogate(
    samples_BNS: Tensor, probability_BNL: Tensor, weights_BN: Tensor, ridge: float, clusters_N: Tensor
) -> Surrogate:
    """Weighted ridge with an unpenalised intercept (scikit-learn's Ridge with sample_weight), all labels at once.

    Standard errors are the sandwich estimate clustered by `clusters_N`, scaled by C / (C - S - 1) for C clusters
    (Liang & Zeger 1986; the scaling is HC1's).
    """
    z = samples_BNS.to(torch.float64)
    y = probability_BNL.to(torch.float64)
    w = (weights_BN / weights_BN.sum(1, keepdim=True))[..., None]
    total = weights_BN.sum(1)
    z_mean, y_mean = (w * z).sum(1, keepdim=True), (w * y).sum(1, keepdim=True)
    z_centred, y_centred = z - z_mean, y - y_mean
    # Weights sum to 1 here, so the penalty is divided by their total: the same minimiser, better scaled.
    weighted_z = w * z_centred
    penalty = torch.diag_embed((ridge / total)[:, None].expand(-1, z.shape[2]))
    factor = torch.linalg.cholesky(weighted_z.mT @ z_centred + penalty)
    beta_BSL = torch.cholesky_solve(weighted_z.mT @ y_centred, factor)
    intercept = y_mean[:, 0] - (z_mean @ beta_BSL)[:, 0]
    residual = y_centred - z_centred @ beta_BSL
    return Surrogate(
        coefficients=beta_BSL.mT,
        standard_error=_standard_error(weighted_z, residual, factor, clusters_N),
        intercept=intercept,
        score=_weighted_r2(w, residual, y_centred),
        local_prediction=intercept + beta_BSL.sum(1),
    )


def _weighted_r2(w: Tensor, residual: Tensor, centred: Tensor) -> Tensor:
    unexplained, spread = (w * residual.square()).sum(1), (w * centred.square()).sum(1)
    # A constant model: scikit-learn calls a perfect fit 1 and anything else 0.
    constant = torch.where(unexplained > 0, 0.0, 1.0).to(spread.dtype)
    return torch.where(spread > 0, 1 - unexplained / spread.clamp_min(torch.finfo(spread.dtype).tiny), constant)


def _standard_error(weighted_z: Tensor, residual: Tensor, factor: Tensor, clusters_N: Tensor) -> Tensor:
    batch, _, segments = weighted_z.shape
    count = int(clusters_N.max()) + 1
    influence_BNS = torch.cholesky_solve(weighted_z.mT, factor).mT
    scale = count / max(count - segments - 1, 1)
    errors = []
    for label in range(residual.shape[2]):  # one label at a time: B*N*S doubles are the largest array here
        clustered = weighted_z.new_zeros(batch, count, segments)
        clustered.index_add_(1, clusters_N, influence_BNS * residual[:, :, label, None])
        errors.append((clustered.square().sum(1) * scale).sqrt())
    return torch.stack(errors, 1)
