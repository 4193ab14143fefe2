"""Training one arm: from its data and its checkpoint to its published weights."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hpcguard.cluster.heap import freed_memory_kept
from hpcguard.cluster.ranks import Place
from hpcguard.cluster.slurm import own_job, requeue_self
from hpcguard.cluster.told import END, TIME_IS_UP, told_by
from hpcguard.config import Config, TrainingConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.models import Normalized, load_model, save_weights
from hpcguard.progress import Meter, progress, say
from hpcguard.refinement.averaging import start_average
from hpcguard.refinement.batches import Batches
from hpcguard.refinement.checkpoint import (
    Checkpoints,
    Progress,
    best_epoch,
    load_best,
    load_checkpoint,
    remove_checkpoints,
)
from hpcguard.refinement.engine import Engine, from_first_rank, make_engine
from hpcguard.refinement.log import TrainingLog
from hpcguard.refinement.schedule import total_steps
from hpcguard.refinement.spurious import check_flagged, flag_segments
from hpcguard.refinement.step import GuidedStep
from hpcguard.refinement.train import REQUEUE, SAVE, STOP, Validation, Watch, train
from hpcguard.runs import RunFolder, digest_file, digest_json, exclusive, publish, write_json
from hpcguard.store import AttributionDataset

STOPPED = 75  # exit status, sysexits' EX_TEMPFAIL: saved, the same command goes on
LINGER_S = 60.0  # after asking to be requeued: Slurm ends us meanwhile


@dataclass(frozen=True)
class ArmTask:
    """One arm to be trained by this process, one of several."""

    config: Config
    arm: str
    identity: dict[str, Any]
    folder: RunFolder
    images: ImageSet
    world: Place
    device: torch.device

    @property
    def training(self) -> TrainingConfig:
        return self.config.arm(self.arm)


def train_arm(task: ArmTask) -> int:
    """Train one arm to its published weights; the first rank holds the arm's lock. Returns an exit status."""
    with exclusive(task.folder.checkpoint(task.arm)) if task.world.rank == 0 else nullcontext():
        with told_by(END, TIME_IS_UP) as told:

            def asked() -> int:
                if TIME_IS_UP in told:
                    return REQUEUE
                if END in told and own_job():
                    told.discard(END)  # pre-emption: Slurm requeues what it kills, not what ends of itself
                    return SAVE
                return STOP if END in told else 0

            with freed_memory_kept() if task.device.type == "cpu" else nullcontext():
                engine, begun, done, stopped = _train(task, asked)
            engine.barrier()
        return _after_stop(task, stopped, done.step, done.step - begun) if stopped else 0


def _after_stop(task: ArmTask, reason: int, step: int, new_steps: int) -> int:
    """Saved before the end: ask Slurm to go on where it was its time limit, and where steps were done at all."""

    def end() -> None:
        say(f"refine: {task.arm} was told to stop and is saved after step {step}; the same command goes on from there")
        if reason != REQUEUE:
            return
        if new_steps < 2:  # the stop itself costs one
            say("refine: not requeued, for it came no further than this: raise the job's time limit")
        elif requeue_self():
            say("refine: to be requeued")
            time.sleep(LINGER_S)

    from_first_rank(end)
    return STOPPED


def _train(task: ArmTask, asked: Callable[[], int]) -> tuple[Engine, int, Progress, int]:
    """Train as far as it goes; the engine, the first step, the progress, and why it stopped before the end, or 0."""
    config, training, folder, arm = task.config, task.training, task.folder, task.arm
    images = without(task.images, task.identity)
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    start = folder.explained_weights(config) if training.start == "baseline" else None
    model = load_model(config.model, len(images.classes), images.shape[0], start)
    batches, shares = _batches(folder, images, training)
    average = start_average(model).to(task.device) if training.averaging else None
    engine = make_engine(GuidedStep(model, training, _mean_colour(images)), training, task.device, task.world.size)
    place = Checkpoints(folder.checkpoint(arm), digest_json(task.identity), training.keep, training.accumulation)
    done = load_checkpoint(engine, average, place)
    begun = done.step
    with _watch(task, done, shares, asked, len(images)) as watch:
        train(engine, average, batches, _validation(config, training), training, place, done, watch)
    if task.world.rank == 0 and not watch.stopped:
        seconds = sum(entry["seconds"] for entry in done.log)
        details = {
            "arm": arm, "identity": task.identity, "world_size": task.world.size, "device": str(task.device),
            "threads": training.threads, "steps": done.step, "spurious": shares, "seconds": round(seconds, 1),
            "last_epoch": done.log[-1],
        }  # fmt: skip
        _publish_weights(task, average or engine.module.model, place, done, details)
        say(f"refine: {arm} trained, {done.step} steps in {seconds:.0f} s: {folder.weights(arm)}")
    return engine, begun, done, watch.stopped


@contextmanager
def _watch(
    task: ArmTask, done: Progress, shares: dict[str, float], asked: Callable[[], int], images: int
) -> Iterator[Watch]:
    """Logs and progress of the first rank; the others only listen."""
    if task.world.rank:
        yield Watch(asked=asked)
        return
    training = task.training
    log = TrainingLog(task.folder, task.arm, done, shares)
    total = total_steps(images, training)
    with closing(log), progress(f"refine {task.arm}", total, "steps") as meter:
        reader = _Reader(log, meter, training, done.step)
        yield Watch(reader.step, log.epoch, asked, task.folder.not_finite(task.arm))


class _Reader:
    """Steps to lines of the log, at every log_every-th, and to the progress's note."""

    def __init__(self, log: TrainingLog, meter: Meter, training: TrainingConfig, step: int) -> None:
        self._log, self._meter, self._training = log, meter, training
        self._since, self._logged, self._rate = time.monotonic(), step, 0.0

    def step(self, entry: dict[str, Any]) -> None:
        step, every = entry["step"], self._training.log_every
        seconds = time.monotonic() - self._since
        self._rate = (step - self._logged) * self._training.batch_size / max(seconds, 1e-9)
        self._meter.set(step, _note(entry, self._rate))
        if step % every == 0:
            self._log.step({**entry, "images_per_second": round(self._rate, 1), "time": time.time()})
            self._since, self._logged = time.monotonic(), step


def _note(entry: dict[str, Any], images_per_second: float) -> str:
    terms = ", ".join(f"{name} {entry[name]:.3f}" for name in GuidedStep.TERMS if entry[name])
    mask = f", mask {entry['mask_share']:.0%}" if entry["mask_share"] else ""
    return f"epoch {entry['epoch']}, loss {entry['loss']:.3f} ({terms}){mask}, {images_per_second:.0f} images/s"


def _validation(config: Config, training: TrainingConfig) -> Validation | None:
    """The validation split, attacked in Linf for every arm but those that are trained in an L2 ball."""
    if not config.data.validation:
        return None
    images = load_images(config.data, "validation")
    eps = config.validation_eps(training)
    if training.attacked and training.attack.norm == "l2":
        return Validation(images, eps, "l2")
    return Validation(images, eps)


def _batches(folder: RunFolder, images: ImageSet, training: TrainingConfig) -> tuple[Batches, dict[str, float]]:
    if training.guided:
        dataset, shares = guided_rows(folder, images, training)
        return Batches(dataset.batch, images.ids), shares

    def read(positions: np.ndarray) -> dict[str, torch.Tensor]:
        ids = images.ids[positions]
        return {"image": torch.from_numpy(images.images(ids)), "label": torch.from_numpy(images.labels_of(ids))}

    return Batches(read, images.ids), {}


def _mean_colour(images: ImageSet) -> torch.Tensor:
    """Mean of each channel over the training images (at most 4096 of them, evenly spread)."""
    ids = images.ids[:: -(-len(images) // 4096)]
    return torch.from_numpy(images.images(ids).mean((0, 2, 3), dtype=np.float64).astype(np.float32))


def _publish_weights(
    task: ArmTask, model: Normalized, place: Checkpoints, done: Progress, details: dict[str, Any]
) -> None:
    """model.safetensors by refinement.choose, and best.safetensors beside the last; then no checkpoint is needed."""
    folder, arm, chosen = task.folder, task.arm, done.log[-1]
    if best_epoch(done.log):
        last = {name: values.clone() for name, values in model.state_dict().items()}
        best = load_best(model, place, done.log)
        if task.training.choose == "best":
            chosen = best
        else:
            with publish(folder.best_weights(arm)) as temporary:
                save_weights(model, temporary, _header(task, best))
            model.load_state_dict(last)
    with publish(folder.weights(arm)) as temporary:
        save_weights(model, temporary, _header(task, chosen))
        # Before the weights appear: weights that are there are always described.
        digest = digest_file(temporary)
        write_json(folder.training(arm), {**details, "chosen": chosen, "weights_sha256": digest})
    folder.not_finite(arm).unlink(missing_ok=True)
    remove_checkpoints(folder.checkpoint(arm))


def _header(task: ArmTask, entry: dict[str, Any]) -> dict[str, str]:
    """What the weights were made with, for a reader without hpcguard. One key: safetensors writes several in an order
    that changes from process to process, and with it the file's digest."""
    return {"hpcguard": json.dumps({"arm": task.arm, "epoch": entry["epoch"], **task.identity})}


def guided_rows(
    folder: RunFolder, images: ImageSet, training: TrainingConfig, memory: bool | None = None, shared: bool = True
) -> tuple[AttributionDataset, dict[str, float]]:
    """The store's rows of `images` with their flagged segments, and the shares that check_flagged gives."""
    dataset = AttributionDataset(folder.store, images, ["segments"], memory)

    def flag() -> tuple[np.ndarray, dict[str, float]]:
        flagged = flag_segments(dataset.rows, training.spurious, training.seed)
        rows = dataset.rows
        return flagged, check_flagged(flagged, rows["num_segments"], training.spurious, rows["segments"])

    dataset.flagged, shares = from_first_rank(flag) if shared else flag()
    return dataset, shares


def without(images: ImageSet, identity: dict[str, Any]) -> ImageSet:
    """The images that an arm is trained on: those that attribution could not explain are left out."""
    left_out = identity.get("quarantined", [])
    return images.subset(images.ids[~np.isin(images.ids, left_out)]) if left_out else images
