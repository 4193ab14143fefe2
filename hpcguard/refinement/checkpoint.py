"""Checkpoints of an arm in training: a folder each, written aside and published by rename, the last few and the best.

Order, augmentation, attack noise and dropout are functions of (seed, epoch, step), so a state is weights, buffers,
momentum and the average, all plain tensors, and how far the training is. It does not depend on the number of processes.
Nothing is unpickled: tensors lie in a .safetensors file, whose digest lies in a sealed manifest.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hpcguard.errors import InputError
from hpcguard.refinement.engine import Engine, from_first_rank
from hpcguard.runs import digest_file, publish, read_sealed, to_disk, write_sealed

STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass
class Progress:
    """How far a training is: optimiser steps, entries of the epochs done, and of the epoch begun the sums that its
    entry will be made of and the seconds spent."""

    step: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoints:
    """Where an arm's checkpoints lie, how many are kept, and what they must have been made with."""

    folder: Path
    fingerprint: str
    keep: int = 2
    accumulation: int = 1

    def path(self, step: int) -> Path:
        return self.folder / f"state-{step:08d}"

    def newest_first(self) -> list[Path]:
        found = self.folder.glob("state-*")
        return sorted((path for path in found if re.fullmatch(r"state-\d{8}", path.name)), reverse=True)


def save_checkpoint(engine: Engine, average: nn.Module | None, place: Checkpoints, progress: Progress) -> None:
    """Publish the state, then drop the older ones but the last `keep` and that of the best epoch. All ranks call it."""
    state = engine.state()
    if engine.rank == 0:
        if average is not None:
            state |= {f"average.{name}": values.cpu().contiguous() for name, values in average.state_dict().items()}
        final = place.path(progress.step)
        temporary = final.with_name(f".{final.name}.tmp")
        _remove(temporary)
        with publish(temporary / STATE) as file:
            save_file(state, file)
            digest = digest_file(file)
        manifest = {
            "fingerprint": place.fingerprint, "step": progress.step, "log": progress.log, "sums": progress.sums,
            "seconds": progress.seconds, "world_size": engine.world_size, "accumulation": place.accumulation,
            "files": {STATE: digest},
        }  # fmt: skip
        write_sealed(temporary / MANIFEST, manifest)
        _remove(final)  # a damaged one that was passed over
        temporary.rename(final)
        to_disk(place.folder)
        kept = {final, *place.newest_first()[: place.keep]}
        if best := best_epoch(progress.log):
            kept.add(place.path(best["step"]))
        for old in set(place.newest_first()) - kept:
            _remove(old)
    engine.barrier()


def load_checkpoint(engine: Engine, average: nn.Module | None, place: Checkpoints) -> Progress:
    """Load the newest undamaged state into engine and average, and say what is passed over; a fresh Progress where
    there is no state. Raises InputError if all are damaged, or the state belongs to another training."""
    manifest = from_first_rank(lambda: _newest(place))
    if manifest is None:
        return Progress()
    if engine.rank == 0:
        _tell_differences(manifest, engine.world_size, place)
    state = load_file(place.path(manifest["step"]) / STATE)
    engine.load_state(state)
    if average is not None:
        average.load_state_dict(_averaged(state))
    return Progress(**{name: manifest[name] for name in ("step", "log", "sums", "seconds")})


def best_epoch(log: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The entry of highest robust, then clean accuracy on the validation split, the earliest of equals."""
    measured = [entry for entry in log if "validation_robust" in entry]
    return max(measured, key=lambda entry: (entry["validation_robust"], entry["validation_clean"]), default=None)


def load_best(model: nn.Module, place: Checkpoints, log: list[dict[str, Any]]) -> dict[str, Any]:
    """Load the weights to be judged of the best epoch whose state is undamaged into `model`; returns its entry."""
    entries = sorted((e for e in log if "validation_robust" in e), key=lambda e: e["epoch"])
    while best := best_epoch(entries):
        try:
            manifest = _verified(place.path(best["step"]))
        except InputError as error:
            _say(f"{error}; taking the next best epoch")
            entries.remove(best)
            continue
        state = load_file(place.path(manifest["step"]) / STATE)
        model.load_state_dict(_averaged(state) or _model(state))
        return best
    raise InputError(f"{place.folder}: no undamaged checkpoint of a validated epoch is left; delete it to train again")


def remove_checkpoints(folder: Path) -> None:
    """Drop what only resuming needs, once the final weights are published."""
    for state in [*folder.glob("state-*"), *folder.glob(".state-*")]:
        _remove(state)


def _newest(place: Checkpoints) -> dict[str, Any] | None:
    """The manifest of the newest state whose every byte is as it was written."""
    remedy = f"delete {place.folder} to train this arm from its start"
    faults = []
    for state in place.newest_first():
        try:
            manifest = _verified(state)
        except InputError as error:
            faults.append(str(error))
            continue
        if manifest["fingerprint"] != place.fingerprint:
            raise InputError(f"{state}: belongs to a training with other settings; {remedy}")
        for fault in faults:
            _say(f"{fault}; going on from {state.name} before it")
        return manifest
    if faults:
        raise InputError(f"{len(faults)} checkpoint(s) and all damaged, first {faults[0]}; {remedy}")
    return None


def _verified(state: Path) -> dict[str, Any]:
    """A state's manifest. Raises InputError if anything of it is missing or damaged."""
    manifest = read_sealed(state / MANIFEST, "delete it", fingerprint=str, step=int, log=list, files=dict)
    if state.name != f"state-{manifest['step']:08d}":
        raise InputError(f"{state}: holds step {manifest['step']}")
    for name, digest in manifest["files"].items():
        if not (state / name).is_file() or digest_file(state / name) != digest:
            raise InputError(f"{state / name}: missing or damaged")
    return manifest


def _tell_differences(manifest: dict[str, Any], world_size: int, place: Checkpoints) -> None:
    before, now = (manifest["world_size"], manifest["accumulation"]), (world_size, place.accumulation)
    if before != now:
        _say(
            f"saved by {before[0]} process(es) x accumulation {before[1]}, going on with {now[0]} x {now[1]}: weights, "
            "momentum, average, order and noise are the same and so is the global batch, but not the order of float "
            "sums, dropout's draws, and batch normalisation's statistics, which are those of a micro-batch"
        )


def _averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(_under(state, "average."))


def _model(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(_under(state, "module.model."))


def _under(state: dict[str, torch.Tensor], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name.removeprefix(prefix), values) for name, values in state.items() if name.startswith(prefix))


def _remove(folder: Path) -> None:
    """Out of sight first: a kill in the middle must not leave half a state under its name."""
    if not folder.name.startswith("."):
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        if not folder.exists():
            return
        folder = folder.rename(hidden)
    shutil.rmtree(folder, ignore_errors=True)


def _say(text: str) -> None:
    print(f"hpcguard refine: {text}", file=sys.stderr, flush=True)
