"""The training loop of one arm."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.attacks import pgd
from hpcguard.config import TrainingConfig
from hpcguard.data import ImageSet
from hpcguard.errors import InputError
from hpcguard.randomness import keyed_generator, torch_seed
from hpcguard.refinement.augment import augment, draw_shifts
from hpcguard.refinement.checkpoint import load_checkpoint, save_checkpoint
from hpcguard.refinement.engine import Engine, average_buffers, micro_batch_size
from hpcguard.refinement.masking import flagged_pixels
from hpcguard.refinement.step import GuidedStep

VALIDATION_IMAGES = 256  # so many are attacked at most


@dataclass(frozen=True)
class Batches:
    """What an arm trains on: `read(positions)` gives image, label and, where guided, segments and flagged."""

    read: Callable[[np.ndarray], dict[str, Tensor]]
    size: int


@dataclass(frozen=True)
class Validation:
    """Images that are measured, and attacked with radius eps, after every epoch, for the log only."""

    images: ImageSet
    eps: float


def steps_per_epoch(size: int, config: TrainingConfig) -> int:
    """Whole batches only: every rank must have an equal share in every step."""
    if size < config.batch_size:
        raise InputError(f"batch_size = {config.batch_size}: more than the {size} training images; lower it")
    return size // config.batch_size


def total_steps(size: int, config: TrainingConfig) -> int:
    steps = steps_per_epoch(size, config) * config.epochs
    return min(steps, config.max_steps or steps)


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to 0; a function of the step alone, so nothing needs restoring."""
    warmup = config.warmup * total
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))


def train(
    engine: Engine, batches: Batches, validation: Validation | None, config: TrainingConfig, folder: Path,
    fingerprint: str, on_step: Callable[[int, str], None], on_epoch: Callable[[list[dict[str, Any]]], None],
) -> None:  # fmt: skip
    """Train to the end from the last published checkpoint, or the start.

    on_step(steps done, note) after every step; on_epoch(entries of all epochs so far) at the start and after every
    epoch; both on every rank.
    """
    per_epoch, total = steps_per_epoch(batches.size, config), total_steps(batches.size, config)
    log = load_checkpoint(engine, folder, fingerprint)
    on_epoch(log)
    for epoch in range(len(log), math.ceil(total / per_epoch)):
        started = time.monotonic()
        order = keyed_generator("order", config.seed, epoch).permutation(batches.size)
        sums = torch.zeros(len(GuidedStep.TERMS) + 1)
        engine.module.train()
        steps = range(epoch * per_epoch, min(total, (epoch + 1) * per_epoch))
        for step in steps:
            chosen = order[(step % per_epoch) * config.batch_size :][: config.batch_size]
            sums += _train_step(engine, batches, chosen, step, learning_rate(step, total, config), config)
            on_step(step + 1, f"epoch {epoch + 1}, loss {sums[0] / (step - steps.start + 1):.3f}")
        average_buffers(engine)
        means = (engine.sum_over_ranks(sums.to(engine.device)) / engine.world_size / len(steps)).tolist()
        entry = {"epoch": epoch + 1, **dict(zip(("loss", *GuidedStep.TERMS), means, strict=True))}
        entry |= _validate(engine, validation)
        log.append({**entry, "seconds": round(time.monotonic() - started, 2)})
        save_checkpoint(engine, folder, log, fingerprint)
        on_epoch(log)


def _train_step(
    engine: Engine, batches: Batches, chosen: np.ndarray, step: int, rate: float, config: TrainingConfig
) -> Tensor:
    """One optimiser step on this rank's share of the global batch; its loss and terms."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    generator = torch.Generator().manual_seed(torch_seed("step", config.seed, step))
    # What the model itself draws (dropout): other numbers on every rank, the same ones after a resume.
    torch.manual_seed(torch_seed("dropout", config.seed, step * 2**16 + engine.rank))
    batch = batches.read(chosen)
    # Drawn for the global batch on every rank: the numbers do not depend on the number of processes.
    x = batch["image"]
    shifts = draw_shifts(len(x), x.shape[2], config.augment, generator)
    x, segments = augment(x, batch["segments"] if config.guided else None, shifts)
    if segments is not None:
        pixels = flagged_pixels(batch["flagged"], segments)
    else:
        pixels = x.new_zeros(len(x), 1, *x.shape[2:], dtype=torch.bool)
    noise = torch.empty_like(x).uniform_(-1, 1, generator=generator)
    weight = config.sensitivity.weight * config.sensitivity.every if step % config.sensitivity.every == 0 else 0.0
    micro = micro_batch_size(config, engine.world_size)
    sums = torch.zeros(len(GuidedStep.TERMS) + 1)
    for part in range(config.accumulation):
        start = (engine.rank * config.accumulation + part) * micro
        own = [each[start : start + micro].to(engine.device) for each in (x, batch["label"], pixels, noise)]
        loss = engine(*own, weight)
        if engine.sum_over_ranks(loss.detach().isfinite().float()) < engine.world_size:  # on every rank alike
            raise InputError(f"the loss is not finite in step {step + 1}; lower learning_rate ({config.learning_rate})")
        engine.backward(loss)
        engine.step()
        sums += torch.cat([loss.detach().reshape(1), engine.module.terms]).cpu() / config.accumulation
    return sums


def _validate(engine: Engine, validation: Validation | None) -> dict[str, float]:
    """Clean and PGD-10 accuracy on at most VALIDATION_IMAGES images, shared among the ranks."""
    if validation is None:
        return {}
    model = engine.module.model.eval()
    images = validation.images
    ids = images.ids[:VALIDATION_IMAGES][engine.rank :: engine.world_size]
    x, y = (
        torch.from_numpy(images.images(ids)).to(engine.device),
        torch.from_numpy(images.labels_of(ids)).to(engine.device),
    )
    with torch.no_grad():
        right = (model(x).argmax(1) == y).sum()
        robust = (model(pgd(model, x, y, validation.eps, 10)).argmax(1) == y).sum()
    counts = torch.stack([right, robust, torch.tensor(len(ids), device=engine.device)]).double()
    right, robust, total = engine.sum_over_ranks(counts).tolist()
    return {"validation_clean": right / total, "validation_robust": robust / total, "validation_eps": validation.eps}
