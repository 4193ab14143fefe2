"""DeepSpeed's JSON: what a user may write, and what is refused because DeepSpeed does it wrongly here, or not at all.

Each refusal was tried on 2 processes against plain float32 torch on the joined batch (docs/refinement.md).
"""

from pathlib import Path
from typing import Any

from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.runs import read_json

OURS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler")
THEIRS: dict[str, Any] = {
    "zero_optimization": dict, "gradient_clipping": (int, float), "zero_allow_untested_optimizer": bool,
    "torch_autocast": dict, "steps_per_print": int, "wall_clock_breakdown": bool, "prescale_gradients": bool,
    "gradient_predivide_factor": (int, float), "communication_data_type": str, "comms_logger": dict,
    "flops_profiler": dict, "tensorboard": dict, "csv_monitor": dict, "wandb": dict,
}  # fmt: skip
ZERO = (
    "stage", "reduce_scatter", "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "overlap_comm",
    "contiguous_gradients", "round_robin_gradients", "use_multi_rank_bucket_allreduce", "ignore_unused_parameters",
)  # fmt: skip
BFLOAT16 = ("bfloat16", "bf16")
REFUSED = {
    "fp16": "float16 has no range for the penalty's squared gradients, and its loss scaling skips steps silently; "
    "remove it, and set refinement.precision: bfloat16 for speed",
    "bf16": "it makes weights, normalisation and images bfloat16, in which perturbations of 1/255 drown; "
    "remove it, and set refinement.precision: bfloat16, which only computes convolutions and linear layers in it",
    "amp": "it is NVIDIA Apex's; remove it, and set refinement.precision: bfloat16 for speed",
    "data_types": "gradients are accumulated in float32; remove it",
    "sparse_gradients": "DeepSpeed has removed it; remove it",
    "checkpoint": "hpcguard writes its own checkpoints; remove it",
}
REFUSED["bfloat16"] = REFUSED["bf16"]


def deepspeed_config(config: TrainingConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's JSON with what the refinement section says filled in.

    Raises InputError for a file that is not JSON, sets what hpcguard sets, or asks for what is wrong here.
    """
    values = read_deepspeed_json(config.deepspeed) if config.deepspeed else {}
    where = f"refinement.deepspeed = {config.deepspeed}"
    for key, value in values.items():
        _check_key(where, key, value)
    _check_zero(where, values)
    _check_against(where, values, config)
    micro = micro_batch_size(config, world_size)
    if config.precision == "bfloat16":
        # No module is "lower precision safe": else ZeRO 1 and 2 would send the gradients of those in bfloat16.
        values["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    # DeepSpeed clips at 1.0 unless told otherwise, and calls every client optimizer but Adam untested.
    ours = {"gradient_clipping": config.clip or 0.0, "zero_allow_untested_optimizer": True}
    batches = (config.batch_size, micro, config.accumulation)
    return {"steps_per_print": 10**9, **values, **ours, **dict(zip(OURS[:3], batches, strict=True))}


def _check_key(where: str, key: str, value: Any) -> None:
    if key in OURS:
        raise InputError(f"{where}: remove {key}, hpcguard sets it from the refinement section")
    if key in REFUSED:
        raise InputError(f"{where}: {key} is refused: {REFUSED[key]}")
    if key not in THEIRS:
        raise InputError(f"{where}: {key} is not supported here; allowed are {', '.join(THEIRS)}")
    if not isinstance(value, THEIRS[key]) or (isinstance(value, bool) and THEIRS[key] is not bool):
        raise InputError(f"{where}: {key} = {value!r} has the wrong type, see DeepSpeed's documentation")


def _check_zero(where: str, values: dict[str, Any]) -> None:
    zero = values.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2):
        raise InputError(f"{where}: zero_optimization.stage = {stage}; allowed are 0, 1, 2 (3 trains wrongly here)")
    for key in zero:
        if key.startswith(("offload", "cpu_offload")):
            raise InputError(
                f"{where}: zero_optimization.{key} is refused: it needs DeepSpeed's own Adam, and this trains by SGD; "
                "remove it"
            )
        if key not in ZERO:  # such as zero_quantized_gradients
            raise InputError(
                f"{where}: zero_optimization.{key} is refused: DeepSpeed ignores it without a word below stage 3, or "
                f"it was not tried; allowed are {', '.join(ZERO)}"
            )
    scaled = values.get("prescale_gradients") or values.get("gradient_predivide_factor", 1) != 1
    if stage == 2 and scaled and zero.get("reduce_scatter", True):
        raise InputError(
            f"{where}: prescale_gradients and gradient_predivide_factor do not go with ZeRO 2's reduce_scatter; "
            "remove them, set zero_optimization.reduce_scatter: false, or take stage 1"
        )
    if (sent := values.get("communication_data_type", "fp32")) != "fp32":
        raise InputError(
            f"{where}: communication_data_type = {sent} is refused: it rounds every gradient before the ranks' are "
            "added; allowed is fp32"
        )


def _check_against(where: str, values: dict[str, Any], config: TrainingConfig) -> None:
    """Refuse what the refinement section says otherwise."""
    wanted = config.clip or 0.0
    if values.get("gradient_clipping", wanted) != wanted:
        raise InputError(
            f"{where}: gradient_clipping = {values['gradient_clipping']}, but refinement.clip = {config.clip}; "
            "remove it from the file and set refinement.clip"
        )
    autocast = values.get("torch_autocast")
    if autocast is None:
        return
    asked = "float32"
    if autocast.get("enabled", False):
        if unknown := set(autocast) - {"enabled", "dtype"}:
            raise InputError(f"{where}: torch_autocast.{min(unknown)} is not supported; allowed are enabled, dtype")
        if autocast.get("dtype", "bfloat16") not in BFLOAT16:
            raise InputError(
                f"{where}: torch_autocast.dtype = {autocast['dtype']}; allowed is bfloat16 (float16 has no range for "
                "the penalty's squared gradients)"
            )
        asked = "bfloat16"
    if asked != config.precision:
        raise InputError(
            f"{where}: torch_autocast asks for {asked}, but refinement.precision = {config.precision}; make them equal"
        )


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
