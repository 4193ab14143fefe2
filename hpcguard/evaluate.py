"""Measure every trained arm on test images: clean, FGSM, PGD, AutoAttack; and explain a few images with each.

Attacks run in [0, 1] pixel space on the unmodified test images, on those images only that are still right. Writes
RUN/results/ARM.json, one a model, and the explanations that the report draws. A model whose weights and settings
have not changed is not measured again.
"""

import argparse
import os
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcguard.attacks import autoattack
from hpcguard.attacks.autoattack import check_classes
from hpcguard.attribution import explain_batch, true_and_runner_up
from hpcguard.cluster.devices import full_float32, pick_device
from hpcguard.cluster.failures import Problem
from hpcguard.cluster.local import Events, Report, run_local
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.metrics.accuracy import wilson_interval
from hpcguard.metrics.attribution import topk_jaccard
from hpcguard.metrics.robustness import is_right, survives_fgsm, survives_pgd
from hpcguard.models import load_model
from hpcguard.progress import progress, say
from hpcguard.runs import RunFolder, code_revision, digest_file, digest_json, publish, read_json, write_json
from hpcguard.store import rows_from, write_rows

EXAMPLE = (
    "python -m hpcguard.evaluate configs/quickstart.yaml",
    "python -m hpcguard.evaluate runs/quickstart --arm guided evaluation.images=100 evaluation.eps=4/255",
)
SECTIONS = ("data", "model", "attribution", "controls", "evaluation")
ATTACKS = 4  # clean, FGSM, PGD, AutoAttack: what progress counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arm", action="append", metavar="ARM", help="measure only this arm (repeatable)")


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    test = test_images(config)
    check_classes(config.evaluation.autoattack, len(test.classes))
    arms = _arms(config, folder, arguments.arm)
    identities = {arm: _identity(config, folder, arm, test) for arm in arms}
    todo = [arm for arm in arms if not _is_done(folder, arm, identities[arm])]
    for arm in sorted(set(arms) - set(todo), key=arms.index):
        say(f"evaluate: {arm} is measured already: {folder.result(arm)}")
    failed: dict[str, Problem] = {}
    if todo:
        folder.create()
        folder.record_config(config, ("evaluation",))
        with progress("evaluate", ATTACKS * len(todo), "attacks", even=False) as meter:
            task = partial(evaluate_arm, config, {arm: identities[arm] for arm in todo})
            outcome = run_local(
                task, todo, config.evaluation.workers, config.evaluation.threads, config.cluster.attempts,
                Events(
                    progress=lambda arm, amount: meter.advance(amount),
                    end=lambda arm, problem: meter.note(f"{arm} {'FAILED' if problem else 'done'}"),
                    restart=lambda arm, problem: say(f"evaluate: {arm}: {problem.message}; beginning it again"),
                ),
            )  # fmt: skip
        failed = outcome.failed
    for arm, problem in failed.items():
        (folder.logs / f"evaluate_{arm}.log").write_text(f"{problem.tail}\n{problem.message}\n")
        say(f"evaluate: {arm} FAILED: {problem.message} (log: {folder.logs}/evaluate_{arm}.log)")
    return 1 if failed else 0


def test_images(config: Config) -> ImageSet:
    """The test images to be attacked: all, or evaluation.images of them drawn by data.seed."""
    test = load_images(config.data, "test")
    wanted = config.evaluation.images
    if wanted is None or wanted == len(test):
        return test
    if wanted > len(test):
        raise InputError(f"evaluation.images = {wanted}: the test split has {len(test)}; lower it or write null")
    return test.subset(np.random.default_rng(config.data.seed).choice(test.ids, wanted, replace=False))


def _arms(config: Config, folder: RunFolder, asked: list[str] | None) -> list[str]:
    trained = [arm for arm in config.arms() if folder.weights(arm).exists()]
    for arm in asked or []:
        if arm != "baseline":
            config.arm(arm)
            if arm not in trained:
                raise InputError(
                    f"arm {arm}: {folder.weights(arm)} is not there; run `python -m hpcguard.refine` for it"
                )
    folder.explained_weights(config)
    return list(dict.fromkeys(asked or ["baseline", *trained]))


def _weights(config: Config, folder: RunFolder, arm: str) -> Path:
    return folder.explained_weights(config) if arm == "baseline" else folder.weights(arm)


def _identity(config: Config, folder: RunFolder, arm: str, test: ImageSet) -> dict[str, Any]:
    """Everything that a result depends on."""
    return {
        "weights_sha256": digest_file(_weights(config, folder, arm)),
        "model": config.model.identity(),
        "evaluation": config.evaluation.identity(),
        "attribution": config.attribution.identity(),
        "test_sha256": test.digest(),
    }


def _is_done(folder: RunFolder, arm: str, identity: dict[str, Any]) -> bool:
    if not folder.result(arm).exists():
        return False
    recorded = read_json(folder.result(arm), f"delete {folder.result(arm)} to measure it again")
    explained = folder.explanations(arm).exists() or not identity["evaluation"]["explained"]
    return recorded.get("identity") == identity and explained


def evaluate_arm(config: Config, identities: dict[str, dict[str, Any]], arm: str, slot: int, report: Report) -> None:
    """Measure one arm of a run and publish its result."""
    started = time.monotonic()
    folder = RunFolder(config.run)
    full_float32()
    device = pick_device(config.device, slot)
    test = test_images(config)
    weights = _weights(config, folder, arm)
    if digest_file(weights) != identities[arm]["weights_sha256"]:
        raise InputError(f"{weights}: changed while it was to be measured; run the same command again")
    model = load_model(config.model, len(test.classes), test.shape[0], weights, device)
    x, y = torch.from_numpy(test.images(test.ids)).to(device), torch.from_numpy(test.labels).to(device)
    attacks = _attack(config, model, x, y, report)
    stability = _explain(config, folder, arm, model, test, device)
    result = {
        "arm": arm,
        "weights": os.path.relpath(_weights(config, folder, arm), folder.path),
        "identity": identities[arm],
        "images": len(test),
        "split": test.split,
        "attacks": attacks,
        "explanation_jaccard5": stability,
        "seconds": round(time.monotonic() - started, 1),
        "hardware": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        },
        "revision": code_revision(),
    }
    write_json(folder.result(arm), result)


def _attack(config: Config, model: torch.nn.Module, x: Tensor, y: Tensor, report: Report) -> dict[str, Any]:
    """Accuracy by attack, from the weakest to the strongest; every attack starts from what is right when clean."""
    wanted = config.evaluation
    right = is_right(model, x, y, wanted.batch_size)
    rows: dict[str, Any] = {}

    def add(name: str, outcome: Tensor, since: float) -> None:
        low, high = wilson_interval(int(outcome.sum()), len(outcome))
        rows[name] = {
            "right": int(outcome.sum()), "of": len(outcome), "accuracy": float(outcome.double().mean()),
            "low": low, "high": high, "seconds": round(time.monotonic() - since, 2),
        }  # fmt: skip
        report(1)

    since = time.monotonic()
    add("clean", right, since)
    since = time.monotonic()
    add("fgsm", survives_fgsm(model, x, y, right, wanted.eps, wanted.batch_size), since)
    since = time.monotonic()
    steps, restarts = wanted.pgd_steps, wanted.pgd_restarts
    outcome = survives_pgd(model, x, y, right, wanted.eps, steps, restarts, wanted.batch_size, wanted.seed)
    add(f"pgd-{steps}" + (f"x{restarts}" if restarts > 1 else ""), outcome, since)
    since = time.monotonic()
    if wanted.autoattack == "none":
        report(1)
    else:
        outcome = autoattack(model, x, y, wanted.eps, wanted.autoattack, wanted.seed, wanted.batch_size)
        add(
            "autoattack" if wanted.autoattack == "standard" else f"autoattack-{wanted.autoattack}",
            outcome & right,
            since,
        )
    return rows


def _explain(
    config: Config, folder: RunFolder, arm: str, model: torch.nn.Module, test: ImageSet, device: torch.device
) -> float | None:
    """Explain the first test images, the same for every arm; returns the mean top-5 Jaccard of two sampling seeds."""
    ids = test.ids[: config.evaluation.explained]
    if not len(ids):
        return None
    pixels = torch.from_numpy(test.images(ids)).to(device)
    labels = torch.from_numpy(test.labels_of(ids)).to(device)
    with torch.inference_mode():
        targets = true_and_runner_up(model(pixels), labels).cpu().numpy()
    explain = partial(explain_batch, lambda batch: model(batch).softmax(1), pixels, ids, targets=targets)
    first = explain(config.attribution)
    other_seed = config.attribution.model_copy(update={"seed": config.attribution.seed + 1})
    second = explain(other_seed, segments=first.segments)
    identity = {"attribution": config.attribution.identity()}
    with publish(folder.explanations(arm)) as temporary:
        write_rows(temporary, rows_from(first, test.labels_of(ids)), digest_json(identity), identity=identity)
    pairs = zip(first.coefficients[:, 0], second.coefficients[:, 0], strict=True)
    return float(np.mean([topk_jaccard(one, other) for one, other in pairs]))


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("evaluate"))
