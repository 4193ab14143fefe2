"""The plan: which consecutive images each shard holds, written once and never changed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.plugins import source_file
from hpcguard.runs import differences, digest_arrays, digest_file, digest_json, publish_json_once, read_json

if TYPE_CHECKING:  # hpcguard.data imports torch, which takes seconds that `hpcguard status` need not wait
    from hpcguard.data import ImageSet

PLAN_SCHEMA = 1
ATTRIBUTION_VERSION = 3  # raise it whenever the same settings give other stored values


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

    def num_units(self, index: int) -> int:
        return -(-(self.bounds[index + 1] - self.bounds[index]) // self.unit)

    def shard_ids(self, index: int, ids: np.ndarray) -> np.ndarray:
        """Ids of one shard out of all ascending ids."""
        return ids[self.bounds[index] : self.bounds[index + 1]]

    def units(self, index: int, ids: np.ndarray) -> list[np.ndarray]:
        """The shard's ids in units: cut points depend on the plan's ids alone, never on shards."""
        own = self.shard_ids(index, ids)
        return [own[start : start + self.unit] for start in range(0, len(own), self.unit)]


def attribution_identity(config: Config, images: "ImageSet", weights_sha256: str) -> dict[str, Any]:
    """Everything that stored explanations depend on."""
    return {
        "version": ATTRIBUTION_VERSION,
        "data": {**config.data.identity(), "sha256": images.digest()},
        "model": {**config.model.identity(), "weights_sha256": weights_sha256},
        "attribution": config.attribution.identity(),
        "ids": digest_arrays(images.ids),
        "code": {
            key: digest_file(file) if (file := source_file(name, key)) else None
            for key, name in (
                ("model.name", config.model.name),
                ("attribution.segmentation", config.attribution.segmentation),
            )
            if ":" in name
        },
    }


def make_plan(ids: np.ndarray, unit: int, shards: int, identity: dict[str, Any]) -> Plan:
    """Cut ids into units, and units into at most `shards` shards of nearly equal size."""
    units = -(-len(ids) // unit)
    count = min(shards, units)
    bounds = [units * k // count * unit for k in range(count)] + [len(ids)]
    return Plan(identity, digest_json(identity), unit, bounds)


def agree_on_plan(path: Path, wanted: Plan) -> Plan:
    """The plan on disk if it has the same identity, else `wanted`, published; InputError if they differ."""
    if not path.exists() and publish_json_once(
        path, {"schema": PLAN_SCHEMA, **asdict(wanted), "sha256": _digest(wanted)}
    ):
        return wanted
    return require_plan(path, wanted.identity)


def require_plan(path: Path, identity: dict[str, Any]) -> Plan:
    """The plan on disk. Raises InputError that names every difference if it was made for other values."""
    existing = read_plan(path)
    if existing.identity != identity:
        raise InputError(
            f"{path} belongs to another plan: {differences(existing.identity, identity)}; "
            "set run to another folder, or restore those values"
        )
    return existing


def read_plan(path: Path) -> Plan:
    """Read plan.json. Raises InputError if it is missing, damaged or of another version."""
    remedy = "run `python -m hpcguard.attribute` first"
    values = read_json(path, remedy)
    if values.pop("schema", None) != PLAN_SCHEMA:
        raise InputError(f"{path}: not a plan of schema {PLAN_SCHEMA}; set run to another folder")
    digest = values.pop("sha256", None)
    try:
        plan = Plan(**values)
    except TypeError as error:
        raise InputError(f"{path}: damaged ({error}); set run to another folder") from error
    if digest != _digest(plan) or plan.fingerprint != digest_json(plan.identity):
        raise InputError(f"{path}: damaged, its digest does not fit its contents; set run to another folder")
    return plan


def _digest(plan: Plan) -> str:
    return digest_json(asdict(plan))
