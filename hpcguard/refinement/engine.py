"""Engines behind one small interface: DeepSpeed over many processes, and plain torch in one as the reference.

call engine(...) for the loss, engine.backward(loss), engine.step(); both count accumulation themselves. Their state is
a dict of plain float32 tensors that depends neither on the engine nor on the number of processes, so it is written
without DeepSpeed's checkpoints, which are loaded by unrestricted pickle and hold one rank's share in each file.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.deepspeed_json import deepspeed_config, micro_batch_size
from hpcguard.refinement.step import GuidedStep

__all__ = [
    "DeepSpeedEngine", "Engine", "TorchEngine", "average_buffers", "deepspeed_config", "from_first_rank", "join_world",
    "make_engine", "make_optimizer", "micro_batch_size",
]  # fmt: skip
MOMENTUM = "momentum_buffer"  # torch.optim.SGD's name for it
State = dict[str, Tensor]
T = TypeVar("T")


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
        self._half, self._clip = config.precision == "bfloat16", config.clip
        self._accumulation, self._pending = config.accumulation, 0

    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._half):
            return self.module(*inputs, **more)

    def backward(self, loss: Tensor) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._pending += 1
        if self._pending == self._accumulation:
            if self._clip:
                nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._pending = 0

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        """One process waits for nobody."""

    def state(self) -> State:
        """Weights, buffers and momentum by name, on the CPU."""
        momentum = {name: self.optimizer.state[each].get(MOMENTUM) for name, each in self.module.named_parameters()}
        return _state(self.module, momentum)

    def load_state(self, state: State) -> None:
        self.module.load_state_dict(_part(state, "module."))
        for name, parameter in self.module.named_parameters():
            if f"momentum.{name}" in state:
                self.optimizer.state[parameter][MOMENTUM] = state[f"momentum.{name}"].to(self.device)


class DeepSpeedEngine:
    """DeepSpeed, ZeRO 0 to 2, one of the processes of a world that `join_world` has joined."""

    def __init__(self, step: GuidedStep, config: TrainingConfig, device: torch.device, world_size: int) -> None:
        deepspeed = join_world(device, world_size)
        self.rank, self.world_size, self.device = dist.get_rank(), world_size, device
        self.optimizer = make_optimizer(step, config)
        self._engine, *_ = deepspeed.initialize(
            model=step, optimizer=self.optimizer, config=deepspeed_config(config, world_size), dist_init_required=False
        )
        self.module: GuidedStep = self._engine.module
        self._utils = deepspeed.utils

    def __call__(self, *inputs: Any, **more: Any) -> Tensor:
        return self._engine(*inputs, **more)

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

    def state(self) -> State:
        """As TorchEngine's; all ranks must call it, for under ZeRO 1 and 2 each holds a part of the momentum."""
        return _state(self.module, {name: self._momentum(each) for name, each in self.module.named_parameters()})

    def load_state(self, state: State) -> None:
        self.module.load_state_dict(_part(state, "module."))
        if self._sharded:
            zero = self._engine.optimizer
            zero.refresh_fp32_params()  # ZeRO steps on a copy of the parameters of its own
            if any(name.startswith("momentum.") for name in state):
                for flat in zero.single_partition_of_fp32_groups:
                    zero.optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat, requires_grad=False)
                zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.module.named_parameters():
            if f"momentum.{name}" in state:
                self._set_momentum(parameter, state[f"momentum.{name}"].to(self.device))

    @property
    def _sharded(self) -> bool:
        return bool(self._engine.zero_optimization_stage())

    def _momentum(self, parameter: nn.Parameter) -> Tensor | None:
        if not self._sharded:
            return self.optimizer.state[parameter].get(MOMENTUM)
        if not self.optimizer.defaults["momentum"]:
            return None
        return self._utils.safe_get_full_optimizer_state(parameter, MOMENTUM)

    def _set_momentum(self, parameter: nn.Parameter, values: Tensor) -> None:
        if self._sharded:
            self._utils.safe_set_full_optimizer_state(parameter, values, MOMENTUM)
        else:
            self.optimizer.state[parameter][MOMENTUM] = values


Engine = TorchEngine | DeepSpeedEngine


def make_engine(step: GuidedStep, config: TrainingConfig, device: torch.device, world_size: int) -> Engine:
    """The configured engine around a GuidedStep."""
    if config.engine == "torch":
        return TorchEngine(step, config, device)
    return DeepSpeedEngine(step, config, device, world_size)


def average_buffers(engine: Engine) -> None:
    """Make every rank's floating-point buffers their mean, in one all-reduce: batch statistics would drift apart.

    In float64, in which the mean of equal float32 numbers is that number: constants stay as they are.
    """
    buffers = [buffer for buffer in engine.module.model.buffers() if buffer.is_floating_point()]
    if engine.world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().double().flatten() for buffer in buffers])
    means = engine.sum_over_ranks(flat) / engine.world_size
    for buffer, mean in zip(buffers, means.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean.reshape(buffer.shape))


def join_world(device: torch.device, world_size: int) -> Any:
    """Join the torch.distributed world that the environment describes (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
    MASTER_PORT), once a process; returns deepspeed."""
    deepspeed = _import_deepspeed(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    if dist.get_world_size() != world_size:
        # Seen: two processes that both became rank 0 of 1 without an error.
        raise RuntimeError(f"torch.distributed has {dist.get_world_size()} processes, the launcher said {world_size}")
    return deepspeed


def from_first_rank(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, on every rank of the world that was joined; of its InputError rank 0 speaks for all.

    Objects travel by pickle between the processes of one job, as in all of torch.distributed.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = make()
        except InputError as error:
            dist.broadcast_object_list([None, str(error)], src=0)
            raise
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise SystemExit(2)
    return answer[0]


def _state(module: nn.Module, momentum: dict[str, Tensor | None]) -> State:
    """Copies on the CPU, for parameters under ZeRO are views of one large tensor."""
    named = {f"module.{name}": values for name, values in module.state_dict().items()}
    named |= {f"momentum.{name}": values for name, values in momentum.items() if values is not None}
    return {name: values.detach().cpu().clone().contiguous() for name, values in named.items()}


def _part(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils

    # A shared-memory operator for inference that would be compiled for minutes at start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
