"""The journal of one attempt at a shard: finished units, appended as they come, so that a kill costs one at most.

A record is a header (mark, length, SHA-256) and an .npz of the unit's rows. Whatever does not fit its digest, such as
the torn end that a kill leaves, ends the reading. Every attempt writes a file of its own and appends to no torn end.
"""

import hashlib
import io
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcguard.store.schema import SCHEMA_VERSION

HEADER = struct.Struct("<8sQ32s")
MARK = b"hpcunit1"
NOTES = "notes"  # the array that holds a record's JSON


@dataclass(frozen=True)
class Unit:
    """One finished unit: rows of the images that could be explained, and why the others could not."""

    rows: dict[str, np.ndarray]
    seconds: float
    quarantined: dict[int, str] = field(default_factory=dict)
    batch_size: int | None = None  # of the forward passes


class Journal:
    """Appends units to one file."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)  # an attempt is seen before its first unit is done

    def append(self, number: int, unit: Unit) -> None:
        """Add a unit and wait until it is on the disk."""
        payload = _pack(self.fingerprint, number, unit)
        record = HEADER.pack(MARK, len(payload), hashlib.sha256(payload).digest()) + payload
        with self.path.open("ab") as file:
            file.write(record)
            file.flush()
            os.fsync(file.fileno())


def read_journal(path: Path, fingerprint: str) -> dict[int, Unit]:
    """Sound units of a journal by their number in the shard; those of another plan or schema are left out."""
    units: dict[int, Unit] = {}
    try:
        file = path.open("rb")
    except FileNotFoundError:  # its shard has just been published
        return units
    with file:
        size = os.fstat(file.fileno()).st_size
        while len(header := file.read(HEADER.size)) == HEADER.size:
            mark, length, digest = HEADER.unpack(header)
            # A flipped bit of the length must not ask for all memory.
            payload = file.read(length) if mark == MARK and length <= size - file.tell() else b""
            if len(payload) != length or hashlib.sha256(payload).digest() != digest:
                break
            notes, unit = _unpack(payload)
            if (notes["fingerprint"], notes.get("schema")) == (fingerprint, SCHEMA_VERSION):
                units[notes["unit"]] = unit
    return units


def _pack(fingerprint: str, number: int, unit: Unit) -> bytes:
    notes = {
        "schema": SCHEMA_VERSION, "fingerprint": fingerprint, "unit": number, "seconds": unit.seconds,
        "batch_size": unit.batch_size,
        "quarantined": [[image, why] for image, why in unit.quarantined.items()],
    }  # fmt: skip
    buffer = io.BytesIO()
    arrays: Mapping[str, Any] = {**unit.rows, NOTES: np.frombuffer(json.dumps(notes).encode(), np.uint8)}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _unpack(payload: bytes) -> tuple[dict[str, Any], Unit]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        notes = json.loads(arrays[NOTES].tobytes())
        rows = {name: arrays[name] for name in arrays.files if name != NOTES}
    quarantined = {int(image): why for image, why in notes["quarantined"]}
    return notes, Unit(rows, notes["seconds"], quarantined, notes["batch_size"])
