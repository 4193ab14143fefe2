"""Checkpoints: what is kept, what is passed over; and a training that is killed, told to stop, or not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_engine import make_step

from hpcguard.cli import run_stage
from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError
from hpcguard.refinement.averaging import start_average
from hpcguard.refinement.batches import Batches
from hpcguard.refinement.checkpoint import Checkpoints, Progress, load_checkpoint, save_checkpoint
from hpcguard.refinement.engine import TorchEngine
from hpcguard.refinement.train import SAVE, STOP, Watch, train

SETTINGS = {
    "engine": "torch", "batch_size": 16, "masking": {"weight": 0}, "sensitivity": {"weight": 0}, "averaging": 0.9,
    "attack": {"eps": 0.1, "steps": 1}, "epochs": 3, "checkpoint_minutes": None,
}  # fmt: skip
X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def read(positions: np.ndarray) -> dict[str, torch.Tensor]:
    return {"image": X[positions], "label": torch.from_numpy(positions % 3)}


def start(place: Checkpoints, **changes: Any) -> tuple[TorchEngine, torch.nn.Module, TrainingConfig, Progress]:
    config = TrainingConfig.model_validate({**SETTINGS, **changes})
    step = make_step(config)
    average = start_average(step.model)
    engine = TorchEngine(step, config, torch.device("cpu"))
    return engine, average, config, load_checkpoint(engine, average, place)


def go(place: Checkpoints, asked: int | None = None, **changes: Any) -> tuple[dict[str, torch.Tensor], Progress]:
    """Train to the end, or until so many steps are done; weights and average, and how far it came."""
    engine, average, config, done = start(place, **changes)
    watch = Watch(asked=lambda: STOP if asked is not None and done.step + 1 >= asked else 0)
    train(engine, average, Batches(read, np.arange(100, 140)), None, config, place, done, watch)
    weights = {f"average.{name}": values for name, values in average.state_dict().items()}
    return engine.state() | weights, done


def test_stopped_anywhere_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Two steps an epoch, six in all: after an epoch, in the middle of one, and with accumulation."""
    for parts in (1, 4):
        whole, done = go(Checkpoints(tmp_path / f"whole{parts}", "print"), accumulation=parts, augment="crop-flip")
        assert done.step == 6
        for stop in (1, 2, 3, 5):
            place = Checkpoints(tmp_path / f"stopped{parts}-{stop}", "print")
            assert go(place, stop, accumulation=parts, augment="crop-flip")[1].step == stop
            resumed, again = go(place, accumulation=parts, augment="crop-flip")
            assert resumed.keys() == whole.keys()
            assert all(torch.equal(resumed[name], whole[name]) for name in whole)
            assert [entry["loss"] for entry in again.log] == [entry["loss"] for entry in done.log]
            assert [entry["step"] for entry in again.log] == [2, 4, 6]


def test_asked_to_save_it_saves_and_goes_on(tmp_path: Path) -> None:
    """What SIGTERM means inside a Slurm job, which requeues only what it kills itself."""
    place = Checkpoints(tmp_path, "print", keep=9)
    engine, average, config, done = start(place)
    watch = Watch(asked=lambda: SAVE if done.step + 1 == 3 else 0)
    train(engine, average, Batches(read, np.arange(100, 140)), None, config, place, done, watch)
    assert (done.step, watch.stopped) == (6, 0)
    assert [path.name for path in place.newest_first()] == [f"state-{step:08d}" for step in (6, 4, 3, 2)]


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    place = Checkpoints(tmp_path, "print", keep=2)
    engine, average, _, _ = start(place)
    log = []
    for step, robust in ((1, 0.3), (2, 0.5), (3, 0.5), (4, 0.1), (5, 0.2)):
        log.append({"epoch": step, "step": step, "validation_robust": robust, "validation_clean": 1.0})
        save_checkpoint(engine, average, place, Progress(step, log))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000002", "state-00000004", "state-00000005"]


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped bit in any file, a missing file, a half manifest; then all of them; then other settings."""
    place = Checkpoints(tmp_path, "print", keep=3)
    go(place)
    assert [path.name for path in place.newest_first()] == [f"state-{step:08d}" for step in (6, 4, 2)]
    state, manifest = place.path(6) / "state.safetensors", place.path(6) / "manifest.json"
    for file, harm in (
        (state, lambda text: text[:-1]), (state, lambda text: text[:900] + bytes([text[900] ^ 1]) + text[901:]),
        (state, None), (manifest, lambda text: text.replace(b'"step": 6', b'"step": 4')), (manifest, None),
        (manifest, lambda text: text[: len(text) // 2]),
    ):  # fmt: skip
        before = file.read_bytes()
        file.write_bytes(harm(before)) if harm else file.unlink()
        assert start(place)[3].step == 4
        said = capsys.readouterr().err
        assert str(file) in said
        assert "going on from state-00000004 before it" in said
        file.write_bytes(before)
    assert start(place)[3].step == 6
    assert capsys.readouterr().err == ""
    assert start(place, accumulation=2)[3].step == 6  # told in Checkpoints, not in the configuration
    start(Checkpoints(tmp_path, "print", accumulation=2))
    assert "saved by 1 process(es) x accumulation 1, going on with 1 x 2" in capsys.readouterr().err
    with pytest.raises(InputError, match="other settings; delete"):
        start(Checkpoints(tmp_path, "another"))
    for step in (2, 4, 6):
        (place.path(step) / "state.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=f"3 checkpoint.s. and all damaged, .*; delete {tmp_path} to train"):
        start(place)


def test_a_loss_that_is_not_finite_stops_with_its_images(tmp_path: Path) -> None:
    place, path = Checkpoints(tmp_path / "arm", "print"), tmp_path / "not_finite.json"
    engine, average, config, done = start(place)

    def poisoned(positions: np.ndarray) -> dict[str, torch.Tensor]:
        batch = read(positions)
        batch["image"][positions == 7] = torch.nan
        return batch

    batches, watch = Batches(poisoned, np.arange(100, 140)), Watch(not_finite=path)
    with pytest.raises(InputError, match=f"the loss is not finite in step .*adversarial.*{path}; .*delete {tmp_path}"):
        train(engine, average, batches, None, config, place, done, watch)
    written = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (share,) = written["shares"]
    assert 107 in share["ids"]
    assert len(share["ids"]) == 16
    assert share["loss"] == "nan"
    assert written["step"] == done.step + 1


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    """The loss of that step is finite, and it is the last one: nothing would ever see it."""
    place = Checkpoints(tmp_path, "print", keep=9)
    engine, average, config, done = start(place)
    weight = next(engine.module.parameters())

    def poison(entry: dict[str, Any]) -> None:
        if entry["step"] == 5:
            weight.register_hook(lambda gradient: gradient * torch.nan)

    with pytest.raises(InputError, match=r"not finite in step 6 \(its gradient\)"):
        train(engine, average, Batches(read, np.arange(100, 140)), None, config, place, done, Watch(on_step=poison))
    assert place.newest_first()[0].name == "state-00000004"
    assert all(torch.isfinite(each).all() for each in load_file(place.path(4) / "state.safetensors").values())


def test_only_its_own_folders_are_states(tmp_path: Path) -> None:
    """A copy that somebody put aside beside a damaged state is not taken for it, nor is one under another name."""
    place = Checkpoints(tmp_path, "print", keep=3)
    go(place)
    shutil.copytree(place.path(6), tmp_path / "state-00000006.bak")
    shutil.copytree(place.path(6), tmp_path / "state-00000007")
    (place.path(6) / "state.safetensors").write_bytes(b"damaged")
    assert start(place)[3].step == 4


def test_the_penalty_of_every_second_step_has_twice_the_weight(tmp_path: Path) -> None:
    """Seen by what the engine is called with."""
    weights: list[float] = []

    class Listening(TorchEngine):
        def __call__(self, *inputs: Any, **more: Any) -> torch.Tensor:
            weights.append(inputs[4])
            return super().__call__(*inputs, **more)

    guided = {**SETTINGS, "sensitivity": {"weight": 0.5, "every": 2}}
    config = TrainingConfig.model_validate(guided)
    engine = Listening(make_step(config), config, torch.device("cpu"))

    def flagged(positions: np.ndarray) -> dict[str, torch.Tensor]:
        segments = torch.arange(64).reshape(8, 8).expand(len(positions), 8, 8) // 32
        return {**read(positions), "segments": segments, "flagged": torch.tensor([[True, False]] * len(positions))}

    place = Checkpoints(tmp_path, "print")
    train(engine, None, Batches(flagged, np.arange(100, 140)), None, config, place, Progress(), Watch())
    assert weights == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


def refine(run: Path, *changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "hpcguard.refine", str(run), "--arm", "guided", *changes]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def await_state(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 300
    while not any(int(path.name[6:]) >= step for path in run.glob("checkpoints/guided/state-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(path: Path) -> list[dict[str, Any]]:
    """Entries of a log without what depends on the clock."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: entry[key] for key in entry.keys() - {"time", "seconds", "images_per_second"}} for entry in entries]


CHANGES = [
    "refinement.epochs=6", "refinement.averaging=0.9", "refinement.augment=crop-flip", "refinement.schedule=one-cycle",
    "refinement.clip=1.0", "refinement.log_every=1", "refinement.checkpoint_minutes=0",
]  # fmt: skip


def test_kill_and_stop_and_another_number_of_processes(
    tmp_path: Path, attributed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A training by two DeepSpeed processes is killed within an epoch, told to stop, and ended by one process."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        shutil.copytree(attributed, run)
    ds = ["refinement.engine=deepspeed", "refinement.processes=2", *CHANGES]
    assert run_stage("refine", [str(whole), "--arm", "guided", *ds]) == 0
    process = refine(killed, *ds)
    await_state(process, killed, 4)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    told = refine(killed, *ds)
    newest = max(killed.glob("checkpoints/guided/state-*")).name
    await_state(told, killed, int(newest[6:]) + 1)
    told.send_signal(signal.SIGUSR2)  # to the one that launched the two
    said = told.communicate(timeout=60)[0]
    stopped = told.returncode
    assert (stopped, "was told to stop and is saved after step" in said) == (75, True)
    assert not (killed / "checkpoints/guided/model.safetensors").exists()
    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    for run, processes in ((killed, 2), (alone, 1)):
        capfd.readouterr()
        assert run_stage("refine", [str(run), "--arm", "guided", *ds, f"refinement.processes={processes}"]) == 0
        assert ("saved by 2 process(es)" in capfd.readouterr().err) == (processes == 1)
    arms = [run / "checkpoints/guided" for run in (whole, killed, alone)]
    assert arms[0].joinpath("model.safetensors").read_bytes() == arms[1].joinpath("model.safetensors").read_bytes()
    assert lines(arms[0] / "log.jsonl") == lines(arms[1] / "log.jsonl")
    assert lines(arms[0] / "steps.jsonl") == lines(arms[1] / "steps.jsonl")
    assert [entry["step"] for entry in lines(arms[1] / "steps.jsonl")] == list(range(1, 19))
    for entry in lines(arms[1] / "log.jsonl"):
        losses = [step["loss"] for step in lines(arms[1] / "steps.jsonl") if step["epoch"] == entry["epoch"]]
        assert entry["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    exact, near = (load_file(arm / "model.safetensors") for arm in arms[::2])
    assert max((exact[name].double() - near[name].double()).abs().max() for name in exact) < 1e-5
    events = EventAccumulator(str(arms[1] / "events")).Reload()
    assert [event.step for event in events.Scalars("steps/loss")] == list(range(1, 19))
    assert [event.step for event in events.Scalars("epochs/validation_robust")] == [3, 6, 9, 12, 15, 18]
    with safe_open(arms[1] / "model.safetensors", "np") as file:  # the configuration, without hpcguard
        header = json.loads(file.metadata()["hpcguard"])
    assert header["training"]["averaging"] == 0.9
    assert header["model"]["name"] == "small-cnn"


def test_the_best_epoch_can_be_chosen(tmp_path: Path, attributed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """choose=best publishes what choose=last keeps beside it, and it is the epoch that its log shows best."""
    runs = {choose: tmp_path / choose for choose in ("last", "best")}
    for choose, run in runs.items():
        shutil.copytree(attributed, run)
        changes = ["refinement.epochs=5", "refinement.learning_rate=0.3", f"refinement.choose={choose}"]
        assert run_stage("refine", [str(run), "--arm", "pgd", *changes]) == 0
    last, best = (run / "checkpoints/pgd" for run in runs.values())
    log = lines(last / "log.jsonl")
    rank = [(entry["validation_robust"], entry["validation_clean"], -entry["epoch"]) for entry in log]
    epoch = -max(rank)[2]
    assert json.loads((best / "training.json").read_text())["chosen"]["epoch"] == epoch
    assert json.loads((last / "training.json").read_text())["chosen"]["epoch"] == 5
    one, other = load_file(last / "best.safetensors"), load_file(best / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    final = load_file(last / "model.safetensors")
    assert epoch == 5 or any(not torch.equal(final[name], other[name]) for name in final)
    assert not (best / "best.safetensors").exists()
    run = tmp_path / "none"
    shutil.copytree(attributed, run)
    assert run_stage("refine", [str(run), "--arm", "pgd", "refinement.choose=best", "data.validation=0"]) == 2
    capsys.readouterr()
