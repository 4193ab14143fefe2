"""Measure every trained arm on test images: robust accuracy (clean, FGSM, PGD, AutoAttack, by radius), alarms of masked
gradients; and as the configuration asks, corruptions, quality of explanations, the paper's claim, bounds.

Attacks run in [0, 1] pixel space on the unmodified test images, on those images only that are still right. Batches of
images are measured and published one by one, so that a kill costs one batch a worker at most; several are measured at
once in evaluation.workers processes, by the ranks of mpiexec or srun --mpi, or by jobs with a --share each. Writes
RUN/results/ARM.json and, image by image, ARM.h5 and ARM.KIND.h5. What neither weights nor settings have changed is not
measured again: corruptions can be asked for later without another attack.
"""

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcguard.attacks.autoattack import check_classes
from hpcguard.cluster.environment import check_tasks
from hpcguard.cluster.failures import Problem
from hpcguard.cluster.local import Events, run_local
from hpcguard.cluster.ranks import communicator
from hpcguard.config import Config
from hpcguard.data import ImageSet
from hpcguard.data.corrupted import open_corruptions
from hpcguard.errors import InputError
from hpcguard.evaluation.attacks import pgd_names
from hpcguard.evaluation.bound import check_bounded
from hpcguard.evaluation.result import describe_result
from hpcguard.evaluation.subject import TABLES, Kind, Plan, Subject, Unit, plan_units
from hpcguard.evaluation.units import UnitTask, read_note, test_images, unit_problem
from hpcguard.progress import duration, progress, say
from hpcguard.ready_made import keep_baseline
from hpcguard.runs import RunFolder, digest_file, exclusive, publish, read_json, write_json
from hpcguard.store import ImageTable, join_tables, read_table, table_problem, write_table

EXAMPLE = (
    "python -m hpcguard.evaluate configs/quickstart.yaml --dry-run",
    "python -m hpcguard.evaluate runs/quickstart --arm guided evaluation.images=100 evaluation.eps=4/255",
    "mpiexec -n 4 python -m hpcguard.evaluate runs/quickstart",
    "python -m hpcguard.evaluate runs/quickstart --share $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
)
SECTIONS = ("data", "model", "attribution", "controls", "evaluation")
PATIENCE_S = 60.0  # for another share that is publishing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arm", action="append", metavar="ARM", help="measure only this arm (repeatable)")
    parser.add_argument(
        "--share", metavar="K/N",
        help="do every N-th batch from the K-th, counted from 0, as one of N jobs; the last of them publishes",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print what there is and what would be measured; start nothing"
    )


@dataclass(frozen=True)
class Asked:
    """What is to be measured; rank 0 finds it out for all."""

    subjects: dict[str, Subject]  # those without a result
    baseline: Subject | None  # the model that was explained, if there is one
    sibling: Subject | None  # a trained arm, for the baseline's alarms
    plan: Plan
    missing: list[Unit]  # of this share, if it is one


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder, world = RunFolder(config.run), communicator()
    check_tasks(world.size)
    if arguments.dry_run:
        if world.rank == 0:
            _say_plan(config, folder, _ask(config, folder, arguments))
        return 0
    asked: Asked = world.bcast(_begin(config, folder, arguments) if world.rank == 0 else None)
    own = asked.missing[world.rank :: world.size]
    gathered = world.gather(_measure(config, asked, own, world.rank) if own else {})
    if gathered is None:
        return 0
    failed = {unit: problem for part in gathered for unit, problem in part.items()}
    _say_failed(folder, failed)
    for subject in asked.subjects.values():
        if not any(unit.arm == subject.arm for unit in failed):
            _finish(config, folder, subject, asked.plan)
    return 1 if failed else 0


def _begin(config: Config, folder: RunFolder, arguments: argparse.Namespace) -> Asked:
    asked = _ask(config, folder, arguments)
    if asked.subjects:
        folder.create()
        folder.record_config(config, ("evaluation",))
        counted = Counter(unit.kind for unit in asked.missing)
        to_do = ", ".join(f"{count} of {kind}" for kind, count in counted.items()) or "nothing"
        say(f"evaluate: {', '.join(asked.subjects)}: to do: {to_do}")
    return asked


def _ask(config: Config, folder: RunFolder, arguments: argparse.Namespace) -> Asked:
    """Raises InputError for arms, images, settings or a share that cannot be."""
    first, step = _share(arguments.share)
    test = test_images(config)
    check_classes(config.evaluation.autoattack, len(test.classes))
    arms = _arms(config, folder, arguments.arm)
    plan = plan_units(config, test.ids)
    subjects, baseline, sibling = _subjects(config, folder, arms, test, plan, bool(arguments.dry_run))
    for arm in [arm for arm in arms if _is_done(folder, subjects[arm], plan)]:
        say(f"evaluate: {arm} is measured already: {folder.result(arm)}")
        del subjects[arm]
    if "bound" in plan.batches and config.evaluation.bound.certified:
        for subject in subjects.values():
            check_bounded(config, test, subject)
    # A share is cut from all there is to do, done or not: so all shares together leave nothing out.
    own = set([unit for arm in arms for unit in plan.units(arm)][first::step])
    units = [unit for arm in subjects for unit in _left(folder, subjects[arm], plan) if unit in own]
    problems = {unit: unit_problem(folder, subjects[unit.arm], unit, plan) for unit in units}
    for unit, problem in problems.items():
        if problem not in (None, "missing"):
            say(f"evaluate: {unit.arm}, {unit.kind}, batch {unit.part}: {problem}; doing it again")
    return Asked(subjects, baseline, sibling, plan, [unit for unit, problem in problems.items() if problem])


def _left(folder: RunFolder, subject: Subject, plan: Plan) -> list[Unit]:
    """The units of those kinds whose figures are not published yet."""
    there = {kind for kind in TABLES if kind in plan.batches and _is_published(folder, subject, kind, plan)}
    return [unit for unit in plan.units(subject.arm) if unit.kind not in there]


def _is_published(folder: RunFolder, subject: Subject, kind: Kind, plan: Plan) -> bool:
    path = folder.figures(subject.arm, kind)
    return table_problem(path, plan.ids(kind), subject.digest(kind)) is None


def _share(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    if not re.fullmatch(r"\d+/\d+", text) or not int(text.split("/")[0]) < int(text.split("/")[1]):
        raise InputError(f"--share {text}: write K/N, the K-th of N shares, counted from 0: 0/4, 1/4, 2/4, 3/4")
    number, of = text.split("/")
    return int(number), int(of)


def _arms(config: Config, folder: RunFolder, asked: list[str] | None) -> list[str]:
    trained = [arm for arm in config.arms() if folder.weights(arm).exists()]
    for arm in asked or []:
        if arm != "baseline":
            config.arm(arm)
            if arm not in trained:
                raise InputError(
                    f"arm {arm}: {folder.weights(arm)} is not there; run `python -m hpcguard.refine` for it"
                )
    return list(dict.fromkeys(asked or ["baseline", *trained]))


def _subjects(
    config: Config, folder: RunFolder, arms: Sequence[str], test: ImageSet, plan: Plan, dry_run: bool
) -> tuple[dict[str, Subject], Subject | None, Subject | None]:
    """The models to be measured; the one that was explained, and a sibling of it, as far as there are any."""
    first = next((arm for arm in config.arms() if folder.weights(arm).exists()), "")
    weights = {arm: folder.weights(arm) for arm in config.arms() if arm in (*arms, first)}
    try:
        keep_baseline(config, folder, test, dry_run)
        weights["baseline"] = folder.explained_weights(config)
    except InputError:
        if "baseline" in arms:
            raise  # arms alone can be measured
    digests = {arm: digest_file(path) for arm, path in weights.items()}
    siblings = {**dict.fromkeys(digests, "baseline"), "baseline": first}
    shared: dict[str, Any] = {
        "model": config.model.identity(),
        "evaluation": config.evaluation.identity(),
        "attribution": config.attribution.identity(),
        "test_sha256": test.digest(),
        "corrupted": _corrupted(config, test, plan),
        "baseline_sha256": digests.get("baseline"),
    }
    known = {
        arm: Subject(arm, weights[arm], {
            "weights_sha256": digests[arm], "sibling_sha256": digests.get(siblings[arm]), **shared,
        })
        for arm in digests
    }  # fmt: skip
    return {arm: known[arm] for arm in arms}, known.get("baseline"), known.get(first)


def _corrupted(config: Config, test: ImageSet, plan: Plan) -> dict[str, str] | None:
    if "corruptions" not in plan.batches:
        return None
    corrupted = open_corruptions(config.evaluation.corruptions, test, config.data.size)
    return {"name": corrupted.name, "sha256": corrupted.digest(plan.ids("corruptions"))}


def _is_done(folder: RunFolder, subject: Subject, plan: Plan) -> bool:
    path = folder.result(subject.arm)
    if not path.exists():
        return False
    recorded = read_json(path, f"delete {path} to measure it again")
    if recorded.get("identity") != subject.identity:
        return False
    others = recorded.get("tables_sha256")
    named = {"attacks": recorded.get("outcomes_sha256"), **(others if isinstance(others, dict) else {})}
    tables = {kind: folder.figures(subject.arm, kind) for kind in TABLES if kind in plan.batches}
    whole = all(table.is_file() and named.get(kind) == digest_file(table) for kind, table in tables.items())
    return whole and ("explanations" not in plan.batches or folder.explanations(subject.arm).exists())


def _measure(config: Config, asked: Asked, own: Sequence[Unit], rank: int) -> dict[Unit, Problem]:
    """Do units in a pool of processes; returns those that failed. Enough equal failures end it: the rest would too."""
    wanted, failed = config.evaluation, dict[Unit, Problem]()
    with progress("evaluate" if rank == 0 else f"evaluate, rank {rank}", len(own), "units") as meter:

        def end(unit: Unit, problem: Problem | None) -> None:
            meter.advance()
            meter.note(f"{unit.arm} {unit.kind} {'FAILED' if problem else ''}".rstrip())
            if problem:
                failed[unit] = problem

        def enough() -> bool:
            signatures = [problem.signature or problem.message for problem in failed.values()]
            return any(signatures.count(each) >= config.cluster.equal_errors for each in set(signatures))

        run_local(
            UnitTask(config, asked.subjects, asked.baseline, asked.sibling, rank), own, wanted.workers, wanted.threads,
            config.cluster.attempts,
            Events(
                progress=lambda unit, amount: None,
                end=end,
                restart=lambda unit, problem: say(f"evaluate: {unit.arm}: {problem.message}; beginning it again"),
                stop=enough,
            ),
        )  # fmt: skip
    return failed


def _say_failed(folder: RunFolder, failed: Mapping[Unit, Problem]) -> None:
    for arm in dict.fromkeys(unit.arm for unit in failed):
        problems = [problem for unit, problem in failed.items() if unit.arm == arm]
        log = folder.logs / f"evaluate_{arm}.log"
        log.write_text("".join(f"{problem.tail}\n{problem.message}\n" for problem in problems))
        advice = "; lower evaluation.batch_size" if "out-of-memory" in problems[0].kind else ""
        say(f"evaluate: {arm} FAILED in {len(problems)} batch(es): {problems[0].message}{advice} (log: {log})")


def _finish(config: Config, folder: RunFolder, subject: Subject, plan: Plan) -> None:
    """Publish an arm's result if all its units are there; a share that is not the last one finds some missing."""
    with exclusive(folder.results, PATIENCE_S):
        if _is_done(folder, subject, plan):  # another share was the last one
            return
        units = _left(folder, subject, plan)
        missing = [unit for unit in units if unit_problem(folder, subject, unit, plan)]
        if missing:
            say(f"evaluate: {subject.arm}: {len(missing)} of {len(units)} units are missing yet")
            return
        tables = {kind: _table(folder, subject, kind, plan) for kind in TABLES if kind in plan.batches}
        notes = {kind: read_note(folder, subject, kind) or {} for kind in plan.batches if kind not in TABLES}
        result = describe_result(config, folder, subject, tables, notes)
        write_json(folder.result(subject.arm), result)  # last: it says what the other files must be
        shutil.rmtree(folder.parts(subject.arm), ignore_errors=True)
    worst, doubt = result["worst"], "" if result["trusted"] else "; NOT TO BE TRUSTED, see its alarms"
    say(f"evaluate: {subject.arm}: {worst['right']} of {worst['of']} right under every attack{doubt}: "
        f"{folder.result(subject.arm)}")  # fmt: skip


def _table(folder: RunFolder, subject: Subject, kind: Kind, plan: Plan) -> ImageTable:
    """The figures of a kind, published."""
    path = folder.figures(subject.arm, kind)
    if _is_published(folder, subject, kind, plan):
        return read_table(path)
    parts = range(len(plan.batches[kind]))
    table = join_tables([read_table(folder.part(subject.arm, kind, part)) for part in parts])
    with publish(path) as temporary:
        write_table(temporary, table)
    return table


def _say_plan(config: Config, folder: RunFolder, asked: Asked) -> None:
    wanted = config.evaluation
    images, batches = len(asked.plan.ids("attacks")), len(asked.plan.batches["attacks"])
    say(f"run folder   {folder.path}")
    say(f"images       {images} in {batches} batches of at most {wanted.batch_size}")
    version = wanted.autoattack if isinstance(wanted.autoattack, str) else ", ".join(wanted.autoattack)
    say(f"attacks      {wanted.norm} {wanted.eps:.4g}: FGSM, {', '.join(pgd_names(wanted))}, AutoAttack: {version}")
    if wanted.curve:
        say(f"curve        {len(wanted.curve)} radii up to {wanted.curve[-1]:.4g}, the first {wanted.curve_images}")
    for kind in asked.plan.batches:
        if kind not in ("attacks", "curve", "alarms", "explanations"):
            say(f"{kind:<12} the first {len(asked.plan.ids(kind))}")
    for arm in asked.subjects:
        units = list(asked.plan.units(arm))
        left = sum(unit.arm == arm for unit in asked.missing)
        say(f"  {arm}: {len(units) - left} units are there, {left} to do")
    _say_cost(config, folder, asked)
    say("dry run: nothing was started or written")


def _say_cost(config: Config, folder: RunFolder, asked: Asked) -> None:
    """By the units that are there, of each kind."""
    seconds = _seconds_a_unit(folder, asked)
    if not asked.missing:
        return
    known = [unit for unit in asked.missing if unit.kind in seconds]
    workers, total = config.evaluation.workers, sum(seconds[unit.kind] for unit in known)
    unknown = dict.fromkeys(unit.kind for unit in asked.missing if unit.kind not in seconds)
    if known:
        say(f"cost         about {duration(total / workers, 1)} with {workers} worker(s), by units that are there")
    if unknown:
        say(f"cost         of {', '.join(unknown)}: not known before a first unit is there")


def _seconds_a_unit(folder: RunFolder, asked: Asked) -> dict[Kind, float]:
    found: dict[Kind, list[float]] = {}
    for subject in asked.subjects.values():
        for unit in _left(folder, subject, asked.plan):
            if unit_problem(folder, subject, unit, asked.plan):
                continue
            if unit.kind in TABLES:
                seconds = sum(read_table(folder.part(unit.arm, unit.kind, unit.part)).seconds.values())
            else:
                seconds = (read_note(folder, subject, unit.kind) or {"seconds": 0.0})["seconds"]
            found.setdefault(unit.kind, []).append(seconds)
    return {kind: sum(each) / len(each) for kind, each in found.items()}


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("evaluate"))
