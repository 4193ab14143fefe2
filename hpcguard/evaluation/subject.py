"""Subject: a model to be measured; the units that it takes; what each kind of unit depends on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpcguard.config import Config
from hpcguard.config.evaluation import PARTS
from hpcguard.runs import digest_json

Kind = Literal["attacks", "curve", "alarms", "corruptions", "explanations", "quality", "vulnerability", "bound"]
TABLES: tuple[Kind, ...] = ("attacks", "curve", "corruptions", "quality", "vulnerability", "bound")
"""Measured on batches of images, figures image by image; alarms and explanations (the pictures) are one unit each."""
BOUND_UNIT = 4  # images, of up to a minute each

PGD = ("norm", "eps", "pgd_steps", "pgd_restarts", "pgd_losses", "seed")
# Keys of evaluation and of the whole identity that a kind depends on, beside the model and the images.
DEPENDS: dict[Kind, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "curve": (("curve", *PGD), ()),
    "alarms": (("alarms", "batch_size", *PGD), ("sibling_sha256",)),
    "corruptions": (("corruptions",), ("corrupted",)),
    "explanations": (("explained",), ("attribution",)),
    "quality": (
        ("explanations", "spurious", "norm", "eps", "pgd_steps", "seed"), ("attribution", "baseline_sha256"),
    ),
    "vulnerability": (("vulnerability", "spurious", "seed"), ("attribution",)),
    "bound": (("bound", "spurious", "norm", "seed"), ("attribution",)),
}  # fmt: skip
NO_ATTACK = (*PARTS, "explained", "curve", "curve_images")
MODEL = ("weights_sha256", "model", "test_sha256")


@dataclass(frozen=True)
class Subject:
    """A model to be measured, and everything that its result depends on."""

    arm: str
    weights: Path
    identity: Mapping[str, Any]

    def digest(self, kind: Kind) -> str:
        """Of what the figures of a kind depend on."""
        evaluation = self.identity["evaluation"]
        own = tuple(key for key in evaluation if key not in NO_ATTACK)
        keys, more = DEPENDS.get(kind, (own, ()))
        return digest_json([
            kind, {key: evaluation[key] for key in keys}, {key: self.identity[key] for key in (*MODEL, *more)}
        ])  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """Of an arm: one batch of images, or one of the things that are measured at once."""

    arm: str
    kind: Kind
    part: int = 0


@dataclass(frozen=True)
class Plan:
    """The batches of every kind that is wanted, ids of images each; of alarms and explanations one batch."""

    batches: Mapping[Kind, Sequence[np.ndarray]]

    def units(self, arm: str) -> Iterator[Unit]:
        for kind, batches in self.batches.items():
            yield from (Unit(arm, kind, part) for part in range(len(batches)))

    def ids(self, kind: Kind) -> np.ndarray:
        return np.concatenate(self.batches[kind])


def plan_units(config: Config, ids: np.ndarray) -> Plan:
    """What to measure on the images `ids`; the long indivisible units come first, so that workers end together."""
    wanted, explained = config.evaluation, config.attribution.unit
    corrupted = len(ids) if wanted.corruptions.images is None else wanted.corruptions.images
    sizes: list[tuple[Kind, int, int]] = [
        ("attacks", len(ids), wanted.batch_size),
        ("curve", wanted.curve_images if wanted.curve else 0, wanted.batch_size),
        ("corruptions", corrupted, wanted.batch_size),
        ("quality", wanted.explanations.images, explained),
        ("vulnerability", wanted.vulnerability.images, explained),
        ("bound", wanted.bound.images, BOUND_UNIT),
    ]
    drawn = np.random.default_rng(wanted.seed).permutation(len(ids))[: wanted.alarms.images]  # ids may go by class
    batches: dict[Kind, Sequence[np.ndarray]] = {"alarms": [ids[np.sort(drawn)]]}
    if wanted.explained:
        batches["explanations"] = [ids[: wanted.explained]]
    return Plan(batches | {kind: cut(ids[:count], size) for kind, count, size in sizes if count})


def cut(ids: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive parts of so many ids, the last one of the rest."""
    return [ids[start : start + size] for start in range(0, len(ids), size)]
