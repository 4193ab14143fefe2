"""Train the arms of a run with DeepSpeed: the guided one and its controls, or the baseline to be explained.

Every arm runs the same code from the same start; a control only has terms switched off. A finished arm is kept, an
interrupted one goes on from its last checkpoint. Started alone, this launches refinement.processes processes; under
torchrun, deepspeed, srun or mpiexec it is one of theirs. Told to stop (SIGTERM, or SIGUSR2 before a time limit) it
saves a checkpoint and ends with status 75, or asks Slurm to run it again.
Writes RUN/checkpoints/ARM/model.safetensors, training.json, log.jsonl, steps.jsonl and events/ for TensorBoard.
"""

import argparse
import sys
from typing import Any

import torch

from hpcguard.cluster.devices import pick_device
from hpcguard.cluster.plan import attribution_identity, require_plan
from hpcguard.cluster.ranks import Place, launched_here, run_ranks, start_as_rank, torch_rank
from hpcguard.config import Config, TrainingConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.models import check_answers, load_model
from hpcguard.progress import say
from hpcguard.refinement.arm import STOPPED, ArmTask, guided_rows, train_arm, without
from hpcguard.refinement.deepspeed_json import deepspeed_config
from hpcguard.refinement.engine import from_first_rank, join_world
from hpcguard.refinement.schedule import total_steps
from hpcguard.refinement.spurious import spurious_identity
from hpcguard.runs import RunFolder, differences, digest_file, read_json
from hpcguard.store import read_store_manifest, view_problem

EXAMPLE = (
    "python -m hpcguard.refine configs/quickstart.yaml --arm baseline",
    "python -m hpcguard.refine configs/quickstart.yaml refinement.processes=2",
    "torchrun --nproc-per-node 2 -m hpcguard.refine configs/quickstart.yaml --arm guided",
    "deepspeed --num_gpus 2 --module hpcguard.refine configs/quickstart.yaml",
    "mpiexec -n 2 python -m hpcguard.refine configs/quickstart.yaml",
)
REFINEMENT_VERSION = 3  # raised when the same configuration trains something else: 3 draws other noise
SECTIONS = ("data", "model", "baseline", "refinement", "controls", "evaluation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arm",
        action="append",
        metavar="ARM",
        help="train only this arm (repeatable): baseline, guided, or one of controls",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher adds it; LOCAL_RANK says it too


def run(config: Config, arguments: argparse.Namespace) -> int:
    start_as_rank()
    folder = RunFolder(config.run)
    arms = list(dict.fromkeys(arguments.arm or config.arms()))
    images = load_images(config.data, "train")
    world = torch_rank()
    _check_world(config, arms, world)
    device = pick_device(config.device, world.local_rank if world else 0)
    if world and any(config.arm(arm).engine == "deepspeed" for arm in arms):
        join_world(device, world.size)
    # By the first rank alone: it reads every image and every byte of the store.
    identities, todo = from_first_rank(lambda: _survey(config, arms, folder, images, world))
    for arm in todo:
        training = config.arm(arm)
        if training.engine == "torch" or world is not None:
            task = ArmTask(config, arm, identities[arm], folder, images, world or Place(0, 1, 0), device)
            status = train_arm(task)
        else:
            status = _launch(arguments, arm, training)
        if status:
            return status
    return 0


def _check_world(config: Config, arms: list[str], world: Place | None) -> None:
    for arm in arms:
        if config.arm(arm).engine == "torch" and world and world.size > 1:
            raise InputError(f"engine = torch runs in one process, a launcher started {world.size}; use deepspeed")


def _survey(
    config: Config, arms: list[str], folder: RunFolder, images: ImageSet, world: Place | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """What each arm's weights depend on, and the arms that are still to be trained, checked."""
    left_out = _quarantined(folder) if set(arms) != {"baseline"} else []  # a baseline comes before any store
    identities = {arm: _identity(config, config.arm(arm), folder, images) for arm in arms}
    for arm in set(arms) - {"baseline"} if left_out else ():
        identities[arm]["quarantined"] = left_out
    todo = [arm for arm in arms if not _is_done(folder, arm, identities[arm])]
    for arm in todo:  # all of them first: a fault in the last must not show after hours of the first
        _check(config, config.arm(arm), identities[arm], folder, images, world)
    for arm in arms:
        if arm not in todo:
            say(f"refine: {arm} is trained already: {folder.weights(arm)}")
    if todo:
        folder.create()
        folder.record_config(config, ("baseline", "refinement", "controls"))
    return identities, todo


def _launch(arguments: argparse.Namespace, arm: str, training: TrainingConfig) -> int:
    command = [sys.executable, "-m", "hpcguard.refine", arguments.config, *arguments.overrides, "--arm", arm]
    status = run_ranks(command, training.processes, training.threads)
    if status not in (0, 2, STOPPED):
        say(f"refine: {arm} stopped with exit status {status}; the same command goes on from its last checkpoint")
    return status


def _identity(config: Config, training: TrainingConfig, folder: RunFolder, images: ImageSet) -> dict[str, Any]:
    """Everything that an arm's weights depend on."""
    identity: dict[str, Any] = {
        "version": REFINEMENT_VERSION,
        "training": training.identity(),
        "model": config.model.identity(),
        "data": {**config.data.identity(), "sha256": images.digest()},
    }
    if config.data.validation:
        identity["validation_eps"] = config.validation_eps(training)  # the best epoch is chosen by it
    if training.start == "baseline":
        identity["start_sha256"] = digest_file(folder.explained_weights(config))
    if training.guided:
        weights = digest_file(folder.explained_weights(config))
        plan = require_plan(folder.plan, attribution_identity(config, images, weights))
        identity["store"] = plan.fingerprint
        identity["training"]["spurious"] = spurious_identity(training.spurious)
    return identity


def _quarantined(folder: RunFolder) -> list[int]:
    """Images that attribution could not explain: no arm is refined with them, so that all see the same."""
    if not folder.store_manifest.exists():
        return []
    return list(read_store_manifest(folder.store_manifest).get("quarantined", []))


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
    images = without(images, identity)
    start = folder.explained_weights(config) if training.start == "baseline" else None
    model = load_model(config.model, len(images.classes), images.shape[0], start)
    check_answers(model, torch.from_numpy(images.images(images.ids[:1])), len(images.classes))
    total_steps(len(images), training)
    if training.engine == "deepspeed":
        deepspeed_config(training, world.size if world else training.processes)
        gpus = torch.cuda.device_count() if config.device != "cpu" else 0
        if world is None and 0 < gpus < training.processes:
            raise InputError(f"processes = {training.processes}: {gpus} GPU(s) here; lower it, or set device=cpu")
    if training.choose == "best" and not config.data.validation:
        raise InputError("choose = best needs a validation split; set data.validation, or choose: last")
    if training.guided:
        if not launched_here() and (problem := view_problem(folder.store, folder.store_manifest, identity["store"])):
            raise InputError(problem)
        guided_rows(folder, images, training, memory=False, shared=False)


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("refine"))
