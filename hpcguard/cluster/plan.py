"""The plan: which consecutive images each shard holds, written once and never changed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcguard.errors import InputError
from hpcguard.runs import differences, digest_arrays, digest_json, read_json, write_json

PLAN_SCHEMA = 1


@dataclass(frozen=True)
class Plan:
    """Shard k holds the images at positions bounds[k]:bounds[k + 1] of the ascending ids; bounds are whole units."""

    identity: dict[str, Any]  # everything that the stored values depend on
    fingerprint: str  # digest of identity
    unit: int
    bounds: list[int]

    @property
    def num_images(self) -> int:
        return self.bounds[-1]

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1

    def shard_ids(self, index: int, ids: np.ndarray) -> np.ndarray:
        """Ids of one shard out of all ascending ids."""
        return ids[self.bounds[index] : self.bounds[index + 1]]

    def units(self, index: int, ids: np.ndarray) -> list[np.ndarray]:
        """The shard's ids in units: cut points depend on the plan's ids alone, never on shards."""
        own = self.shard_ids(index, ids)
        return [own[start : start + self.unit] for start in range(0, len(own), self.unit)]


def make_plan(ids: np.ndarray, unit: int, shards: int, identity: dict[str, Any]) -> Plan:
    """Cut ids into units, and units into at most `shards` shards of nearly equal size."""
    units = -(-len(ids) // unit)
    count = min(shards, units)
    bounds = [min(len(ids), (units * k // count) * unit) for k in range(count)] + [len(ids)]
    full = {**identity, "ids": digest_arrays(ids)}
    return Plan(full, digest_json(full), unit, bounds)


def agree_on_plan(path: Path, wanted: Plan) -> Plan:
    """The plan on disk if it has the same fingerprint, else `wanted`, published.

    Raises InputError that names every difference if the folder's plan was made for other values.
    """
    if not path.exists():
        write_json(path, {"schema": PLAN_SCHEMA, **asdict(wanted)})
        return wanted
    existing = read_plan(path)
    if existing.fingerprint != wanted.fingerprint:
        raise InputError(
            f"{path} belongs to another plan: {differences(existing.identity, wanted.identity)}; "
            "set run to another folder, or restore those values"
        )
    return existing


def read_plan(path: Path) -> Plan:
    """Read plan.json. Raises InputError if it is missing, damaged or of another version."""
    remedy = "run `python -m hpcguard.attribute` first"
    values = read_json(path, remedy)
    if values.pop("schema", None) != PLAN_SCHEMA:
        raise InputError(f"{path}: not a plan of schema {PLAN_SCHEMA}; set run to another folder")
    try:
        plan = Plan(**values)
        whole = plan.fingerprint == digest_json(plan.identity) and plan.bounds == sorted(plan.bounds)
    except (TypeError, IndexError) as error:
        raise InputError(f"{path}: damaged ({error}); {remedy} in another run folder") from error
    if not whole or len(plan.bounds) < 2:
        raise InputError(f"{path}: damaged, its fingerprint does not fit its contents; set run to another folder")
    return plan
