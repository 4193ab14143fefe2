"""Alarms that attacks raise against each other: one that must be the weaker finds what the stronger misses.

`white` [B] is which images stay right under PGD on the cross-entropy and then on the margin. All compare image by
image, so that the noise of sampling is that of the share of disagreements alone.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from hpcguard.attacks import fgsm, pgd
from hpcguard.metrics.alarms.row import Alarm, share_alarm
from hpcguard.metrics.alarms.trial import LOSSES, Trial, ascended
from hpcguard.metrics.robustness import survives

MISSED = 0.02  # share of images
LOSSES_APART = 0.05  # sound nets have some points of it
LEFT_AT_ANY_EPS = 0.02
MORE = 5

BlackBox = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, x, y) to which images stay right, bool [B]."""


def losses_apart(entropy: Tensor, white: Tensor) -> Alarm:
    """The share of images that survive PGD on the cross-entropy (`entropy`, bool [B]) and fall to PGD on the margin,
    whose steps no factor on the logits changes."""
    return share_alarm(
        "logit scale",
        entropy & ~white,
        LOSSES_APART,
        "The margin finds far more than the cross-entropy, whose gradient large, scaled or smoothed logits starve: do "
        "not quote PGD on the cross-entropy; use the margin and AutoAttack.",
    )


def fgsm_finds_more(trial: Trial, white: Tensor, known: Tensor | None = None) -> Alarm:
    """The share of images that survive PGD and fall to one step."""
    left = white if known is None else white & known
    if known is None:
        left = survives(
            trial.model, lambda x, y: fgsm(trial.model, x, y, trial.eps, trial.norm), trial.x, trial.y, white,
            trial.batch_size,
        )  # fmt: skip
    return share_alarm(
        "FGSM beats PGD",
        white & ~left,
        MISSED,
        "One step finds what many miss, so the gradient leads PGD astray: the loss is rough or masked; judge by "
        "black-box attacks.",
    )


def larger_eps_finds_less(trial: Trial, white: Tensor) -> Alarm:
    """The share of images that fall at eps and survive at twice eps, though that ball holds the smaller one."""
    larger, left = replace(trial, eps=2 * trial.eps), trial.right & ~white
    for loss in LOSSES:
        left = larger.pgd(loss, left)
    return share_alarm(
        "larger eps finds less",
        left,
        MISSED,
        "PGD misses at twice eps what it finds at eps, so it does not follow the loss: check step size and gradients.",
    )


def any_eps_leaves_some(trial: Trial) -> Alarm:
    """Accuracy where any image of [0, 1] is allowed: eps 1 in Linf, the cube's diagonal in L2.

    Attacked from the image itself: a random start alone, with no gradient, would undo most.
    """
    eps = 1.0 if trial.norm == "linf" else math.sqrt(trial.x[0].numel())
    left = trial.right
    for loss in LOSSES:
        left = survives(
            trial.model,
            lambda x, y, loss=loss: pgd(  # type: ignore[misc]
                trial.model, x, y, eps, trial.steps, norm=trial.norm, loss=ascended(loss, y)
            ),
            trial.x, trial.y, left, trial.batch_size,
        )  # fmt: skip
    return share_alarm(
        "eps = 1 leaves some right",
        left,
        LEFT_AT_ANY_EPS,
        "Images stay right though any change is allowed, so the attack cannot follow the model: gradients are masked.",
        eps=eps,
    )


def more_steps_find_more(trial: Trial, white: Tensor, restarts: int) -> Alarm:
    """The share of images that survive PGD and fall to MORE times the steps with `restarts` restarts."""
    left = white
    for loss in LOSSES:
        left = trial.pgd(loss, left, MORE, restarts)
    return share_alarm(
        "more steps find more",
        white & ~left,
        MISSED,
        f"{MORE} times the steps still find more, so PGD had not converged: raise evaluation.pgd_steps and "
        "evaluation.pgd_restarts.",
    )


def black_box_finds_more(
    trial: Trial, white: Tensor, square: BlackBox | None = None, known: Tensor | None = None
) -> Alarm:
    """The share of images that survive PGD and fall to an attack that sees no gradient."""
    left = None if known is None else white & known
    chosen = white.nonzero()[:, 0]
    if left is None and square is not None:
        left = white.clone()
        if len(chosen):
            left[chosen] = square(trial.model, trial.x[chosen], trial.y[chosen])
    return share_alarm(
        "black box beats white box",
        None if left is None else white & ~left,
        MISSED,
        "Square, which sees no gradient, finds what PGD misses: gradients are masked; quote what the black box leaves, "
        "and attack adaptively.",
    )


def transfer_finds_more(trial: Trial, white: Tensor, sibling: nn.Module | None) -> Alarm:
    """The share of images that survive PGD on the model and fall to what PGD makes of them on its sibling."""
    left = None
    if sibling is not None:
        other = replace(trial, model=sibling)
        generator = trial.generator()
        left = survives(
            trial.model, lambda x, y: other.attack("ce", x, y, generator), trial.x, trial.y, white, trial.batch_size
        )
    return share_alarm(
        "transfer beats white box",
        None if left is None else white & ~left,
        MISSED,
        "Images made on a sibling model break what attacks on the model itself do not: its gradients are masked.",
    )


def attacked_images(trial: Trial) -> Tensor:
    """What PGD makes of one batch of the images [n, C, H, W], to be looked at."""
    return trial.attack("ce", trial.x[: trial.batch_size], trial.y[: trial.batch_size], trial.generator())
