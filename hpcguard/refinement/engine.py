"""Engines behind one small interface: DeepSpeed over many processes, and plain torch in one as the reference.

call engine(...) for the loss, engine.backward(loss), engine.step(); both count accumulation themselves.
"""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.step import GuidedStep
from hpcguard.runs import read_json

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")
THEIRS: dict[str, Any] = {
    "zero_optimization": dict, "gradient_clipping": (int, float), "zero_allow_untested_optimizer": bool,
    "steps_per_print": int, "wall_clock_breakdown": bool, "prescale_gradients": bool,
    "gradient_predivide_factor": (int, float), "communication_data_type": str, "comms_logger": dict,
    "flops_profiler": dict, "tensorboard": dict, "csv_monitor": dict, "wandb": dict,
}  # fmt: skip
HALF = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
STATE = "state"


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    nesterov = config.momentum > 0
    return torch.optim.SGD(
        model.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay, nesterov=nesterov
    )


class TorchEngine:
    """One process, plain torch."""

    rank, world_size = 0, 1

    def __init__(self, step: GuidedStep, config: TrainingConfig, device: torch.device) -> None:
        self.module, self.device = step.to(device), device
        self.optimizer = make_optimizer(step, config)
        self._accumulation, self._pending = config.accumulation, 0

    def __call__(self, *inputs: Any) -> Tensor:
        return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._pending += 1
        if self._pending == self._accumulation:
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._pending = 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        """One process waits for nobody."""

    def save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, folder / STATE)

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / STATE, map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """DeepSpeed, ZeRO 0 to 2, one of the processes of a torch.distributed world that is already described by the
    environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""

    def __init__(self, step: GuidedStep, config: TrainingConfig, device: torch.device, world_size: int) -> None:
        deepspeed = _import_deepspeed(device)
        if not dist.is_initialized():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False
            )
        if dist.get_world_size() != world_size:
            # Seen: two processes that both became rank 0 of 1 without an error.
            raise RuntimeError(
                f"torch.distributed has {dist.get_world_size()} processes, the launcher said {world_size}"
            )
        self.rank, self.world_size, self.device = dist.get_rank(), world_size, device
        self.optimizer = make_optimizer(step, config)
        self._engine, *_ = deepspeed.initialize(
            model=step, optimizer=self.optimizer, config=deepspeed_config(config, world_size), dist_init_required=False
        )
        self.module: GuidedStep = self._engine.module

    def __call__(self, *inputs: Any) -> Tensor:
        return self._engine(*inputs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def barrier(self) -> None:
        dist.barrier()

    def save_state(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=STATE, save_latest=False)

    def load_state(self, folder: Path) -> None:
        # Unrestricted pickle inside DeepSpeed: called for the run's own folder only.
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=STATE)
        if loaded is None:
            raise InputError(f"{folder}: DeepSpeed finds no checkpoint in it; delete the folder to start the arm again")


Engine = TorchEngine | DeepSpeedEngine


def make_engine(step: GuidedStep, config: TrainingConfig, device: torch.device, world_size: int) -> Engine:
    """The configured engine around a GuidedStep."""
    if config.engine == "torch":
        return TorchEngine(step, config, device)
    return DeepSpeedEngine(step, config, device, world_size)


def average_buffers(engine: Engine) -> None:
    """Make every rank's floating-point buffers their mean: batch statistics drift apart, only rank 0's are saved."""
    for buffer in engine.module.model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(engine.sum_over_ranks(buffer) / engine.world_size)


def deepspeed_config(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON with batch sizes filled in.

    Raises InputError for a file that is not JSON, sets what hpcguard sets, or asks for what is silently wrong here.
    """
    values = read_deepspeed_json(config.deepspeed) if config.deepspeed else {}
    where = f"refinement.deepspeed = {config.deepspeed}"
    for key, value in values.items():
        if key in OURS:
            raise InputError(f"{where}: remove {key}, hpcguard sets it from the refinement section")
        if key in HALF:
            # Perturbations of 1/255 drown in 8 bits of mantissa, so the attack needs its own float32 path first.
            raise InputError(f"{where}: {key} is refused, attacks in pixel space need float32; remove it")
        if key not in THEIRS:
            raise InputError(f"{where}: {key} is not supported here; allowed are {', '.join(THEIRS)}")
        if not isinstance(value, THEIRS[key]) or (isinstance(value, bool) and THEIRS[key] is not bool):
            raise InputError(f"{where}: {key} = {value!r} has the wrong type, see DeepSpeed's documentation")
    stage = values.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2):
        raise InputError(f"{where}: zero_optimization.stage = {stage}; allowed are 0, 1, 2 (3 trains wrongly here)")
    micro = micro_batch_size(config, world_size)
    # DeepSpeed clips at 1.0 unless told otherwise, and calls every client optimizer but Adam untested.
    defaults = {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
    batches = (config.batch_size, micro, config.accumulation)
    return {**defaults, **values, **dict(zip(OURS[:3], batches, strict=True))}


def micro_batch_size(config: TrainingConfig, world_size: int) -> int:
    """Images of one process in one forward pass."""
    parts = world_size * config.accumulation
    if config.batch_size % parts:
        raise InputError(
            f"batch_size = {config.batch_size} cannot be cut into {world_size} processes x accumulation "
            f"{config.accumulation}; use a multiple of {parts}"
        )
    return config.batch_size // parts


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The user's DeepSpeed configuration. Raises InputError if it cannot be read or is no JSON object."""
    return read_json(path, "refinement.deepspeed names it; examples lie in configs/deepspeed")


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    # A shared-memory operator for inference that would be compiled for minutes at start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
