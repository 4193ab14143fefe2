"""Train the arms of a run with DeepSpeed: the guided one and its controls, or the baseline to be explained.

Every arm runs the same code from the same start; a control only has terms switched off. A finished arm is kept, an
interrupted one goes on from its last epoch. Started alone, this launches refinement.processes processes; under
torchrun, deepspeed or srun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set) it is one of theirs.
Writes RUN/checkpoints/ARM/model.safetensors, training.json and log.jsonl.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcguard.cluster.devices import pick_device
from hpcguard.cluster.ranks import run_ranks, start_as_rank, torch_rank
from hpcguard.config import Config, TrainingConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.models import load_model, save_weights
from hpcguard.progress import Meter, progress, say
from hpcguard.refinement.checkpoint import remove_checkpoints
from hpcguard.refinement.engine import Engine, deepspeed_config, make_engine, micro_batch_size
from hpcguard.refinement.spurious import check_flagged, flag_segments
from hpcguard.refinement.step import GuidedStep
from hpcguard.refinement.train import Batches, total_steps, train
from hpcguard.runs import RunFolder, differences, digest_file, digest_json, publish, read_json, write_json
from hpcguard.store import AttributionDataset, view_problem

EXAMPLE = (
    "python -m hpcguard.refine configs/quickstart.yaml --arm baseline",
    "python -m hpcguard.refine configs/quickstart.yaml refinement.processes=2",
    "torchrun --nproc-per-node 2 -m hpcguard.refine configs/quickstart.yaml --arm guided",
)
SECTIONS = ("data", "model", "baseline", "refinement", "controls")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        metavar="ARM",
        help="train only this arm (repeatable): baseline, guided, or one of controls",
    )


def run(config: Config, arguments: argparse.Namespace) -> int:
    start_as_rank()
    folder = RunFolder(config.run)
    arms = arguments.arm or config.arms()
    images = load_images(config.data, "train")
    world = torch_rank()
    for arm in arms:
        training = config.arm(arm)
        identity = _identity(config, training, folder, images)
        if _is_done(folder, arm, identity):
            if world is None or world[0] == 0:
                say(f"refine: {arm} is trained already: {folder.weights(arm)}")
            continue
        _check(config, training, folder, images, world[1] if world else training.processes)
        if world is None:
            folder.create()
            folder.record_config(config)
        if training.engine == "torch" or world is not None:
            _train_arm(config, arm, training, identity, folder, images, world or (0, 1))
        elif status := _launch(arguments, arm, training):
            say(f"refine: {arm} stopped with exit status {status}; the same command goes on from its last epoch")
            return status
    return 0


def _launch(arguments: argparse.Namespace, arm: str, training: TrainingConfig) -> int:
    command = [sys.executable, "-m", "hpcguard.refine", arguments.config, *arguments.overrides, "--arm", arm]
    return run_ranks(command, training.processes, training.threads)


def _identity(config: Config, training: TrainingConfig, folder: RunFolder, images: ImageSet) -> dict[str, Any]:
    """Everything that an arm's weights depend on."""
    identity: dict[str, Any] = {
        "training": training.model_dump(mode="json", exclude={"deepspeed", "threads"}),
        "model": config.model.model_dump(mode="json", exclude={"weights"}),
        "data": {**config.data.model_dump(mode="json", exclude={"root"}), "sha256": images.digest()},
    }
    if training.engine == "deepspeed":
        identity["deepspeed"] = deepspeed_config(training, training.processes)
    if training.start == "baseline":
        identity["start_sha256"] = digest_file(folder.explained_weights(config))
    if training.guided:
        identity["store"] = read_json(folder.store_manifest, "run attribute and consolidate first")["fingerprint"]
    return identity


def _is_done(folder: RunFolder, arm: str, identity: dict[str, Any]) -> bool:
    if not folder.weights(arm).exists():
        return False
    remedy = f"delete {folder.checkpoint(arm)} to train the arm again"
    recorded = read_json(folder.training(arm), remedy)
    if recorded["weights_sha256"] != digest_file(folder.weights(arm)):
        raise InputError(f"{folder.weights(arm)}: differs from what was trained; {remedy}")
    if changed := differences(recorded["identity"], identity):
        raise InputError(
            f"{folder.checkpoint(arm)} was trained with other settings: {changed}; {remedy}, or change run"
        )
    return True


def _check(config: Config, training: TrainingConfig, folder: RunFolder, images: ImageSet, world_size: int) -> None:
    """Find in seconds, before processes start, what would stop the training."""
    start = folder.explained_weights(config) if training.start == "baseline" else None
    load_model(config.model, len(images.classes), images.shape[0], start)
    micro_batch_size(training, world_size)
    total_steps(len(images), training)
    if training.guided:
        if problem := view_problem(folder.store, folder.store_manifest):
            raise InputError(problem)
        _guided_rows(folder, images, training)


def _guided_rows(
    folder: RunFolder, images: ImageSet, training: TrainingConfig
) -> tuple[AttributionDataset, dict[str, float]]:
    dataset = AttributionDataset(folder.store, images)
    dataset.flagged = flag_segments(dataset.rows, training.spurious, training.seed)
    return dataset, check_flagged(dataset.flagged, dataset.rows["num_segments"], training.spurious)


def _train_arm(
    config: Config, arm: str, training: TrainingConfig, identity: dict[str, Any], folder: RunFolder,
    images: ImageSet, world: tuple[int, int],
) -> None:  # fmt: skip
    rank, world_size = world
    started = time.monotonic()
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    device = pick_device(config.device, rank)
    start = folder.explained_weights(config) if training.start == "baseline" else None
    model = load_model(config.model, len(images.classes), images.shape[0], start)
    batches, shares = _batches(folder, images, training)
    step = GuidedStep(model, training, _mean_colour(images))
    engine = make_engine(step, training, device, world_size)
    validation = load_images(config.data, "validation") if config.data.validation else None
    total = total_steps(len(images), training)
    log = folder.training_log(arm)
    with progress(f"refine {arm}", total, "steps") if rank == 0 else nullcontext(None) as meter:
        history = _run(
            engine, batches, validation, training, folder.checkpoint(arm), digest_json(identity), log, meter, shares
        )
    if rank == 0:
        details = {
            "arm": arm, "identity": identity, "world_size": world_size, "device": str(device), "steps": total,
            "spurious": shares, "seconds": round(time.monotonic() - started, 1), "last_epoch": history,
        }  # fmt: skip
        _publish_weights(engine, config, folder, arm, details)
        say(f"refine: {arm} trained in {time.monotonic() - started:.0f} s, {total} steps: {folder.weights(arm)}")
    engine.barrier()


def _batches(folder: RunFolder, images: ImageSet, training: TrainingConfig) -> tuple[Batches, dict[str, float]]:
    if training.guided:
        dataset, shares = _guided_rows(folder, images, training)
        return Batches(dataset.batch, len(images)), shares

    def read(positions: np.ndarray) -> dict[str, torch.Tensor]:
        ids = images.ids[positions]
        return {"image": torch.from_numpy(images.images(ids)), "label": torch.from_numpy(images.labels_of(ids))}

    return Batches(read, len(images)), {}


def _mean_colour(images: ImageSet) -> torch.Tensor:
    """Mean of each channel over the training images (at most 4096 of them, evenly spread)."""
    ids = images.ids[:: -(-len(images) // 4096)]
    return torch.from_numpy(images.images(ids).mean((0, 2, 3), dtype=np.float64).astype(np.float32))


def _run(
    engine: Engine, batches: Batches, validation: ImageSet | None, training: TrainingConfig, checkpoints: Path,
    fingerprint: str, log: Path, meter: Meter | None, shares: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Train with progress and a log on rank 0; returns the last epoch's entry."""
    last: dict[str, Any] = {}

    def on_step(done: int, note: str) -> None:
        if meter:
            meter.set(done, note)

    def on_epoch(entry: dict[str, Any]) -> None:
        last.update(entry)
        if meter:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**entry, **{f"share_{name}": share for name, share in shares.items()}}) + "\n")

    train(engine, batches, validation, training, checkpoints, fingerprint, on_step, on_epoch)
    return last


def _publish_weights(engine: Engine, config: Config, folder: RunFolder, arm: str, details: dict[str, Any]) -> None:
    metadata = {"arm": arm, "model": config.model.model_dump_json(exclude={"weights"})}
    weights = folder.weights(arm)
    with publish(weights) as temporary:
        save_weights(engine.module.model, temporary, metadata)
        # Before the weights appear: weights that are there are always described.
        write_json(folder.training(arm), {**details, "weights_sha256": digest_file(temporary)})
    remove_checkpoints(folder.checkpoint(arm))


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("refine"))
