"""The engines: DeepSpeed over processes equals plain torch on the joined batch; launchers; schedules; refusals."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpcguard.cluster.ranks import mpi_command, run_mpi, run_ranks
from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.averaging import move_average, start_average
from hpcguard.refinement.engine import Engine, TorchEngine, average_buffers, deepspeed_config, micro_batch_size
from hpcguard.refinement.schedule import learning_rate
from hpcguard.refinement.step import GuidedStep

SETTINGS = {
    "batch_size": 16, "learning_rate": 0.02, "clean_weight": 0.3, "attack": {"eps": 0.1, "steps": 2},
    "masking": {"weight": 0.5}, "sensitivity": {"weight": 3.0},
}  # fmt: skip
REPOSITORY = Path(__file__).parents[2]
CONFIG = TrainingConfig.model_validate(SETTINGS)
STEPS = 5
OFF = {"clean_weight": 0.0, "adversarial_weight": 0.0, "masking": {"weight": 0}, "sensitivity": {"weight": 0}}
TERMS = {
    "all": {}, "clean": {**OFF, "clean_weight": 1.0}, "adversarial": {**OFF, "adversarial_weight": 1.0},
    "masked": {**OFF, "masking": {"weight": 1}},
    "sensitivity": {**OFF, "clean_weight": 0.001, "sensitivity": {"weight": 9}},  # it cannot stand alone
}  # fmt: skip
# (name, changes to the configuration, DeepSpeed's JSON); every one on 1 and on 2 processes.
CASES = [
    (f"{terms} zero{stage} accumulation{parts}", {**TERMS[terms], "accumulation": parts}, {"stage": stage})
    for terms in TERMS for stage in (0, 1, 2) for parts in ((1, 2) if terms == "all" else (2,))
] + [(f"clip zero{stage}", {"clip": 0.4, "accumulation": 2}, {"stage": stage}) for stage in (0, 1, 2)] + [
    (f"{option} zero{stage}", {"accumulation": 2}, {"stage": stage, **values})
    for stage in (1, 2) for option, values in {
        "buckets": {"reduce_bucket_size": 100, "allgather_bucket_size": 100}, "overlap": {"overlap_comm": True},
        "allreduce": {"reduce_scatter": False}, "robin": {"round_robin_gradients": True, "contiguous_gradients": False},
    }.items()
]  # fmt: skip


def make_step(config: TrainingConfig, norm: Callable[[], nn.Module] = lambda: nn.GroupNorm(2, 8)) -> GuidedStep:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 8, 3), norm(), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    return GuidedStep(nn.Sequential(*layers), config, torch.tensor([0.25]))  # type: ignore[arg-type]


def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.rand(16, 1, 8, 8, generator=generator)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    labels = torch.randint(0, 3, (16,), generator=generator)
    return x, labels, torch.rand(16, 1, 8, 8, generator=generator) > 0.6, noise


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def run_steps(engine: Engine, config: TrainingConfig, steps: range) -> None:
    """A rank's share of these steps."""
    micro = 16 // (engine.world_size * config.accumulation)
    for index in steps:
        for part in range(config.accumulation):
            start = (engine.rank * config.accumulation + part) * micro
            own = [each[start : start + micro] for each in batch(index)]
            engine.backward(engine(*own, config.sensitivity.weight))
            engine.step()


def reference(changes: dict, steps: int = STEPS) -> tuple[Tensor, float]:
    """Plain torch on the whole batch, in one process: the weights, and the largest norm of a gradient."""
    config = TrainingConfig.model_validate({**SETTINGS, **changes})
    step = make_step(config)
    optimizer = torch.optim.SGD(step.parameters(), 0.02, 0.9, weight_decay=5e-4, nesterov=True)
    largest = 0.0
    for index in range(steps):
        optimizer.zero_grad()
        step(*batch(index), config.sensitivity.weight).backward()
        norm = nn.utils.clip_grad_norm_(step.parameters(), config.clip or torch.inf)
        largest = max(largest, float(norm))
        optimizer.step()
    return weights(step), largest


# What every rank runs: all cases after one start of DeepSpeed, which costs seconds.
RANK = """
import sys, json, torch
sys.path.insert(0, {folder!r})
import test_engine as t
from pathlib import Path
from torch import nn
from safetensors.torch import save_file
from hpcguard.cluster.ranks import torch_rank
from hpcguard.refinement.engine import average_buffers, make_engine
torch.set_num_threads(1)
place, out = torch_rank(), Path({out!r})
def make(changes, zero, norm=None, **more):
    path = out / f"ds{{place.rank}}.json"
    path.write_text(json.dumps({{"zero_optimization": zero, **more}}))
    config = t.TrainingConfig.model_validate({{**t.SETTINGS, **changes, "deepspeed": path}})
    step = t.make_step(config, norm) if norm else t.make_step(config)
    return make_engine(step, config, torch.device("cpu"), place.size), config
results = {{}}
for name, changes, zero in t.CASES:
    engine, config = make(changes, zero)
    t.run_steps(engine, config, range(t.STEPS))
    results[name] = t.weights(engine.module)
for scaled in ("prescale_gradients", "gradient_predivide_factor"):
    engine, config = make({{}}, {{"stage": 1}}, **{{scaled: True if scaled[0] == "p" else 2.0}})
    t.run_steps(engine, config, range(t.STEPS))
    results[scaled] = t.weights(engine.module)
for stage in (0, 1, 2):  # saved after 3 steps, and gone on with in another engine
    engine, config = make({{}}, {{"stage": stage}})
    t.run_steps(engine, config, range(3))
    state = engine.state()
    save_file(state, out / f"state{{stage}}_{{place.rank}}")
    fresh, config = make({{}}, {{"stage": stage}})
    fresh.load_state(state)
    t.run_steps(fresh, config, range(3, t.STEPS))
    t.run_steps(engine, config, range(3, t.STEPS))
    results[f"resumed zero{{stage}}"] = t.weights(fresh.module)
    results[f"undisturbed zero{{stage}}"] = t.weights(engine.module)
    engine, config = make({{"precision": "bfloat16"}}, {{"stage": stage}})
    t.run_steps(engine, config, range(t.STEPS))
    assert {{values.dtype for values in engine.state().values()}} == {{torch.float32}}
    results[f"bfloat16 zero{{stage}}"] = t.weights(engine.module)
engine, config = make(t.TERMS["clean"], {{"stage": 0}}, lambda: nn.BatchNorm2d(8))
engine.module.model.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
t.run_steps(engine, config, range(1))
average_buffers(engine)
results |= {{name: each.double() for name, each in engine.module.model.named_buffers()}}
save_file(results, out / str(place.rank))
engine.barrier()
"""


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What RANK gives on each of 1, then of 2 processes."""
    out = tmp_path_factory.mktemp("ranks")
    code = RANK.format(folder=str(Path(__file__).parent), out=str(out))
    assert run_ranks([sys.executable, "-c", code], request.param, 1) == 0
    found = [load_file(out / str(rank)) for rank in range(request.param)]
    for rank, results in enumerate(found):
        results |= {f"state{stage}": load_file(out / f"state{stage}_{rank}") for stage in range(3)}
    return found


def test_deepspeed_equals_plain_torch_on_the_joined_batch(ranks: list[dict[str, Tensor]]) -> None:
    """Each loss term and all together, ZeRO 0 to 2, accumulation, clipping, and every option that is let through."""
    known: dict[str, Tensor] = {}
    for name, changes, _ in [*CASES, ("prescale_gradients", {}, {}), ("gradient_predivide_factor", {}, {})]:
        joined = {key: value for key, value in changes.items() if key != "accumulation"}
        expected = known.setdefault(json.dumps(joined), reference(joined)[0])
        for results in ranks:
            assert (results[name] - expected).abs().max().item() < 1e-6, name
    assert reference({})[1] > 0.4  # so the clipped case clips
    different = [known[json.dumps(TERMS[terms])] for terms in TERMS]
    assert min((one - other).abs().max() for one in different for other in different if one is not other) > 1e-4


def test_a_state_goes_on_bit_for_bit_and_in_another_engine(ranks: list[dict[str, Tensor]]) -> None:
    for stage in range(3):
        for results in ranks:
            assert torch.equal(results[f"resumed zero{stage}"], results[f"undisturbed zero{stage}"])
            engine = TorchEngine(make_step(CONFIG), CONFIG, torch.device("cpu"))  # one process goes on with it
            engine.load_state(results[f"state{stage}"])
            run_steps(engine, CONFIG, range(3, STEPS))
            assert (weights(engine.module) - reference({})[0]).abs().max().item() < 1e-6


def test_bfloat16_keeps_float32_weights_and_is_the_same_in_both_engines(ranks: list[dict[str, Tensor]]) -> None:
    config = CONFIG.model_copy(update={"precision": "bfloat16"})
    engine = TorchEngine(make_step(config), config, torch.device("cpu"))
    run_steps(engine, config, range(STEPS))
    exact = reference({})[0]
    moved = (exact - weights(make_step(CONFIG))).abs().max().item()
    for stage in range(3):
        for results in ranks:
            found = results[f"bfloat16 zero{stage}"]
            assert 1e-5 < (found - exact).abs().max().item() < 0.1 * moved
            # Sums of bfloat16 products may be ordered by the number of images, so only one process is equal.
            assert (found - weights(engine.module)).abs().max().item() < (1e-6 if len(ranks) == 1 else 0.05 * moved)


def test_batch_statistics_are_the_ranks_mean_and_constants_stay(ranks: list[dict[str, Tensor]]) -> None:
    means = []
    for share in np.split(np.arange(16), len(ranks)):
        config = TrainingConfig.model_validate({**SETTINGS, **TERMS["clean"]})
        step = make_step(config, lambda: nn.BatchNorm2d(8)).train()
        step(*(each[share] for each in batch(0)), 0.0)
        means.append(step.model[1].running_mean.double())  # type: ignore[index]
    for results in ranks:
        assert torch.allclose(results["1.running_mean"], torch.stack(means).mean(0), atol=1e-7, rtol=0)
        assert torch.equal(results["1.running_mean"], ranks[0]["1.running_mean"])
        assert torch.equal(results["constant"], torch.tensor([0.1, 1 / 3]).double())


def test_averaging_constants_over_any_number_of_ranks_changes_no_bit() -> None:
    class Ranks:
        module = make_step(CONFIG, lambda: nn.BatchNorm2d(8))

        def __init__(self, world_size: int) -> None:
            self.world_size = world_size

        def sum_over_ranks(self, values: Tensor) -> Tensor:
            return sum((values for _ in range(self.world_size)), torch.zeros_like(values))

    constant = torch.rand(8, generator=torch.Generator().manual_seed(3))
    for size in (2, 3, 6, 7, 11, 96):
        Ranks.module.model[1].running_var.copy_(constant)  # type: ignore[index]
        average_buffers(Ranks(size))  # type: ignore[arg-type]
        assert torch.equal(Ranks.module.model[1].running_var, constant)  # type: ignore[index]


def test_the_torch_engine_equals_plain_torch_with_accumulation_and_clipping() -> None:
    for changes in ({"accumulation": 2}, {"accumulation": 4, "clip": 0.4}):
        config = CONFIG.model_copy(update=changes)
        engine = TorchEngine(make_step(config), config, torch.device("cpu"))
        run_steps(engine, config, range(STEPS))
        expected = reference({"clip": changes.get("clip")})[0]
        assert (weights(engine.module) - expected).abs().max().item() < 1e-6


def test_every_launcher_trains_the_same(tmp_path: Path, make_config: Callable[..., Path]) -> None:
    """The stage itself under torchrun, deepspeed, mpiexec and by itself, with two processes each, gives the same bits.
    `deepspeed` is run as the module behind it, since pip's first line of that script breaks where the
    environment's path has a space."""
    training = {"engine": "deepspeed", "epochs": 1, "batch_size": 32}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    found = {}
    for name, launcher in {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"],
        "deepspeed": [
            sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", "29612",
            "--module",
        ],
        "mpiexec": [sys.executable],
        "itself": [sys.executable],
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        processes = 2 if name == "itself" else 1
        config = str(make_config(tmp_path / name, baseline={**training, "processes": processes}))
        module = ["hpcguard.refine"] if name == "deepspeed" else ["-m", "hpcguard.refine"]
        command = [*launcher, *module, config, "--arm", "baseline"]
        if name == "mpiexec":
            mpi = mpi_command(2, command)
            assert mpi is not None
            assert run_mpi(mpi) == 0
        else:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
        arm = tmp_path / name / "run/checkpoints/baseline"
        assert json.loads((arm / "training.json").read_text())["world_size"] == 2
        found[name] = (arm / "model.safetensors").read_bytes()
    assert len(set(found.values())) == 1, found.keys()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage = 3; allowed are 0, 1, 2"),
        ({"train_batch_size": 8}, "remove train_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "remove optimizer"),
        ({"fp16": {"enabled": True}}, "fp16 is refused"),
        ({"bf16": {"enabled": True}}, "bf16 is refused: .* refinement.precision: bfloat16"),
        ({"torch_autocast": {"enabled": True}}, "asks for bfloat16, but refinement.precision = float32"),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "dtype = float16; allowed is bfloat16",
        ),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is refused"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, "zero_quantized_gradients is refused"),
        ({"zero_optimization": {"stage": 2}, "prescale_gradients": True}, "do not go with ZeRO 2's reduce_scatter"),
        ({"communication_data_type": "bf16"}, "communication_data_type = bf16 is refused"),
        ({"gradient_clipping": 1.0}, "gradient_clipping = 1.0, but refinement.clip = None"),
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


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/deepspeed").glob("*.json")), ids=lambda path: path.name)
def test_the_configurations_that_come_along_are_allowed(path: Path) -> None:
    precision = "bfloat16" if path.stem.endswith("bf16") else "float32"
    values = deepspeed_config(CONFIG.model_copy(update={"deepspeed": path, "precision": precision}), 2)
    assert values["zero_optimization"]["stage"] == int(path.stem[4])
    assert values.get("torch_autocast", {}).get("enabled", False) == (precision == "bfloat16")


def test_deepspeeds_defaults_that_bite_are_set() -> None:
    values = deepspeed_config(CONFIG, 2)
    assert values["gradient_clipping"] == 0.0  # it clips at 1.0 unless told
    assert deepspeed_config(CONFIG.model_copy(update={"clip": 0.5}), 2)["gradient_clipping"] == 0.5
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


@pytest.mark.parametrize("total", [7, 100])
def test_schedules_are_those_of_torch(total: int) -> None:
    """one-cycle and, without warm-up, piecewise and cosine, against torch's own schedulers over all steps."""
    parameter = nn.Parameter(torch.zeros(1))

    def rates(make: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]) -> list[float]:
        optimizer = torch.optim.SGD([parameter], 0.5)
        scheduler = make(optimizer)
        found = []
        for _ in range(total):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step() if len(found) < total else None
        return found

    lr = torch.optim.lr_scheduler
    for settings, expected in (
        ({"schedule": "one-cycle", "warmup": 0.3}, lambda o: lr.OneCycleLR(o, 0.5, total, 0.3, cycle_momentum=False)),
        ({"schedule": "piecewise", "milestones": [0.5, 0.8], "factor": 0.2, "warmup": 0},
         lambda o: lr.MultiStepLR(o, [-(-total // 2), -(-total * 4 // 5)], 0.2)),
        ({"schedule": "cosine", "warmup": 0}, lambda o: lr.CosineAnnealingLR(o, total)),
    ):  # fmt: skip
        config = TrainingConfig(learning_rate=0.5, **settings)  # type: ignore[arg-type]
        assert [learning_rate(step, total, config) for step in range(total)] == pytest.approx(rates(expected), rel=1e-6)


def test_the_average_is_torchs_with_a_memory_that_grows() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = start_average(model)
    expected = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, count: mean + (new - mean) * (1 - min(0.5, (1 + count) / (10 + count))),
        use_buffers=True,
    )  # fmt: skip
    expected.n_averaged += 1  # torch would begin with a copy
    expected.module.load_state_dict(model.state_dict())
    for step in range(20):
        with torch.no_grad():
            model[0].weight.add_(torch.rand(2, 3))
            model(torch.rand(4, 3))
        expected.n_averaged.fill_(step)
        if step:
            expected.update_parameters(model)
        else:  # torch copies at count 0
            for mean, new in zip(expected.module.state_dict().values(), model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.add_((new - mean) * 0.9)
        move_average(average, model, step, 0.5)
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        assert torch.allclose(average.state_dict()[name], expected.module.state_dict()[name], atol=1e-6)
    assert average.state_dict()["1.num_batches_tracked"] == 20
