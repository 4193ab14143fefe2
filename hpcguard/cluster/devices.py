"""Which device a process computes on."""

import torch

from hpcguard.errors import InputError


def pick_device(name: str, slot: int = 0) -> torch.device:
    """`auto` is the slot-th GPU where there are any, else the CPU. Raises InputError if there is no such device."""
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda", slot % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device = {name}: write auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device = {name}: write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not 0 <= (device.index or 0) < count:
        raise InputError(f"device = {name}: this machine shows {count} GPU(s) to torch; write auto or cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", slot % count)
    return device


def full_float32() -> None:
    """No TensorFloat-32 in this process: torch's default for convolutions on NVIDIA GPUs keeps 10 bits of mantissa."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
