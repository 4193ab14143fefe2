"""The engines: DeepSpeed over processes equals plain torch on the joined batch; checkpoints; refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hpcguard.cluster.ranks import run_ranks
from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.checkpoint import load_checkpoint, save_checkpoint
from hpcguard.refinement.engine import TorchEngine, deepspeed_config, micro_batch_size
from hpcguard.refinement.step import GuidedStep
from hpcguard.refinement.train import learning_rate

CONFIG = TrainingConfig(
    batch_size=16, learning_rate=0.02, clean_weight=0.3, attack={"eps": 0.1, "steps": 2}, masking={"weight": 0.5},
    sensitivity={"weight": 3.0},
)  # fmt: skip
STEPS = 3


def make_step(config: TrainingConfig) -> GuidedStep:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    return GuidedStep(nn.Sequential(*layers), config, torch.tensor([0.25]))  # type: ignore[arg-type]


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.rand(16, 1, 8, 8, generator=generator)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    labels = torch.randint(0, 3, (16,), generator=generator)
    return x, labels, torch.rand(16, 1, 8, 8, generator=generator) > 0.6, noise


def reference() -> Tensor:
    """Plain torch on the whole batch, in one process."""
    step = make_step(CONFIG)
    optimizer = torch.optim.SGD(step.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=True)
    for index in range(STEPS):
        optimizer.zero_grad()
        step(*batch(index), 3.0).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in step.parameters()])


# What every rank runs: the same steps, each rank on its share of the batch.
RANK = """
import sys, torch
sys.path.insert(0, {folder!r})
import test_engine as t
from hpcguard.refinement.engine import make_engine
from hpcguard.cluster.ranks import torch_rank
from pathlib import Path
torch.set_num_threads(1)
config = t.CONFIG.model_copy(update=dict(accumulation={accumulation}, deepspeed={json!r} and Path({json!r})))
place = torch_rank()
rank, size = place.rank, place.size
engine = make_engine(t.make_step(config), config, torch.device("cpu"), size)
micro = 16 // (size * {accumulation})
for index in range(t.STEPS):
    for part in range({accumulation}):
        start = (rank * {accumulation} + part) * micro
        engine.backward(engine(*[each[start:start + micro] for each in t.batch(index)], 3.0))
        engine.step()
weights = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
torch.save(weights, Path({out!r}) / str(rank))
engine.barrier()
"""


@pytest.mark.parametrize(("stage", "processes", "accumulation"), [(0, 1, 1), (0, 2, 1), (1, 2, 2), (2, 2, 1)])
def test_deepspeed_equals_plain_torch_on_the_joined_batch(
    tmp_path: Path, stage: int, processes: int, accumulation: int
) -> None:
    ds_json = ""
    if stage:
        ds_json = str(tmp_path / "ds.json")
        Path(ds_json).write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    out = tmp_path / "out"
    out.mkdir()
    code = RANK.format(folder=str(Path(__file__).parent), accumulation=accumulation, json=ds_json, out=str(out))
    assert run_ranks([sys.executable, "-c", code], processes, 1) == 0
    expected = reference()
    for rank in range(processes):
        difference = (torch.load(out / str(rank)) - expected).abs().max().item()
        assert difference < 1e-6, (rank, difference)


def test_the_torch_engine_equals_plain_torch_with_accumulation() -> None:
    config = CONFIG.model_copy(update={"accumulation": 2})
    engine = TorchEngine(make_step(config), config, torch.device("cpu"))
    for index in range(STEPS):
        for start in (0, 8):
            engine.backward(engine(*[each[start : start + 8] for each in batch(index)], 3.0))
            engine.step()
    weights = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
    assert (weights - reference()).abs().max().item() < 1e-6


def test_torchrun_and_deepspeed_start_it_too(tmp_path: Path) -> None:
    """Both launchers, on a script that trains three steps. `deepspeed` is run as the module behind it, since pip's
    first line of that script breaks where the environment's path has a space."""
    code = RANK.format(folder=str(Path(__file__).parent), accumulation=1, json="", out=str(tmp_path))
    script = tmp_path / "script.py"
    # deepspeed's launcher adds --local_rank to the script's arguments, which sys.argv of a script may hold.
    script.write_text(code)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{bin_folder}:{environment['PATH']}"
    for launcher in (
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"],
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29612"],
    ):
        for old in ("0", "1"):
            (tmp_path / old).unlink(missing_ok=True)
        done = subprocess.run([*launcher, str(script)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for rank in ("0", "1"):
            assert (torch.load(tmp_path / rank) - reference()).abs().max().item() < 1e-6


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage = 3; allowed are 0, 1, 2"),
        ({"train_batch_size": 8}, "remove train_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "remove optimizer"),
        ({"fp16": {"enabled": True}}, "fp16 is refused"),
        ({"bf16": {"enabled": True}}, "bf16 is refused"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is refused"),
        ({"zero_optimization": 2}, "zero_optimization = 2 has the wrong type"),
        ({"gradient_clipping": "1"}, "wrong type"),
        ({"activation_checkpointing": {}}, "activation_checkpointing is not supported"),
        ([1], "expected a JSON object"),
    ],
)
def test_what_deepspeed_cannot_do_here_is_refused(tmp_path: Path, values: object, reason: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=reason):
        deepspeed_config(CONFIG.model_copy(update={"deepspeed": path}), 2)


def test_deepspeeds_defaults_that_bite_are_set() -> None:
    values = deepspeed_config(CONFIG, 2)
    assert values["gradient_clipping"] == 0.0  # it clips at 1.0 unless told
    assert values["train_micro_batch_size_per_gpu"] == 8
    with pytest.raises(InputError, match="batch_size = 16 cannot be cut into 3 processes"):
        micro_batch_size(CONFIG, 3)


def test_the_schedule_is_a_function_of_the_step() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert learning_rate(0, 100, TrainingConfig(learning_rate=1.0, warmup=0)) == 1.0


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    engine = TorchEngine(make_step(CONFIG), CONFIG, torch.device("cpu"))
    assert load_checkpoint(engine, tmp_path, "print") == []
    engine.backward(engine(*batch(0), 3.0))
    engine.step()
    save_checkpoint(engine, tmp_path, [{"epoch": 1}], "print")
    save_checkpoint(engine, tmp_path, [{"epoch": 1}, {"epoch": 2}], "print")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resume.json", "state-0002"]
    fresh = TorchEngine(make_step(CONFIG), CONFIG, torch.device("cpu"))
    assert load_checkpoint(fresh, tmp_path, "print") == [{"epoch": 1}, {"epoch": 2}]
    for one, other in zip(engine.module.parameters(), fresh.module.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="other settings"):
        load_checkpoint(fresh, tmp_path, "another")
    state = next((tmp_path / "state-0002").iterdir())
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(InputError, match="missing or damaged"):
        load_checkpoint(fresh, tmp_path, "print")
