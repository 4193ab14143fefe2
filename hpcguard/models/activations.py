"""Smooth activations in the place of ReLU, in any net."""

from torch import nn

from hpcguard.errors import InputError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus,
}  # fmt: skip


def swap_relu(net: nn.Module, activation: str, name: str) -> None:
    """Put `activation`, as torch makes it by default, in the place of every nn.ReLU module of `net`.

    Activations have no weights, so the state dict keeps its keys. What a net calls as torch.nn.functional.relu stays.
    Raises InputError, for which `name` is the model's, if there is no nn.ReLU.
    """
    # _modules and not named_children(), which tells of a module under two names only once.
    places = [
        (parent, place)
        for parent in net.modules()
        for place, child in parent._modules.items()
        if isinstance(child, nn.ReLU)
    ]
    if not places:
        remedy = "set model.options.activation instead" if name == "small-cnn" else "write null"
        raise InputError(f"model.activation = {activation}: {name} has no torch.nn.ReLU module to swap; {remedy}")
    for parent, place in places:
        setattr(parent, place, ACTIVATIONS[activation]())
