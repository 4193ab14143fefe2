"""Weights from and to files, never running code that a file holds."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hpcguard.errors import InputError
from hpcguard.models.normalized import Normalized

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "net.", "_orig_mod.", "model.")  # DataParallel and DDP, Normalized, torch.compile, wrappers


def load_weights(model: Normalized, path: Path) -> None:
    """Load a .safetensors file, or a state dict written by torch.save, into `model.net`.

    Takes state dicts wrapped in a checkpoint, and keys that all begin with a wrapper's name (PREFIXES). Raises
    InputError, and leaves the model as it was, for a missing, damaged or unsafe file, keys, shapes or kinds of numbers
    that differ, or values that are not finite.
    """
    state = _unwrap(_read(path), path)
    own = model.net.state_dict()
    state = _strip_prefixes(state, own)
    # Files from before PyTorch 0.4.1 do not have this counter, which evaluation does not use.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    reshaped = [
        f"{key} {list(state[key].shape)} where the model has {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    other_kind = [
        f"{key} {_kind(state[key])} where the model has {_kind(own[key])}"
        for key in own
        if key in state and _kind(state[key]) != _kind(own[key])
    ]
    faults = {"missing": missing, "unexpected": unexpected, "wrong shape": reshaped, "wrong kind": other_kind}
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_few(keys)}" for fault, keys in faults.items() if keys)
        raise InputError(f"{path}: made for another model ({listed}); check model.name and model.options")
    for key, values in state.items():
        if values.is_floating_point() and not values.isfinite().all():
            raise InputError(f"{path}: {key} holds values that are not finite; set other weights")
    model.net.load_state_dict(state, strict=False)


def save_weights(model: Normalized, path: Path, metadata: dict[str, str]) -> None:
    """Write `model.net`'s state dict and `metadata` to exactly `path` as safetensors. Raises InputError."""
    # Copies, because safetensors refuses tensors that share memory.
    state = {key: values.cpu().contiguous().clone() for key, values in model.net.state_dict().items()}
    try:
        save_file(state, path, metadata)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: weights cannot be written ({error})") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}; weights are read from a .safetensors, .pt, .pth or .th file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol|.*looks like a TorchScript archive")
            return torch.load(path, weights_only=True, map_location="cpu")
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # unpickling damaged bytes raises anything from KeyError to struct.error
        code = re.search(r"unsupported (?:global|class):? (?:GLOBAL )?(\S+)", str(error), re.IGNORECASE)
        if code:
            raise InputError(
                f"{path}: needs code to be unpickled ({code[1]}), refused because it could run anything; "
                "save model.state_dict() alone"
            ) from error
        if "TorchScript" in str(error):
            raise InputError(f"{path}: a TorchScript archive, which is code; save model.state_dict() alone") from error
        raise InputError(f"{path}: truncated, damaged or not a weights file; copy it again") from error


def _unwrap(content: Any, path: Path) -> dict[str, torch.Tensor]:
    wrapper = next((key for key in WRAPPERS if isinstance(content, Mapping) and key in content), None)
    state = content if wrapper is None else content[wrapper]
    if not isinstance(state, Mapping) or not state:
        found = type(state).__name__
        raise InputError(f"{path}: holds no state dict, found {found}; save model.state_dict() alone")
    for key, values in state.items():
        if not isinstance(values, torch.Tensor):
            raise InputError(
                f"{path}: {key!r} is a {type(values).__name__}, not a tensor; save model.state_dict() alone, "
                f"or under one of the keys {', '.join(WRAPPERS)}"
            )
    return {str(key): values for key, values in state.items()}


def _strip_prefixes(state: dict[str, torch.Tensor], own: Iterable[str]) -> dict[str, torch.Tensor]:
    """Take away prefixes that all keys of the file have and the model's own keys have not."""
    wrapping = [prefix for prefix in PREFIXES if not all(key.startswith(prefix) for key in own)]
    while prefix := next((one for one in wrapping if all(key.startswith(one) for key in state)), None):
        state = {key.removeprefix(prefix): values for key, values in state.items()}
    return state


def _kind(values: torch.Tensor) -> str:
    """What copying into a weight must not change silently: precision alone may differ."""
    if values.layout is not torch.strided or values.is_meta:
        return "sparse" if not values.is_meta else "without values"
    return "floating point" if values.is_floating_point() else str(values.dtype).removeprefix("torch.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more ({len(names)})" if len(names) > 3 else "")
