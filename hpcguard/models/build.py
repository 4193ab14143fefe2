"""build_model: from a name in the configuration to a classifier on pixels in [0, 1]."""

import copy
import difflib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from hpcguard.config import ModelConfig
from hpcguard.errors import InputError
from hpcguard.models.activations import swap_relu
from hpcguard.models.normalized import Normalized
from hpcguard.models.resnet_cifar import ResNet20, resnet18
from hpcguard.models.small_cnn import SmallCNN
from hpcguard.plugins import import_callable

OWN: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet20-cifar": ResNet20,
    "resnet18-cifar": resnet18,
}
AUXILIARY = ("googlenet", "inception_v3")  # these give a tuple in training unless their extra heads are off


def build_model(config: ModelConfig, num_classes: int, channels: int) -> Normalized:
    """The classifier that `config` names, for [B, `channels`, H, W], weights drawn from torch's generator.

    Raises InputError for an unknown name, options that do not fit, mean or std of a wrong length, and an activation to
    be swapped where there is none.
    """
    mean = _per_channel("mean", config.mean, 0.0, channels)
    std = _per_channel("std", config.std, 1.0, channels)
    net = _build_net(config, num_classes, channels)
    if config.activation is not None:
        swap_relu(net, config.activation, config.name)
    return Normalized(net, mean, std)


def _build_net(config: ModelConfig, num_classes: int, channels: int) -> nn.Module:
    if config.name in OWN:
        return _construct(config, OWN[config.name], {"num_classes": num_classes, "channels": channels})
    if ":" in config.name:
        factory = import_callable(config.name, "model.name")
        if isinstance(factory, nn.Module):
            return _instance(config, factory)
        return _construct(config, factory, {"num_classes": num_classes} if _takes_classes(factory) else {})
    import torchvision  # takes two seconds, which our own models need not wait for

    known = torchvision.models.list_models(module=torchvision.models)
    if config.name not in known:
        close = difflib.get_close_matches(config.name, [*OWN, *known], 3, 0.5)
        guess = f"; closest: {', '.join(close)}" if close else ""
        raise InputError(
            f"model.name = {config.name}: unknown{guess}; allowed are {', '.join(OWN)}, "
            "a torchvision classifier such as resnet50, or package.module:callable"
        )
    if channels != 3:
        raise InputError(
            f"model.name = {config.name}: torchvision's models take 3 channels, the images have {channels}; "
            f"set model.name to {', '.join(OWN)} or your own package.module:callable"
        )
    defaults = {"aux_logits": False, "init_weights": True} if config.name in AUXILIARY else {}
    builder = torchvision.models.get_model_builder(config.name)
    return _construct(config, builder, {"weights": None, "num_classes": num_classes}, defaults)


def _instance(config: ModelConfig, net: nn.Module) -> nn.Module:
    """A copy, since weights may be loaded into it, of a module that is named itself and not what makes it."""
    if config.options:
        raise InputError(f"model.options = {config.options}: {config.name} is a module already; remove model.options")
    try:
        return copy.deepcopy(net)
    except Exception as error:  # such as a net with torch.nn.utils.weight_norm
        raise InputError(
            f"model.name = {config.name}: cannot be copied ({type(error).__name__}); name a function that makes it"
        ) from error


def _construct(
    config: ModelConfig,
    factory: Callable[..., Any],
    fixed: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> nn.Module:
    """factory(**fixed, **options); `fixed` are the arguments that are not the user's to choose."""
    clash = sorted(fixed.keys() & config.options.keys())
    if clash:
        raise InputError(f"model.options.{clash[0]}: set by hpcguard, remove it (for weights: model.weights)")
    try:
        net = factory(**fixed, **{**(defaults or {}), **config.options})
    except InputError:
        raise
    except Exception as error:  # a constructor raises what it likes for an argument that it cannot use
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        allowed = _allowed_options(factory, fixed)
        problem = f"model.options = {config.options}: not for {config.name} ({reason})"
        raise InputError(f"{problem}{allowed}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"model.name = {config.name}: gave a {type(net).__name__}, not a torch.nn.Module")
    return net


def _takes_classes(factory: Callable[..., Any]) -> bool:
    return any(one.name == "num_classes" or one.kind is one.VAR_KEYWORD for one in _parameters(factory))


def _allowed_options(factory: Callable[..., Any], fixed: dict[str, Any]) -> str:
    """'; allowed: ...' where the signature tells all of them."""
    parameters = _parameters(factory)
    if not parameters or any(one.kind is one.VAR_KEYWORD for one in parameters):
        return ""
    return f"; allowed: {', '.join(one.name for one in parameters if one.name not in fixed) or 'none'}"


def _parameters(factory: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # compiled callables have no signature
        return []


def _per_channel(key: str, values: tuple[float, ...] | None, default: float, channels: int) -> tuple[float, ...]:
    if values is None:
        return (default,)
    if len(values) not in (1, channels):
        raise InputError(
            f"model.{key} = {list(values)}: {len(values)} values for images of {channels} channel(s); "
            f"write {f'1 or {channels}' if channels > 1 else '1'}, or null"
        )
    return values
