"""SweepFolder: the file names of a sweep, and the plan that lies in it."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from hpcguard.config import Config
from hpcguard.config.sweep import RESOLVED, SweepConfig
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, check_private, publish, read_json, write_json
from hpcguard.sweeps.jobs import Graph, Job, Planned

SCHEMA = 1


@dataclass(frozen=True)
class SweepFolder:
    """Paths inside one sweep's folder."""

    path: Path

    @property
    def sweep(self) -> Path:
        """The sweep as last started, with its base in it."""
        return self.path / RESOLVED

    @property
    def plan(self) -> Path:
        """Cells and jobs, for who only looks."""
        return self.path / "cells.json"

    def config(self, batch: str) -> Path:
        return self.path / "configs" / f"{batch}.yaml"

    def log(self, batch: str) -> Path:
        return self.path / "logs" / f"{batch}.log"

    def record(self, job: str) -> Path:
        """How a job's last attempt ended."""
        return self.path / "jobs" / f"{job}.json"

    @property
    def running(self) -> Path:
        return self.path / "running"

    def lock(self, job: str) -> Path:
        """Held by the process that has a job done."""
        return self.running / f"{job}.lock"

    @property
    def slurm(self) -> Path:
        """A folder for each submission: 0001, 0002, ..."""
        return self.path / "slurm"

    @property
    def table(self) -> Path:
        return self.path / "table.csv"

    @property
    def summary(self) -> Path:
        return self.path / "table.md"

    @property
    def report(self) -> Path:
        return self.path / "report/index.html"

    def run(self, job: Job) -> RunFolder:
        return RunFolder(self.path / job.folder)

    def create(self) -> None:
        """Make the folder, private to its owner. Raises InputError if it is a run folder or others may enter it."""
        if RunFolder(self.path).plan.exists():
            raise InputError(f"run = {self.path}: is the folder of a single run; set run to another for the sweep")
        for folder in (self.path, self.running, *(self.path / name for name in ("configs", "logs", "jobs"))):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(self.path)


def is_sweep(path: Path) -> bool:
    return SweepFolder(path).plan.is_file()


def measured_alike(base: Config) -> dict[str, Any]:
    """What of a result's identity is the same for all cells of a sweep."""
    return {"evaluation": base.evaluation.identity(), "attribution": base.attribution.identity()}


def write_plan(folder: SweepFolder, sweep: SweepConfig, base: Config, graph: Graph) -> None:
    """Publish the sweep and its plan. Files of cells that it no longer has stay where they are."""
    config = base.model_dump(mode="json", exclude_unset=True)
    # Not in JSON's mode: the label on is read as a truth value, and must be so again.
    write_yaml(folder.sweep, sweep.model_dump() | {"run": str(sweep.run), "base": None, "config": config})
    write_json(
        folder.plan,
        {
            "schema": SCHEMA, "alike": measured_alike(base), "control": sweep.control,
            "cells": [asdict(cell) for cell in graph.cells], "jobs": [asdict(job) for job in graph.jobs.values()],
        },
    )  # fmt: skip


def read_plan(folder: SweepFolder) -> tuple[Graph, dict[str, Any], dict[str, Any]]:
    """The plan without its inputs, what all results have alike, and the control."""
    remedy = "start the sweep again, `hpcguard sweep SWEEP.yaml`"
    values = read_json(folder.plan, remedy, schema=int, alike=dict, control=dict, cells=list, jobs=list)
    if values["schema"] != SCHEMA:
        raise InputError(f"{folder.plan}: not a plan of schema {SCHEMA}; {remedy}")
    try:
        cells = [Planned(**cell) for cell in values["cells"]]
        jobs = [Job(**{**job, "needs": tuple(job["needs"])}) for job in values["jobs"]]
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder.plan}: damaged ({error}); {remedy}") from error
    return Graph(cells, {job.name: job for job in jobs}, {}), values["alike"], values["control"]


def write_yaml(path: Path, values: dict[str, Any], header: str = "") -> None:
    with publish(path) as temporary:
        temporary.write_text(header + yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
