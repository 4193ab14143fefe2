"""The training loop of one arm.

What happens in a step is a function of (configuration, seed, step), so a resumed training and an undisturbed one do the
same. One small all-reduce a step carries every rank's figures: so all ranks know the same losses, and stop together.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks import pgd
from hpcguard.config import TrainingConfig
from hpcguard.data import ImageSet
from hpcguard.errors import InputError
from hpcguard.randomness import torch_seed
from hpcguard.refinement.averaging import move_average
from hpcguard.refinement.batches import Batches, Share, shares
from hpcguard.refinement.checkpoint import Checkpoints, Progress, save_checkpoint
from hpcguard.refinement.engine import Engine, average_buffers, micro_batch_size
from hpcguard.refinement.schedule import learning_rate, steps_per_epoch, total_steps
from hpcguard.refinement.step import GuidedStep
from hpcguard.runs import write_json

SAVE, STOP, REQUEUE = 1, 2, 3  # what a training may be asked for between steps, the stronger is the larger
TERMS = ("loss", *GuidedStep.TERMS, "mask_share")  # what a step is described by, in the order of its figures


@dataclass(frozen=True)
class Validation:
    """Images that are measured, and attacked with radius eps, after every epoch."""

    images: ImageSet
    eps: float
    norm: Literal["linf", "l2"] = "linf"


@dataclass
class Watch:
    """What the loop tells and asks: on_step(entry) and on_epoch(log) after each on every rank, asked() for SAVE, STOP,
    REQUEUE or 0, and where to write down a batch whose loss is not finite."""

    on_step: Callable[[dict[str, Any]], None] = lambda entry: None
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda log: None
    asked: Callable[[], int] = lambda: 0
    not_finite: Path | None = None
    stopped: int = field(default=0, init=False)  # STOP or REQUEUE: all ranks have stopped before the end


def train(
    engine: Engine, average: nn.Module | None, batches: Batches, validation: Validation | None, config: TrainingConfig,
    place: Checkpoints, done: Progress, watch: Watch,
) -> None:  # fmt: skip
    """Train from `done`, which moves with it, to the end or until asked to stop, with checkpoints on the way."""
    per_epoch, total = steps_per_epoch(len(batches), config), total_steps(len(batches), config)
    last_save, started = time.monotonic(), time.monotonic() - done.seconds
    for step, chosen, share in shares(engine, batches, done.step, config):
        epoch = step // per_epoch
        engine.module.train()
        due = config.checkpoint_minutes is not None and time.monotonic() - last_save > 60 * config.checkpoint_minutes
        rate = learning_rate(step, total, config)
        own = _train_step(engine, share, step, rate, config)
        average_buffers(engine)
        if average is not None:
            move_average(average, engine.module.model, step, config.averaging)
        figures, healthy, due, asked = _exchange(engine, own, due, watch.asked())
        if not (healthy and np.isfinite(figures).all()):
            if engine.rank:
                raise SystemExit(2)  # the first rank speaks for all
            _stop_at(step, epoch, batches.ids[chosen], figures, rate, watch.not_finite)
        means = figures.mean(0)
        done.step = step + 1
        done.sums = (means + done.sums if done.sums else means).tolist()
        watch.on_step({"step": step + 1, "epoch": epoch + 1, **_named(means), "learning_rate": rate})
        ended = done.step % per_epoch == 0 or done.step == total
        if ended:
            entry = {"epoch": epoch + 1, "step": done.step, **_named(np.array(done.sums) / (step % per_epoch + 1))}
            entry |= _validate(average or engine.module.model, engine, validation, config)
            entry |= {"learning_rate": rate, "seconds": round(time.monotonic() - started, 2), "time": time.time()}
            done.log, done.sums, started = [*done.log, entry], [], time.monotonic()
            watch.on_epoch(done.log)
        if ended or due or asked:
            done.seconds = 0.0 if ended else time.monotonic() - started
            save_checkpoint(engine, average, place, done)
            last_save = time.monotonic()
        if asked >= STOP and done.step < total:
            watch.stopped = asked
            return


def _train_step(engine: Engine, share: Share, step: int, rate: float, config: TrainingConfig) -> Tensor:
    """One optimiser step on this rank's share of the global batch; its figures, in the order of TERMS."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    # What the model itself draws (dropout): other numbers on every rank, the same ones after a resume.
    torch.manual_seed(torch_seed("dropout", config.seed, step * 2**16 + engine.rank))
    x, y, pixels, noise, fill = share
    weight = config.sensitivity.weight * config.sensitivity.every if step % config.sensitivity.every == 0 else 0.0
    micro = micro_batch_size(config, engine.world_size)
    sums = torch.zeros(len(TERMS) - 1, dtype=torch.float64, device=engine.device)
    for start in range(0, len(x), micro):
        part = slice(start, start + micro)
        loss = engine(x[part], y[part], pixels[part], noise[part], weight, None if fill is None else fill[part])
        engine.backward(loss)
        engine.step()
        sums += torch.cat([loss.detach().reshape(1), engine.module.terms.to(engine.device)]).double()
    return torch.cat([sums / config.accumulation, pixels.double().mean().reshape(1)])


def _exchange(engine: Engine, own: Tensor, due: bool, asked: int) -> tuple[np.ndarray, bool, bool, int]:
    """All ranks' figures [R, len(TERMS)], whether all weights are finite, which a finite loss does not say, whether
    rank 0's clock says that a checkpoint is due, and the strongest of what any rank was asked for."""
    table = torch.zeros(engine.world_size, len(TERMS) + 3, dtype=torch.float64, device=engine.device)
    squares = torch.stack([each.detach().float().square().sum() for each in engine.module.parameters()]).sum()
    table[engine.rank] = torch.cat([own, squares.double().reshape(1), own.new_tensor([due, asked])])
    rows = engine.sum_over_ranks(table).cpu().numpy()
    healthy = bool(np.isfinite(rows[:, len(TERMS)]).all())
    return rows[:, : len(TERMS)], healthy, bool(rows[0, -2]), int(rows[:, -1].max())


def _stop_at(step: int, epoch: int, ids: np.ndarray, figures: np.ndarray, rate: float, path: Path | None) -> None:
    """End the training because of a loss that is not finite, and write down whose."""
    shares = [
        {"rank": rank, "ids": own.tolist(), **{name: value if math.isfinite(value) else str(value)
         for name, value in _named(row).items()}}
        for rank, (own, row) in enumerate(zip(np.split(ids, len(figures)), figures, strict=True))
    ]  # fmt: skip
    if path is not None:
        write_json(path, {"step": step + 1, "epoch": epoch + 1, "learning_rate": rate, "shares": shares})
    bad = ", ".join(name for name, column in zip(TERMS, figures.T, strict=True) if not np.isfinite(column).all())
    bad = bad or "its gradient"
    raise InputError(
        f"the loss is not finite in step {step + 1} ({bad}); its images are in {path}; "
        f"lower learning_rate or set clip, and delete {path and path.parent}, for with other settings it begins again"
    )


def _named(figures: np.ndarray) -> dict[str, float]:
    return dict(zip(TERMS, figures.tolist(), strict=True))


def _validate(
    model: nn.Module, engine: Engine, validation: Validation | None, config: TrainingConfig
) -> dict[str, float]:
    """Clean and PGD-10 accuracy in float32 on at most config.validation_images images, shared among the ranks."""
    if validation is None:
        return {}
    model.eval()
    images = validation.images
    own = images.ids[: config.validation_images][engine.rank :: engine.world_size]
    counts = torch.zeros(3, dtype=torch.float64, device=engine.device)
    micro = micro_batch_size(config, engine.world_size)
    for start in range(0, len(own), micro):
        ids = own[start : start + micro]
        x = torch.from_numpy(images.images(ids)).to(engine.device)
        y = torch.from_numpy(images.labels_of(ids)).to(engine.device)
        with torch.no_grad():
            right = (model(x).argmax(1) == y).sum()
            robust = (model(pgd(model, x, y, validation.eps, 10, norm=validation.norm)).argmax(1) == y).sum()
        counts += torch.stack([right, robust, torch.tensor(len(ids), device=engine.device)])
    right, robust, total = engine.sum_over_ranks(counts).tolist()
    return {"validation_clean": right / total, "validation_robust": robust / total, "validation_eps": validation.eps}
