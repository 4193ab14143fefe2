"""Checkpoints of an arm in training: written aside, published by rename, named last by a pointer.

Order, augmentation and attack noise are functions of (seed, epoch, step), so weights, optimizer state and the number
of epochs done are all there is to keep.
"""

import shutil
from pathlib import Path
from typing import Any

from hpcguard.errors import InputError
from hpcguard.refinement.engine import Engine
from hpcguard.runs import digest_file, read_json, write_json

POINTER = "resume.json"


def save_checkpoint(engine: Engine, folder: Path, log: list[dict[str, Any]], fingerprint: str) -> None:
    """Publish the state after len(log) epochs, with their entries, and drop the one before it."""
    epochs_done = len(log)
    temporary, final = folder / f".state-{epochs_done:04d}.tmp", folder / f"state-{epochs_done:04d}"
    if engine.rank == 0:
        for leftover in (temporary, final):
            shutil.rmtree(leftover, ignore_errors=True)
    engine.barrier()
    engine.save_state(temporary)
    engine.barrier()
    if engine.rank == 0:
        temporary.rename(final)
        files = {str(path.relative_to(final)): digest_file(path) for path in sorted(final.rglob("*")) if path.is_file()}
        pointer = {
            "log": log, "state": final.name, "world_size": engine.world_size,
            "fingerprint": fingerprint, "files": files,
        }  # fmt: skip
        write_json(folder / POINTER, pointer)
        for old in folder.glob("state-*"):
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
    engine.barrier()


def load_checkpoint(engine: Engine, folder: Path, fingerprint: str) -> list[dict[str, Any]]:
    """Load the published state into the engine; returns the entries of the epochs done, none where there is no state.

    Raises InputError if it is damaged, of another training, or of another number of processes.
    """
    pointer = folder / POINTER
    if not pointer.exists():
        return []
    remedy = f"delete {folder} to train this arm from its start"
    recorded = read_json(pointer, remedy, fingerprint=str, world_size=int, state=str, files=dict, log=list)
    _check(recorded, pointer, engine.world_size, fingerprint, remedy)
    state = folder / recorded["state"]
    for name, digest in recorded["files"].items():
        if not (state / name).is_file() or digest_file(state / name) != digest:
            raise InputError(f"{state / name}: missing or damaged; {remedy}")
    engine.load_state(state)
    return list(recorded["log"])


def _check(recorded: dict[str, Any], pointer: Path, world_size: int, fingerprint: str, remedy: str) -> None:
    if recorded["fingerprint"] != fingerprint:
        raise InputError(f"{pointer}: belongs to a training with other settings; {remedy}")
    if recorded["world_size"] != world_size:
        processes = recorded["world_size"]
        raise InputError(f"{pointer}: saved by {processes} process(es), now {world_size}; use {processes}, or {remedy}")


def remove_checkpoints(folder: Path) -> None:
    """Drop what only resuming needs, once the final weights are published."""
    (folder / POINTER).unlink(missing_ok=True)
    for state in folder.glob("state-*"):
        shutil.rmtree(state, ignore_errors=True)
