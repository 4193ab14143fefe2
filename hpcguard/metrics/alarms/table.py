"""raise_alarms: the whole table of one model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hpcguard.config.alarms import AlarmConfig
from hpcguard.metrics.alarms import attack, model
from hpcguard.metrics.alarms.attack import BlackBox
from hpcguard.metrics.alarms.row import Alarm
from hpcguard.metrics.alarms.trial import Trial


def raise_alarms(
    trial: Trial,
    config: AlarmConfig,
    known: Mapping[str, Tensor] | None = None,
    square: BlackBox | None = None,
    sibling: nn.Module | None = None,
) -> list[Alarm]:
    """All alarms, on config.images of the trial's images. Models give logits and are in eval mode.

    known: outcomes on the trial's images that are measured already, which stay right, bool [N]: `fgsm` and `ce` (PGD
    on the cross-entropy), of attacks on every image that is right when clean; `margin` (PGD on the margin), which may
    leave out what ce broke; `square`, which may leave out what both broke. square: the black-box attack to run where
    its outcome is not known. sibling: another model of the same task. Without these their rows are not measured.
    """
    trial, known = _drawn(trial, config.images, known or {})
    entropy = known["ce"] if "ce" in known else trial.pgd("ce", trial.right)
    white = entropy & (known["margin"] if "margin" in known else trial.pgd("margin", entropy))
    shown = trial.x[: trial.batch_size]
    return [
        model.softmax_outputs(trial.model, trial.x, trial.batch_size),
        model.randomness(trial.model, trial.x, trial.batch_size),
        model.pixel_range(shown, attack.attacked_images(trial), trial.eps, trial.norm),
        model.zero_gradients(trial),
        attack.losses_apart(entropy, white),
        attack.fgsm_finds_more(trial, white, known.get("fgsm")),
        attack.larger_eps_finds_less(trial, white),
        attack.any_eps_leaves_some(trial),
        attack.more_steps_find_more(trial, white, config.restarts),
        attack.black_box_finds_more(trial, white, square, known.get("square")),
        attack.transfer_finds_more(trial, white, sibling),
    ]


def _drawn(trial: Trial, images: int, known: Mapping[str, Tensor]) -> tuple[Trial, dict[str, Tensor]]:
    """So many of the images: a data set may be sorted by class, so not its first."""
    chosen = torch.randperm(len(trial.x), generator=trial.generator(3))[:images].sort().values.to(trial.x.device)
    kept = {name: right.to(trial.x.device)[chosen] for name, right in known.items()}
    parts = {"x": trial.x[chosen], "y": trial.y[chosen], "right": trial.right.to(trial.x.device)[chosen]}
    return Trial(**{**vars(trial), **parts}), kept
