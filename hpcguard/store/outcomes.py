"""Outcomes: image by image, what a model got right under every attack; of a part of the images, or of all of them."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError

VERSION = 1
VERSION_KEY = "outcomes"  # not "schema": that would make it a store
AGAIN = "delete it and run `python -m hpcguard.evaluate` again"


@dataclass(frozen=True)
class Outcomes:
    """One row an image. Raises ValueError for columns that do not fit each other."""

    image_id: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    right: Mapping[str, np.ndarray]  # by attack, from the weakest to the strongest: bool [N]
    falls_at: np.ndarray  # float64 [N]: smallest radius of the curve; infinite: none of them; NaN: not on the curve
    identity: str = ""  # digest of all that the outcomes depend on
    seconds: Mapping[str, float] = field(default_factory=dict)  # that each attack took, the curve's as "curve"
    machines: Sequence[Mapping[str, Any]] = ()  # that they were computed on, each once

    def __post_init__(self) -> None:
        columns = [("image_id", self.image_id, "int64"), ("label", self.label, "int64")]
        columns += [("falls_at", self.falls_at, "float64")]
        columns += [(f"right/{name}", each, "bool") for name, each in self.right.items()]
        for name, column, dtype in columns:
            if column.shape != self.image_id.shape or column.ndim != 1 or column.dtype != dtype:
                raise ValueError(f"{name} is {column.dtype} {list(column.shape)}, expected {dtype} [N]")
        if len(np.unique(self.image_id)) < len(self.image_id):
            raise ValueError("an image has several rows")

    def __len__(self) -> int:
        return len(self.image_id)


def write_outcomes(path: Path, outcomes: Outcomes) -> None:
    """One HDF5 file of image_id, label, falls_at and right/ATTACK, each with checksums. The caller publishes it."""
    buffer = io.BytesIO()  # HDF5 is not at its best where a disk is full
    with h5py.File(buffer, "w", libver="v110") as file:
        file.attrs[VERSION_KEY] = VERSION
        file.attrs["identity"] = outcomes.identity
        for name, value in (("attacks", list(outcomes.right)), ("seconds", dict(outcomes.seconds)),
                            ("machines", list(outcomes.machines))):  # fmt: skip
            file.attrs[name] = json.dumps(value)
        columns = {name: getattr(outcomes, name) for name in ("image_id", "label", "falls_at")}
        columns |= {f"right/{name}": right for name, right in outcomes.right.items()}
        for name, column in columns.items():
            file.create_dataset(name, data=column, chunks=(max(1, len(column)),), fletcher32=True)
    path.write_bytes(buffer.getbuffer())


def read_outcomes(path: Path) -> Outcomes:
    """Raises InputError if the file is not there, damaged, or not of this version."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if file.attrs.get(VERSION_KEY) != VERSION:
                found = file.attrs.get(VERSION_KEY)
                raise InputError(f"{path}: outcomes of version {found}, this hpcguard reads {VERSION}; {AGAIN}")
            notes = {name: json.loads(file.attrs[name]) for name in ("attacks", "seconds", "machines")}
            if set(notes["attacks"]) != set(file["right"]):
                raise ValueError("right holds other attacks than it says")
            return Outcomes(
                file["image_id"][:], file["label"][:], {name: file["right"][name][:] for name in notes["attacks"]},
                file["falls_at"][:], str(file.attrs["identity"]), notes["seconds"], notes["machines"],
            )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; run `python -m hpcguard.evaluate` again") from error
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as outcomes ({' '.join(str(error).split())}); {AGAIN}") from error


def outcomes_problem(path: Path, ids: np.ndarray, identity: str) -> str | None:
    """Why a file cannot be used as the outcomes of these images under this identity, or None."""
    if not path.is_file():
        return "missing"
    try:
        found = read_outcomes(path)
    except InputError as error:
        return str(error)
    if found.identity != identity:
        return "made with other weights, settings or images"
    return None if np.array_equal(found.image_id, ids) else "holds other images"


def join_outcomes(parts: Sequence[Outcomes]) -> Outcomes:
    """The parts of one identity as one, in their order; seconds are added up. Raises ValueError for strangers."""
    first = parts[0]
    if any(part.identity != first.identity or list(part.right) != list(first.right) for part in parts):
        raise ValueError("parts of different identities or attacks")
    right = {name: np.concatenate([part.right[name] for part in parts]) for name in first.right}
    seconds = {name: sum(part.seconds.get(name, 0.0) for part in parts) for name in first.seconds}
    machines = {json.dumps(machine, sort_keys=True): machine for part in parts for machine in part.machines}
    image_id, label, falls = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("image_id", "label", "falls_at")
    )
    return Outcomes(image_id, label, right, falls, first.identity, seconds, list(machines.values()))
