"""A model that its callable gives ready-made: its weights become a file, which everything else starts from."""

from pathlib import Path

import torch
from torch import nn

from hpcguard.config import ModelConfig
from hpcguard.errors import InputError
from hpcguard.models.build import build_model
from hpcguard.models.weights import load_weights, save_weights


def keep_ready_made(config: ModelConfig, num_classes: int, channels: int, path: Path) -> None:
    """Write the weights with which model.name's package.module:callable comes to exactly `path`, as safetensors.

    Raises InputError if the callable gives other weights when it is called again: then it makes an untrained model.
    """
    if ":" not in config.name:
        raise InputError(f"model.name = {config.name}: comes without trained weights; set model.weights")
    model, again = (build_model(config, num_classes, channels) for _ in range(2))
    for key, values in model.net.state_dict().items():
        if values.is_floating_point() and not values.isfinite().all():
            raise InputError(f"model.name = {config.name}: {key} holds values that are not finite; mend the callable")
    if not _same_weights(model.net, again.net):
        raise InputError(
            f"model.name = {config.name}: gives other weights every time, so they are not trained; set model.weights"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(model, path, {"model": config.name})


def check_ready_made(config: ModelConfig, num_classes: int, channels: int, path: Path) -> None:
    """Raises InputError if the callable does not give the weights that keep_ready_made has written to `path`."""
    model, kept = (build_model(config, num_classes, channels) for _ in range(2))
    load_weights(kept, path)
    if not _same_weights(model.net, kept.net):
        raise InputError(
            f"model.name = {config.name}: gives other weights now than those in {path}, which all results are "
            "of; set run to another folder, or model.weights to these"
        )


def _same_weights(net: nn.Module, other: nn.Module) -> bool:
    one, two = net.state_dict(), other.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
