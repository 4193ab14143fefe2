"""Cells to the distinct jobs that they need.

A job is addressed by the digest of all that its output depends on, so cells that have something in common share it:
what is not guided is trained in models/DIGEST of its data and model, a store lies in stores/DIGEST of its data, model,
explained weights and attribution, and what is guided is trained there. An arm's name is a digest too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcguard.config import Config, LimeConfig, TrainingConfig
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, digest_file, digest_json
from hpcguard.sweeps.grid import Cell
from hpcguard.sweeps.settings import Part, Resolver, Settings, of_round

Kind = Literal["attribute", "refine", "evaluate"]
DIGITS = 16  # of a digest in a name: equal by chance for none of a million


@dataclass(frozen=True)
class Job:
    """One thing to be done by one stage (attribute: and consolidate)."""

    name: str
    kind: Kind
    folder: str  # its run folder, in the sweep's
    arm: str  # empty for attribute
    needs: tuple[str, ...]
    explained: str = (
        ""  # of evaluate: weights that it holds the arm's against, in the sweep's folder or an absolute path
    )


@dataclass(frozen=True)
class Inputs:
    """The settings of a job, for its configuration."""

    settings: Settings
    training: TrainingConfig | None
    explained: Path | None  # weights that are explained, or started from, or that an evaluation holds the arm's against


@dataclass(frozen=True)
class Planned:
    """A cell and the jobs whose files are its result."""

    values: dict[str, Any]
    seed: int
    refine: str
    evaluate: str


@dataclass
class Graph:
    """All jobs of a sweep, each once; `inputs` of those planned in this process."""

    cells: list[Planned]
    jobs: dict[str, Job]
    inputs: dict[str, Inputs]

    def before(self, names: Iterable[str]) -> set[str]:
        """Jobs with all that must be done before them."""
        found: set[str] = set()
        open_ = list(names)
        while open_:
            name = open_.pop()
            if name not in found:
                found.add(name)
                open_ += self.jobs[name].needs
        return found


@dataclass(frozen=True)
class _Weights:
    """A model that is explained, or started from."""

    path: Path
    digest: str
    needs: tuple[str, ...]


def plan_jobs(folder: Path, base: Config, cells: list[Cell]) -> Graph:
    """The jobs of all cells; folder: the sweep's. Raises InputError that names the first cell that cannot be done."""
    builder = _Builder(folder, base)
    for cell in cells:
        try:
            builder.add(cell)
        except InputError as error:
            text = str(error)
            raise InputError(text if text.startswith("cell ") else f"cell {cell.name}: {text}") from error
    builder.add_evaluations()
    return Graph(builder.cells, builder.in_order(), builder.inputs)


class _Builder:
    def __init__(self, folder: Path, base: Config) -> None:
        self.folder, self.resolver = folder, Resolver(base)
        self.cells: list[Planned] = []
        self.jobs: dict[str, Job] = {}
        self.inputs: dict[str, Inputs] = {}
        self._files: dict[Path, str] = {}
        self._used: dict[str, _Weights] = {}  # by training: the model that it has explained, or starts from
        self._first: dict[str, _Weights] = {}  # by the folder of a data and model: the first of these

    def add(self, cell: Cell) -> None:
        settings = self.resolver.settings(cell)
        refine = self._rounds(settings)
        if refine in self._used:
            self._first.setdefault(_models(settings), self._used[refine])
        seed = settings.refinement.section.seed if cell.seed is None else cell.seed
        self.cells.append(Planned(cell.values, seed, refine, f"evaluate-{self.jobs[refine].arm}"))

    def add_evaluations(self) -> None:
        """Each holds its arm against the model that was explained for it, or where none was, for other cells.

        So the controls too have a sibling that attacks are transferred from, and flags that explanations are held to.
        """
        for cell in self.cells:
            trained, inputs = self.jobs[cell.refine], self.inputs[cell.refine]
            against = self._used.get(cell.refine) or self._first.get(_models(inputs.settings))
            if against is not None and cell.refine in against.needs:
                against = None  # no model is its own sibling
            explained = against.path if against else None
            needs = (cell.refine, *(against.needs if against else ()))
            self.jobs[cell.evaluate] = Job(
                cell.evaluate, "evaluate", trained.folder, trained.arm, needs, self._shown(explained)
            )
            self.inputs[cell.evaluate] = Inputs(inputs.settings, inputs.training, explained)

    def _shown(self, weights: Path | None) -> str:
        if weights is None:
            return ""
        return str(weights.relative_to(self.folder) if weights.is_relative_to(self.folder) else weights.resolve())

    def in_order(self) -> dict[str, Job]:
        """The jobs cell by cell, each behind those that it needs."""
        found: dict[str, Job] = {}
        for cell in self.cells:
            open_ = [cell.evaluate]
            while open_:
                name = open_[-1]
                left = [need for need in self.jobs[name].needs if need not in found]
                if left:
                    open_ += left  # the last is the first to be dealt with: an evaluation's explained model
                else:
                    found[open_.pop()] = self.jobs[name]
        return found

    def _rounds(self, settings: Settings) -> str:
        """The job that trains a cell's last round; each round explains what the one before has trained."""
        training = settings.refinement
        if settings.rounds > 1 and not training.section.guided:
            raise InputError(
                f"rounds = {settings.rounds}: refinement uses no explanations, so one round is all there is"
            )
        explained = self._explained(settings)
        name = self._refine(settings, training, explained)
        for number in range(2, settings.rounds + 1):
            name = self._refine(settings, of_round(training, number), self._weights_of(name))
        return name

    def _explained(self, settings: Settings) -> _Weights | None:
        """The model that a cell explains and, with start: baseline, refines; None where it needs none."""
        refinement: TrainingConfig = settings.refinement.section
        if not refinement.guided and refinement.start == "scratch":
            return None
        if path := settings.model.section.weights:
            return _Weights(path, self._digest(path), ())
        if settings.baseline.section is None:
            raise InputError("there is no model to explain: set model.weights, or add a section baseline")
        return self._weights_of(self._refine(settings, settings.baseline, None))

    def _digest(self, path: Path) -> str:
        if path not in self._files:
            if not path.is_file():
                raise InputError(f"model.weights = {path}: no such file")
            self._files[path] = digest_file(path)
        return self._files[path]

    def _weights_of(self, name: str) -> _Weights:
        job = self.jobs[name]
        return _Weights(RunFolder(self.folder / job.folder).weights(job.arm), job.arm, (name,))

    def _refine(self, settings: Settings, training: Part, explained: _Weights | None) -> str:
        guided, start = training.section.guided, training.section.start == "baseline"
        depends = [settings.data.digest, settings.model.digest, training.digest]
        needs: tuple[str, ...] = ()
        if guided and explained is not None:
            _check_computed(training.section, settings.attribution.section)
            needs = (self._attribute(settings, explained),)
            folder = self.jobs[needs[0]].folder
        else:
            folder = _models(settings)
            if start and explained is not None:
                needs = explained.needs
                depends.append(explained.digest)
        arm = _digest(*depends, folder)
        name = f"refine-{arm}"
        if name not in self.jobs:
            self.jobs[name] = Job(name, "refine", folder, arm, needs)
            if explained is not None and (guided or start):
                self._used[name] = explained
            self.inputs[name] = Inputs(
                settings, training.section, self._used[name].path if name in self._used else None
            )
        return name

    def _attribute(self, settings: Settings, explained: _Weights) -> str:
        store = _digest(settings.data.digest, settings.model.digest, settings.attribution.digest, explained.digest)
        name = f"attribute-{store}"
        if name not in self.jobs:
            self.jobs[name] = Job(name, "attribute", f"stores/{store}", "", explained.needs)
            self.inputs[name] = Inputs(settings, None, explained.path)
        return name


def _check_computed(training: TrainingConfig, attribution: LimeConfig) -> None:
    """InputError where flags need what the store will not have: known now, not only after hours of attribution."""
    lacking = {
        "sensitivity": "" if attribution.sensitivity else "attribution.sensitivity=true",
        "instability": "" if attribution.noisy_copies else "attribution.noisy_copies=5",
    }
    for name in training.spurious.criteria:
        if change := lacking.get(name):
            raise InputError(
                f"refinement.spurious.criteria = {name}: attribution does not compute it; set {change} or choose others"
            )


def _models(settings: Settings) -> str:
    return f"models/{_digest(settings.data.digest, settings.model.digest)}"


def _digest(*parts: str) -> str:
    return digest_json(parts)[:DIGITS]


def job_config(folder: Path, base: Config, jobs: list[Job], inputs: Mapping[str, Inputs]) -> dict[str, Any]:
    """The configuration of jobs of one kind and one run folder: the base's but for what these depend on.

    Evaluation explains test images as the base does, so that all models are measured alike.
    """
    first = inputs[jobs[0].name]
    settings = first.settings
    values = base.model_dump(mode="json")
    values |= {"run": str(folder / jobs[0].folder), "baseline": None, "controls": {}}
    values["data"] = settings.data.section.model_dump(mode="json")
    values["model"] = {
        **settings.model.section.model_dump(mode="json"), "weights": str(first.explained) if first.explained else None
    }  # fmt: skip
    values["cluster"]["executor"] = "local"
    if jobs[0].kind != "evaluate":
        values["attribution"] = settings.attribution.section.model_dump(mode="json")
    for job in jobs:
        if training := inputs[job.name].training:
            values["controls"][job.arm] = training.model_dump(mode="json")
    return values


def pack_key(job: Job, inputs: Inputs) -> tuple[str, ...]:
    """Jobs with the same can be done by one process, with one configuration."""
    explained = str(inputs.explained) if job.kind != "attribute" else ""
    return (job.kind, job.folder, explained, job.name if job.kind == "attribute" else "")


def command(job_file: Path, jobs: list[Job]) -> list[str]:
    """Stages and arguments of the hpcguard command that does them."""
    if jobs[0].kind == "attribute":
        return ["attribute", "consolidate", str(job_file)]
    return [jobs[0].kind, str(job_file), *(part for job in jobs for part in ("--arm", job.arm))]
