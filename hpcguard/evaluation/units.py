"""A unit of evaluation, in whatever process: measure it and publish what was found."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpcguard.cluster.devices import full_float32, pick_device
from hpcguard.cluster.local import Report
from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.evaluation.alarms import measure_alarms
from hpcguard.evaluation.attacks import measure_attacks, measure_curve
from hpcguard.evaluation.bound import measure_bound
from hpcguard.evaluation.case import Case, Measured
from hpcguard.evaluation.corruptions import measure_corruptions
from hpcguard.evaluation.pictures import explain_images
from hpcguard.evaluation.quality import measure_quality
from hpcguard.evaluation.subject import Kind, Plan, Subject, Unit, plan_units
from hpcguard.evaluation.vulnerability import measure_claim_on
from hpcguard.models import check_answers, load_model
from hpcguard.runs import RunFolder, digest_file, digest_json, publish, read_sealed, write_sealed
from hpcguard.store import ImageTable, rows_from, table_problem, write_rows, write_table

FIRST = 16  # images that are asked for a finite answer
MEASURES: Mapping[Kind, Callable[[Case], Measured]] = {
    "attacks": measure_attacks,
    "curve": measure_curve,
    "corruptions": measure_corruptions,
    "quality": measure_quality,
    "vulnerability": measure_claim_on,
    "bound": measure_bound,
}


def test_images(config: Config) -> ImageSet:
    """The images to be attacked: all of the split, or evaluation.images of them drawn by data.seed."""
    test = load_images(config.data, config.evaluation.split)
    wanted = config.evaluation.images
    if wanted is None or wanted == len(test):
        return test
    if wanted > len(test):
        raise InputError(
            f"evaluation.images = {wanted}: the {config.evaluation.split} split has {len(test)}; lower it or write null"
        )
    return test.subset(np.random.default_rng(config.data.seed).choice(test.ids, wanted, replace=False))


@dataclass
class UnitTask:
    """What a worker process does with a unit. Images are read once a process, and a model once while its units last."""

    config: Config
    subjects: Mapping[str, Subject]
    baseline: Subject | None = None  # the model that was explained, if there is one
    sibling: Subject | None = None  # of the baseline, for its alarms; the others' is the baseline
    rank: int = 0
    _models: dict[str, nn.Module] = field(default_factory=dict, init=False)

    @cached_property
    def _test(self) -> ImageSet:
        return test_images(self.config)

    @cached_property
    def _plan(self) -> Plan:
        return plan_units(self.config, self._test.ids)

    def __call__(self, unit: Unit, slot: int, report: Report) -> None:
        full_float32()
        subject, folder = self.subjects[unit.arm], RunFolder(self.config.run)
        case = self._case(subject, unit, pick_device(self.config.device, self._place(slot)), report)
        since = time.monotonic()
        if unit.kind == "alarms":
            rows = measure_alarms(self.config.evaluation, case.model, case.other, case.x, case.y)
            self._note(folder, subject, unit.kind, {"rows": rows}, since, case.x.device)
        elif unit.kind == "explanations":
            self._explain(folder, subject, case, since)
        else:
            measured = MEASURES[unit.kind](case)
            seconds = measured.seconds or {unit.kind: time.monotonic() - since}
            rounded = {name: round(value, 3) for name, value in seconds.items()}
            table = ImageTable(case.ids, measured.columns, subject.digest(unit.kind), rounded, [machine(case.x.device)])
            with publish(folder.part(unit.arm, unit.kind, unit.part)) as temporary:
                write_table(temporary, table)

    def _place(self, slot: int) -> int:
        return slot + self.rank * self.config.evaluation.workers

    def _case(self, subject: Subject, unit: Unit, device: torch.device, report: Report) -> Case:
        ids = self._plan.batches[unit.kind][unit.part]
        x = torch.from_numpy(self._test.images(ids)).to(device)
        y = torch.from_numpy(self._test.labels_of(ids)).to(device)
        other = self.baseline if unit.kind in ("alarms", "quality") else None
        if unit.kind == "alarms" and unit.arm == "baseline":
            other = self.sibling
        self._models = {arm: self._models[arm] for arm in self._models if arm in (unit.arm, other and other.arm)}
        model, beside = self._load(subject, device), self._load(other, device) if other else None
        return Case(self.config, model, self._test, ids, x, y, beside, lambda: report(0))

    def _load(self, subject: Subject, device: torch.device) -> nn.Module:
        """The model, kept while it is asked for."""
        if subject.arm not in self._models:
            if digest_file(subject.weights) != subject.identity["weights_sha256"]:
                raise InputError(f"{subject.weights}: changed while it was to be measured; run the same command again")
            classes = len(self._test.classes)
            model = load_model(self.config.model, classes, self._test.shape[0], subject.weights, device)
            check_answers(model, self._answered(model, device), classes)
            # Attacks ask for the gradient of images alone; FAB would have torch compute that of the weights as well.
            self._models[subject.arm] = model.requires_grad_(False)
        return self._models[subject.arm]

    def _answered(self, model: nn.Module, device: torch.device) -> Tensor:
        """An image [1, C, H, W] with a finite answer, if one of the first has it: the others just count as wrong."""
        first = torch.from_numpy(self._test.images(self._test.ids[:FIRST])).to(device)
        for image in first.split(1):
            with torch.inference_mode(), suppress(Exception):  # what it is, check_answers says
                if model(image).isfinite().all():
                    return image
        return first[:1]

    def _explain(self, folder: RunFolder, subject: Subject, case: Case, since: float) -> None:
        found, figures = explain_images(case)
        path, identity = folder.explanations(subject.arm), {"attribution": self.config.attribution.identity()}
        labels = case.y.cpu().numpy()
        with publish(path) as temporary:
            write_rows(temporary, rows_from(found, labels), digest_json(identity), identity=identity)
        self._note(folder, subject, "explanations", {**figures, "sha256": digest_file(path)}, since, case.x.device)

    def _note(
        self, folder: RunFolder, subject: Subject, kind: Kind, values: Mapping[str, Any], since: float,
        device: torch.device,
    ) -> None:  # fmt: skip
        made = {"seconds": round(time.monotonic() - since, 3), "machine": machine(device)}
        path = folder.note(subject.arm, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(path, {"identity": subject.digest(kind), **values, **made})


def machine(device: torch.device) -> dict[str, Any]:
    """What figures were computed on."""
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else _processor()
    return {
        "device": name, "gpu": gpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def _processor() -> str:
    """platform.processor() is empty on most Linux machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def unit_problem(folder: RunFolder, subject: Subject, unit: Unit, plan: Plan) -> str | None:
    """Why a unit is to be done, or None."""
    if unit.kind in ("alarms", "explanations"):
        return None if read_note(folder, subject, unit.kind) else "missing"
    ids, digest = plan.batches[unit.kind][unit.part], subject.digest(unit.kind)
    return table_problem(folder.part(unit.arm, unit.kind, unit.part), ids, digest)


def read_note(folder: RunFolder, subject: Subject, kind: Kind) -> dict[str, Any] | None:
    """What was found about a subject as a whole, if it still holds and the explanations are as they were left."""
    if not folder.note(subject.arm, kind).is_file():
        return None
    try:
        found = read_sealed(folder.note(subject.arm, kind), "", identity=str, seconds=float, machine=dict)
    except InputError:
        return None  # it is made again
    path = folder.explanations(subject.arm)
    if kind == "explanations" and not (path.is_file() and found.get("sha256") == digest_file(path)):
        return None
    return found if found["identity"] == subject.digest(kind) else None
