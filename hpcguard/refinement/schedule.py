"""Steps of a training and their learning rates: functions of the step alone, so a resume has nothing to restore."""

import math

from hpcguard.config import TrainingConfig
from hpcguard.errors import InputError

ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1 / 25e4  # of the peak, as in fastai and torch's OneCycleLR


def steps_per_epoch(size: int, config: TrainingConfig) -> int:
    """Whole batches only: every rank must have an equal share in every step."""
    if size < config.batch_size:
        raise InputError(f"batch_size = {config.batch_size}: more than the {size} training images; lower it")
    return size // config.batch_size


def total_steps(size: int, config: TrainingConfig) -> int:
    steps = steps_per_epoch(size, config) * config.epochs
    return min(steps, config.max_steps or steps)


def learning_rate(step: int, total: int, config: TrainingConfig) -> float:
    """Learning rate of a step, counted from 0, of `total`."""
    if config.schedule == "one-cycle":
        return config.learning_rate * _one_cycle(step, total, config.warmup)
    warmup = config.warmup * total
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.schedule == "piecewise":
        return config.learning_rate * config.factor ** sum(step >= share * total for share in config.milestones)
    return config.learning_rate * _cosine(1.0, 0.0, (step - warmup) / max(1.0, total - warmup))


def _one_cycle(step: int, total: int, rising: float) -> float:
    """Smith's one cycle with cosine flanks (arXiv 1708.07120), the numbers of torch's OneCycleLR."""
    peak, last = rising * total - 1, total - 1
    if step <= peak:
        return _cosine(ONE_CYCLE_START, 1.0, step / peak if peak > 0 else 1.0)
    return _cosine(1.0, ONE_CYCLE_END, (step - peak) / (last - peak))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
