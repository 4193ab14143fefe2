"""Alarms that the model and the images raise by themselves."""

import torch
from torch import Tensor, nn

from hpcguard.metrics.alarms.row import Alarm, finite, share_alarm
from hpcguard.metrics.alarms.trial import LOSSES, Trial, ascended

SUM_TOLERANCE = 1e-4  # of a row of probabilities from 1
SAME_LOGITS = 1e-4  # of the largest logit: what another layout in memory may change in float32
NO_GRADIENT = 0.01  # share of images
PIXEL_TOLERANCE = 1e-5


def softmax_outputs(model: nn.Module, x: Tensor, batch_size: int) -> Alarm:
    """Rows of outputs that are nowhere negative and sum to 1."""
    outputs = _outputs(model, x, batch_size)
    distance, lowest = float((outputs.sum(1) - 1).abs().max()), float(outputs.min())
    return Alarm(
        "softmax outputs",
        {"distance_of_sums_from_1": finite(distance), "lowest_output": finite(lowest)},
        SUM_TOLERANCE,
        distance <= SUM_TOLERANCE and lowest >= 0,
        "Outputs are probabilities, whose gradients vanish where the model is sure: give the logits before the "
        "softmax.",
    )


def randomness(model: nn.Module, x: Tensor, batch_size: int) -> Alarm:
    """Two passes over the same images that differ; the second goes backwards in other batches."""
    first = _outputs(model, x, batch_size).nan_to_num()  # NaN twice is no randomness
    second = _outputs(model, x.flip(0), max(1, min(batch_size, len(x)) * 2 // 3)).flip(0).nan_to_num()
    change = float((first - second).abs().max() / first.abs().max().clamp_min(1e-300))
    return Alarm(
        "randomness",
        {"largest_change": finite(change), "predictions_changed": float((first.argmax(1) != second.argmax(1)).sum())},
        SAME_LOGITS,
        change > SAME_LOGITS,
        "Two passes over the same images differ, by noise or by what else is in the batch: call model.eval() and turn "
        "noise off, or attack the expectation (AutoAttack's version rand).",
    )


def pixel_range(x: Tensor, attacked: Tensor, eps: float, norm: str = "linf") -> Alarm:
    """Images x or attacked images outside of [0, 1], or a largest change other than eps: what attacks on normalised
    inputs show, and eps in other units. Any attack's images [B, C, H, W] will do."""
    change = (attacked - x).flatten(1)
    largest = float((change.abs().amax(1) if norm == "linf" else change.norm(dim=1)).max())
    low, high = float(torch.cat([x, attacked]).min()), float(torch.cat([x, attacked]).max())
    inside = low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE  # as below, false for NaN
    # From half of eps, since clamping to [0, 1] shortens changes in L2.
    fits = 0.5 * eps <= largest + PIXEL_TOLERANCE and largest <= eps * (1 + 1e-4) + PIXEL_TOLERANCE
    return Alarm(
        "pixel range",
        {"lowest_pixel": finite(low), "highest_pixel": finite(high), "largest_change": finite(largest), "eps": eps},
        PIXEL_TOLERANCE,
        not (inside and fits),
        "Pixels leave [0, 1] or the largest change is not eps, so the attack did not run in pixel space: give images "
        "in [0, 1] and put normalisation into the model (model.mean, model.std).",
    )


def zero_gradients(trial: Trial) -> Alarm:
    """The share of right images whose input gradient, of the cross-entropy or the margin, is zero or not finite."""
    chosen = trial.right.nonzero()[:, 0]
    blind = {loss: torch.zeros(len(chosen), dtype=torch.bool, device=trial.x.device) for loss in LOSSES}
    for place in torch.arange(len(chosen)).split(trial.batch_size) if len(chosen) else ():
        part = chosen[place.to(chosen.device)]
        for loss in LOSSES:
            x = trial.x[part].clone().requires_grad_()
            with torch.enable_grad():
                gradient = torch.autograd.grad(ascended(loss, trial.y[part])(trial.model(x)), x)[0].flatten(1)
            # Below the smallest normal number float32 keeps few digits of a gradient, and many devices none.
            steep = gradient.abs().amax(1) >= torch.finfo(torch.float32).tiny
            blind[loss][place] = ~(steep & gradient.isfinite().all(1))
    worst = max(LOSSES, key=lambda loss: int(blind[loss].sum()))
    return share_alarm(
        "zero gradients",
        blind[worst],
        NO_GRADIENT,
        "Images have no gradient to follow (saturated outputs, quantised inputs, operations without a gradient): "
        "attack the logits in float32, or through a differentiable stand-in (BPDA).",
        **{loss: float(blind[loss].sum()) for loss in LOSSES},
    )


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor, batch_size: int) -> Tensor:
    return torch.cat([model(part).double() for part in x.split(batch_size)])
