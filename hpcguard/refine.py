"""Train the arms of a run with DeepSpeed: the guided one and its controls, or the baseline to be explained.

Every arm runs the same code from the same start; a control only has terms switched off. A finished arm is kept, an
interrupted one goes on from its last epoch. Started alone, this launches refinement.processes processes; under
torchrun, deepspeed or srun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set) it is one of theirs.
Writes RUN/checkpoints/ARM/model.safetensors, training.json and log.jsonl.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpcguard.cluster.devices import pick_device
from hpcguard.cluster.plan import attribution_identity, require_plan
from hpcguard.cluster.ranks import Place, is_first_rank, run_ranks, start_as_rank, torch_rank
from hpcguard.config import Config, TrainingConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.models import check_answers, load_model, save_weights
from hpcguard.progress import progress, say
from hpcguard.refinement.checkpoint import remove_checkpoints
from hpcguard.refinement.engine import Engine, deepspeed_config, make_engine, read_deepspeed_json
from hpcguard.refinement.spurious import check_flagged, flag_segments
from hpcguard.refinement.step import GuidedStep
from hpcguard.refinement.train import Batches, Validation, total_steps, train
from hpcguard.runs import RunFolder, differences, digest_file, digest_json, exclusive, publish, read_json, write_json
from hpcguard.store import AttributionDataset, view_problem

EXAMPLE = (
    "python -m hpcguard.refine configs/quickstart.yaml --arm baseline",
    "python -m hpcguard.refine configs/quickstart.yaml refinement.processes=2",
    "torchrun --nproc-per-node 2 -m hpcguard.refine configs/quickstart.yaml --arm guided",
)
SECTIONS = ("data", "model", "baseline", "refinement", "controls", "evaluation")


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
    arms = list(dict.fromkeys(arguments.arm or config.arms()))
    images = load_images(config.data, "train")
    pick_device(config.device)
    world = torch_rank()
    left_out = _quarantined(folder)
    identities = {arm: _identity(config, config.arm(arm), folder, images) for arm in arms}
    for arm in set(arms) - {"baseline"} if left_out else ():
        identities[arm]["quarantined"] = left_out
    todo = [arm for arm in arms if not _is_done(folder, arm, identities[arm])]
    for arm in todo:  # all of them first: a fault in the last must not show after hours of the first
        _check(config, config.arm(arm), identities[arm], folder, images, world)
    if is_first_rank():
        for arm in arms:
            if arm not in todo:
                say(f"refine: {arm} is trained already: {folder.weights(arm)}")
        if todo:
            folder.create()
            folder.record_config(config, ("baseline", "refinement", "controls"))
    for arm in todo:
        training = config.arm(arm)
        if training.engine == "torch" or world is not None:
            _train_arm(config, arm, identities[arm], folder, images, world or Place(0, 1, 0))
        elif status := _launch(arguments, arm, training):
            return status
    return 0


def _launch(arguments: argparse.Namespace, arm: str, training: TrainingConfig) -> int:
    command = [sys.executable, "-m", "hpcguard.refine", arguments.config, *arguments.overrides, "--arm", arm]
    status = run_ranks(command, training.processes, training.threads)
    if status not in (0, 2):
        say(f"refine: {arm} stopped with exit status {status}; the same command goes on from its last epoch")
    return status


def _identity(config: Config, training: TrainingConfig, folder: RunFolder, images: ImageSet) -> dict[str, Any]:
    """Everything that an arm's weights depend on."""
    identity: dict[str, Any] = {
        "training": training.identity(),
        "model": config.model.identity(),
        "data": {**config.data.identity(), "sha256": images.digest()},
    }
    if training.deepspeed is not None:
        identity["deepspeed"] = read_deepspeed_json(training.deepspeed)
    if training.start == "baseline":
        identity["start_sha256"] = digest_file(folder.explained_weights(config))
    if training.guided:
        weights = digest_file(folder.explained_weights(config))
        plan = require_plan(folder.plan, attribution_identity(config, images, weights))
        identity["store"] = plan.fingerprint
    return identity


def _quarantined(folder: RunFolder) -> list[int]:
    """Images that attribution could not explain: no arm is refined with them, so that all see the same."""
    if not folder.store_manifest.exists():
        return []
    return list(read_json(folder.store_manifest, "run consolidate again").get("quarantined", []))


def _without(images: ImageSet, identity: dict[str, Any]) -> ImageSet:
    left_out = identity.get("quarantined", [])
    return images.subset(images.ids[~np.isin(images.ids, left_out)]) if left_out else images


def _is_done(folder: RunFolder, arm: str, identity: dict[str, Any]) -> bool:
    if not folder.weights(arm).exists():
        return False
    remedy = f"delete {folder.checkpoint(arm)} to train the arm again"
    recorded = read_json(folder.training(arm), remedy, identity=dict, weights_sha256=str)
    if recorded["weights_sha256"] != digest_file(folder.weights(arm)):
        raise InputError(f"{folder.weights(arm)}: differs from what was trained; {remedy}")
    if changed := differences(recorded["identity"], identity):
        raise InputError(
            f"{folder.checkpoint(arm)} was trained with other settings: {changed}; {remedy}, or change run"
        )
    return True


def _check(
    config: Config, training: TrainingConfig, identity: dict[str, Any], folder: RunFolder, images: ImageSet,
    world: Place | None,
) -> None:  # fmt: skip
    """Find in seconds, before processes start, what would stop the training."""
    images = _without(images, identity)
    start = folder.explained_weights(config) if training.start == "baseline" else None
    model = load_model(config.model, len(images.classes), images.shape[0], start)
    check_answers(model, torch.from_numpy(images.images(images.ids[:1])), len(images.classes))
    total_steps(len(images), training)
    if training.engine == "deepspeed":
        deepspeed_config(training, world.size if world else training.processes)
        gpus = torch.cuda.device_count() if config.device != "cpu" else 0
        if world is None and 0 < gpus < training.processes:
            raise InputError(f"processes = {training.processes}: {gpus} GPU(s) here; lower it, or set device=cpu")
    elif world and world.size > 1:
        raise InputError(f"engine = torch runs in one process, a launcher started {world.size}; use deepspeed")
    if training.guided:
        if problem := view_problem(folder.store, folder.store_manifest, identity["store"]):
            raise InputError(problem)
        _guided_rows(folder, images, training, memory=False)


def _guided_rows(
    folder: RunFolder, images: ImageSet, training: TrainingConfig, memory: bool | None = None
) -> tuple[AttributionDataset, dict[str, float]]:
    dataset = AttributionDataset(folder.store, images, ["segments"], memory)
    dataset.flagged = flag_segments(dataset.rows, training.spurious, training.seed)
    return dataset, check_flagged(dataset.flagged, dataset.rows["num_segments"], training.spurious)


def _train_arm(
    config: Config, arm: str, identity: dict[str, Any], folder: RunFolder, images: ImageSet, world: Place
) -> None:
    """Train one arm to its published weights; the first rank holds the arm's lock."""
    training = config.arm(arm)
    with exclusive(folder.checkpoint(arm)) if world.rank == 0 else nullcontext():
        engine = _train(config, training, arm, identity, folder, images, world)
        engine.barrier()


def _train(
    config: Config, training: TrainingConfig, arm: str, identity: dict[str, Any], folder: RunFolder,
    images: ImageSet, world: Place,
) -> Engine:  # fmt: skip
    images = _without(images, identity)
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    device = pick_device(config.device, world.local_rank)
    start = folder.explained_weights(config) if training.start == "baseline" else None
    model = load_model(config.model, len(images.classes), images.shape[0], start)
    batches, shares = _batches(folder, images, training)
    engine = make_engine(GuidedStep(model, training, _mean_colour(images)), training, device, world.size)
    validation = _validation(config)
    total = total_steps(len(images), training)
    with progress(f"refine {arm}", total, "steps") if world.rank == 0 else nullcontext(None) as meter:
        entries: list[dict[str, Any]] = []
        show = meter.set if meter else _ignore

        def log(epochs: list[dict[str, Any]]) -> None:
            entries[:] = epochs
            if meter:
                _write_log(folder.training_log(arm), epochs, shares)

        train(engine, batches, validation, training, folder.checkpoint(arm), digest_json(identity), show, log)
    if world.rank == 0:
        seconds = sum(entry["seconds"] for entry in entries)
        details = {
            "arm": arm, "identity": identity, "world_size": world.size, "device": str(device), "steps": total,
            "spurious": shares, "seconds": round(seconds, 1), "last_epoch": entries[-1],
        }  # fmt: skip
        _publish_weights(engine, config, folder, arm, details)
        say(f"refine: {arm} trained, {total} steps in {seconds:.0f} s: {folder.weights(arm)}")
    return engine


def _validation(config: Config) -> Validation | None:
    """The validation split, attacked with the radius of the evaluation, the same for every arm."""
    if not config.data.validation:
        return None
    return Validation(load_images(config.data, "validation"), config.evaluation.eps)


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


def _ignore(done: int, note: str) -> None:
    """Ranks but the first show nothing."""


def _write_log(path: Path, entries: list[dict[str, Any]], shares: dict[str, float]) -> None:
    """Publish log.jsonl, a line an epoch; whole at any time, since the entries come with the checkpoint."""
    named = {f"share_{name}": share for name, share in shares.items()}
    with publish(path) as temporary:
        temporary.write_text("".join(json.dumps({**entry, **named}) + "\n" for entry in entries), encoding="utf-8")


def _publish_weights(engine: Engine, config: Config, folder: RunFolder, arm: str, details: dict[str, Any]) -> None:
    metadata = {"arm": arm, "model": json.dumps(config.model.identity())}
    weights = folder.weights(arm)
    with publish(weights) as temporary:
        save_weights(engine.module.model, temporary, metadata)
        # Before the weights appear: weights that are there are always described.
        write_json(folder.training(arm), {**details, "weights_sha256": digest_file(temporary)})
    remove_checkpoints(folder.checkpoint(arm))


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("refine"))
