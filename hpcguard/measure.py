"""A unit of evaluation, in whatever process: attack one batch of test images, or explain a few, and publish that."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.attacks import autoattack
from hpcguard.attacks.autoattack import name_of
from hpcguard.attribution import explain_batch, true_and_runner_up
from hpcguard.cluster.devices import full_float32, pick_device
from hpcguard.cluster.local import Report
from hpcguard.config import Config, EvaluationConfig
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.metrics.attribution import topk_jaccard
from hpcguard.metrics.robustness import Pgd, falls_at, is_right, survives_fgsm, survives_pgd
from hpcguard.models import load_model
from hpcguard.runs import RunFolder, digest_file, digest_json, publish, read_sealed, write_sealed
from hpcguard.store import Outcomes, rows_from, write_outcomes, write_rows


@dataclass(frozen=True)
class Unit:
    """Of an arm: the images of one part, or (None) the explanations."""

    arm: str
    part: int | None


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and everything that its result depends on."""

    arm: str
    weights: Path
    identity: Mapping[str, Any]

    @cached_property
    def of_outcomes(self) -> str:
        """Digest of what the outcomes of attacks depend on."""
        kept = {key: value for key, value in self.identity.items() if key != "attribution"}
        wanted = {key: value for key, value in kept["evaluation"].items() if key != "explained"}
        return digest_json({**kept, "evaluation": wanted})

    @cached_property
    def of_explanations(self) -> str:
        """Digest of what the explanations depend on."""
        kept = {key: value for key, value in self.identity.items() if key != "evaluation"}
        return digest_json({**kept, "explained": self.identity["evaluation"]["explained"]})


def test_images(config: Config) -> ImageSet:
    """The test images to be attacked: all, or evaluation.images of them drawn by data.seed."""
    test = load_images(config.data, "test")
    wanted = config.evaluation.images
    if wanted is None or wanted == len(test):
        return test
    if wanted > len(test):
        raise InputError(f"evaluation.images = {wanted}: the test split has {len(test)}; lower it or write null")
    return test.subset(np.random.default_rng(config.data.seed).choice(test.ids, wanted, replace=False))


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive parts of so many ids, the last one of the rest."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]


@dataclass
class UnitTask:
    """What a worker process does with a unit. Images are read once a process, and a model once while its units last."""

    config: Config
    subjects: Mapping[str, Subject]
    rank: int = 0
    _test: ImageSet | None = field(default=None, init=False)
    _model: tuple[str, torch.device, nn.Module] | None = field(default=None, init=False)

    def __call__(self, unit: Unit, slot: int, report: Report) -> None:
        full_float32()
        self._test = self._test or test_images(self.config)
        subject, folder = self.subjects[unit.arm], RunFolder(self.config.run)
        device, model = self._load(subject, self._test, slot)
        if unit.part is None:
            explain(self.config, folder, subject, model, self._test, device)
        else:
            outcomes = measure_part(self.config.evaluation, subject, model, self._test, unit.part, device, report)
            with publish(folder.part(unit.arm, unit.part)) as temporary:
                write_outcomes(temporary, outcomes)

    def _load(self, subject: Subject, test: ImageSet, slot: int) -> tuple[torch.device, nn.Module]:
        if self._model is None or self._model[0] != subject.arm:
            if digest_file(subject.weights) != subject.identity["weights_sha256"]:
                raise InputError(f"{subject.weights}: changed while it was to be measured; run the same command again")
            device = pick_device(self.config.device, slot + self.rank * self.config.evaluation.workers)
            model = load_model(self.config.model, len(test.classes), test.shape[0], subject.weights, device)
            # Attacks ask for the gradient of images alone; FAB would have torch compute that of the weights as well.
            self._model = (subject.arm, device, model.requires_grad_(False))
        return self._model[1:]


def measure_part(
    config: EvaluationConfig, subject: Subject, model: nn.Module, test: ImageSet, part: int, device: torch.device,
    report: Report,
) -> Outcomes:  # fmt: skip
    """All attacks on one part of the test images. A model whose answers are not one logit a class is an InputError."""
    start = part * config.batch_size
    ids = test.ids[start : start + config.batch_size]
    labels = test.labels_of(ids)
    x, y = torch.from_numpy(test.images(ids)).to(device), torch.from_numpy(labels).to(device)
    on_curve = min(max(0, config.curve_images - start), len(ids)) if config.curve else 0
    right, seconds = attack(config, model, x, y, ids, lambda: report(0))
    falls = np.full(len(ids), np.nan)
    if on_curve:
        since = time.monotonic()
        known = torch.from_numpy(right[pgd_names(config)[-1]][:on_curve]).to(device)
        clean = torch.from_numpy(right["clean"][:on_curve]).to(device)
        survivors = partial(_survives_all_pgd, config, model, x[:on_curve], y[:on_curve], ids[:on_curve])
        falls[:on_curve] = falls_at(survivors, clean, config.curve, config.eps, known)
        seconds["curve"] = time.monotonic() - since
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    return Outcomes(ids, labels, right, falls, subject.of_outcomes, rounded, [machine(device)])


def attack(
    config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, np.ndarray], dict[str, float]]:  # fmt: skip
    """Which images [B, C, H, W] stay right under each attack, from the weakest to the strongest, and its seconds.

    FGSM, PGD and AutoAttack each start from what is right unattacked; PGD's losses from what the one before left.
    """
    outcomes: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    def measured(name: str, run: Callable[[], Tensor]) -> Tensor:
        since = time.monotonic()
        right = run()
        outcomes[name] = right.cpu().numpy()
        seconds[name] = time.monotonic() - since
        between()
        return right

    size = config.batch_size
    clean = measured("clean", lambda: is_right(model, x, y, size))
    measured("fgsm", lambda: survives_fgsm(model, x, y, clean, config.eps, size, config.norm))
    left = clean
    for name, how in zip(pgd_names(config), _pgds(config), strict=True):
        run = partial(survives_pgd, model, x, y, ids, left, config.eps, how, size)
        left = measured(name, run)
    if config.autoattack != "none":
        measured(autoattack_name(config), lambda: survives_autoattack(config, model, x, y, clean))
    return outcomes, seconds


def pgd_names(config: EvaluationConfig) -> list[str]:
    """pgd-20x5, pgd-20x5-margin."""
    name = f"pgd-{config.pgd_steps}" + (f"x{config.pgd_restarts}" if config.pgd_restarts > 1 else "")
    return [name if loss == "cross-entropy" else f"{name}-{loss}" for loss in config.pgd_losses]


def autoattack_name(config: EvaluationConfig) -> str:
    return "autoattack" if config.autoattack == "standard" else f"autoattack-{name_of(config.autoattack)}"


def _pgds(config: EvaluationConfig) -> list[Pgd]:
    return [
        Pgd(config.pgd_steps, config.pgd_restarts, loss, config.norm, config.seed) for loss in config.pgd_losses
    ]  # fmt: skip


def _survives_all_pgd(
    config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, ids: np.ndarray, right: Tensor, radius: float
) -> Tensor:
    for how in _pgds(config):
        right = survives_pgd(model, x, y, ids, right, radius, how, config.batch_size)
    return right


def survives_autoattack(config: EvaluationConfig, model: nn.Module, x: Tensor, y: Tensor, right: Tensor) -> Tensor:
    """Which of the images that are still `right` stay right, bool [B]; only those are attacked."""
    left = right.nonzero()[:, 0]
    outcome = torch.zeros_like(right)
    if len(left):
        outcome[left] = autoattack(
            model, x[left], y[left], config.eps, config.autoattack, config.seed, config.batch_size, config.norm
        )
    return outcome


def machine(device: torch.device) -> dict[str, Any]:
    """What outcomes were computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def explain(
    config: Config, folder: RunFolder, subject: Subject, model: nn.Module, test: ImageSet, device: torch.device
) -> None:
    """Explain the first test images, the same for every arm; explained.json has the mean top-5 Jaccard of two seeds."""
    since = time.monotonic()
    ids = test.ids[: config.evaluation.explained]
    pixels = torch.from_numpy(test.images(ids)).to(device)
    labels = torch.from_numpy(test.labels_of(ids)).to(device)
    with torch.inference_mode():
        targets = true_and_runner_up(model(pixels), labels).cpu().numpy()
    run = partial(explain_batch, lambda batch: model(batch).softmax(1), pixels, ids, targets=targets)
    first = run(config.attribution)
    other_seed = config.attribution.model_copy(update={"seed": config.attribution.seed + 1})
    second = run(other_seed, segments=first.segments)
    identity = {"attribution": config.attribution.identity()}
    with publish(folder.explanations(subject.arm)) as temporary:
        write_rows(temporary, rows_from(first, test.labels_of(ids)), digest_json(identity), identity=identity)
    pairs = zip(first.coefficients[:, 0], second.coefficients[:, 0], strict=True)
    write_sealed(folder.explained(subject.arm), {
        "identity": subject.of_explanations,
        "jaccard5": float(np.mean([topk_jaccard(one, other) for one, other in pairs])),
        "sha256": digest_file(folder.explanations(subject.arm)),
        "seconds": round(time.monotonic() - since, 3),
    })  # fmt: skip


def read_explained(folder: RunFolder, subject: Subject) -> dict[str, Any] | None:
    """What explain wrote, if it is of this subject and the explanations are there as it left them."""
    path = folder.explained(subject.arm)
    if not path.is_file() or not folder.explanations(subject.arm).is_file():
        return None
    try:
        found = read_sealed(path, "", identity=str, jaccard5=float, sha256=str, seconds=float)
    except InputError:
        return None  # it is made again
    fits = (found["identity"], found["sha256"]) == (
        subject.of_explanations, digest_file(folder.explanations(subject.arm))
    )  # fmt: skip
    return found if fits else None
