"""Measure every trained arm on test images: clean, FGSM, PGD, AutoAttack; and explain a few images with each.

Attacks run in [0, 1] pixel space on the unmodified test images, on those images only that are still right. Batches of
images are attacked and published one by one, so that a kill costs one batch a worker at most; several are attacked at
once in evaluation.workers processes, by the ranks of mpiexec or srun --mpi, or by jobs with a --share each. Writes
RUN/results/ARM.json and, image by image, ARM.h5, one a model, and the explanations that the report draws. A model
whose weights and settings have not changed is not measured again.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hpcguard.attacks.autoattack import check_classes
from hpcguard.cluster.environment import check_tasks
from hpcguard.cluster.failures import Problem
from hpcguard.cluster.local import Events, run_local
from hpcguard.cluster.ranks import communicator
from hpcguard.config import Config
from hpcguard.data import ImageSet
from hpcguard.errors import InputError
from hpcguard.measure import Subject, Unit, UnitTask, cut, pgd_names, read_explained, test_images
from hpcguard.progress import duration, progress, say
from hpcguard.result import describe_result
from hpcguard.runs import (
    RunFolder,
    digest_file,
    exclusive,
    publish,
    read_json,
    write_json,
)
from hpcguard.store import join_outcomes, outcomes_problem, read_outcomes, write_outcomes

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
    parts: list[np.ndarray]  # ids of the images of each
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
            _finish(config, folder, subject, asked.parts)
    return 1 if failed else 0


def _begin(config: Config, folder: RunFolder, arguments: argparse.Namespace) -> Asked:
    asked = _ask(config, folder, arguments)
    if asked.subjects:
        folder.create()
        folder.record_config(config, ("evaluation",))
        units = len(asked.missing)
        say(f"evaluate: {', '.join(asked.subjects)}: {units} of {_count(config, asked)} batches and explanations to do")
    return asked


def _ask(config: Config, folder: RunFolder, arguments: argparse.Namespace) -> Asked:
    """Raises InputError for arms, images, settings or a share that cannot be."""
    first, step = _share(arguments.share)
    test = test_images(config)
    check_classes(config.evaluation.autoattack, len(test.classes))
    arms = _arms(config, folder, arguments.arm)
    subjects = {arm: _subject(config, folder, arm, test) for arm in arms}
    for arm in [arm for arm in arms if _is_done(folder, subjects[arm])]:
        say(f"evaluate: {arm} is measured already: {folder.result(arm)}")
        del subjects[arm]
    parts = cut(test.ids, config.evaluation.batch_size)
    units = [unit for arm in subjects for unit in _units(config, arm, len(parts))][first::step]
    problems = {unit: _problem(folder, subjects[unit.arm], unit, parts) for unit in units}
    for unit, problem in problems.items():
        if problem not in (None, "missing"):
            say(f"evaluate: {unit.arm}, batch {unit.part}: {problem}; doing it again")
    return Asked(subjects, parts, [unit for unit, problem in problems.items() if problem])


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
    folder.explained_weights(config)
    return list(dict.fromkeys(asked or ["baseline", *trained]))


def _subject(config: Config, folder: RunFolder, arm: str, test: ImageSet) -> Subject:
    weights = folder.explained_weights(config) if arm == "baseline" else folder.weights(arm)
    return Subject(arm, weights, {
        "weights_sha256": digest_file(weights),
        "model": config.model.identity(),
        "evaluation": config.evaluation.identity(),
        "attribution": config.attribution.identity(),
        "test_sha256": test.digest(),
    })  # fmt: skip


def _is_done(folder: RunFolder, subject: Subject) -> bool:
    if not folder.result(subject.arm).exists():
        return False
    recorded = read_json(folder.result(subject.arm), f"delete {folder.result(subject.arm)} to measure it again")
    outcomes = folder.outcomes(subject.arm)
    whole = outcomes.is_file() and recorded.get("outcomes_sha256") == digest_file(outcomes)
    explained = folder.explanations(subject.arm).exists() or not subject.identity["evaluation"]["explained"]
    return recorded.get("identity") == subject.identity and whole and explained


def _units(config: Config, arm: str, parts: int) -> list[Unit]:
    return [Unit(arm, part) for part in range(parts)] + ([Unit(arm, None)] if config.evaluation.explained else [])


def _count(config: Config, asked: Asked) -> int:
    return sum(len(_units(config, arm, len(asked.parts))) for arm in asked.subjects)


def _problem(folder: RunFolder, subject: Subject, unit: Unit, parts: Sequence[np.ndarray]) -> str | None:
    """Why a unit is to be done, or None."""
    if unit.part is None:
        return None if read_explained(folder, subject) else "missing"
    return outcomes_problem(folder.part(unit.arm, unit.part), parts[unit.part], subject.of_outcomes)


def _measure(config: Config, asked: Asked, own: Sequence[Unit], rank: int) -> dict[Unit, Problem]:
    """Do units in a pool of processes; returns those that failed. Enough equal failures end it: the rest would too."""
    wanted, failed = config.evaluation, dict[Unit, Problem]()
    with progress("evaluate" if rank == 0 else f"evaluate, rank {rank}", len(own), "batches") as meter:

        def end(unit: Unit, problem: Problem | None) -> None:
            meter.advance()
            meter.note(f"{unit.arm} {'FAILED' if problem else ''}".rstrip())
            if problem:
                failed[unit] = problem

        def enough() -> bool:
            signatures = [problem.signature or problem.message for problem in failed.values()]
            return any(signatures.count(each) >= config.cluster.equal_errors for each in set(signatures))

        run_local(
            UnitTask(config, asked.subjects, rank), own, wanted.workers, wanted.threads, config.cluster.attempts,
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


def _finish(config: Config, folder: RunFolder, subject: Subject, parts: Sequence[np.ndarray]) -> None:
    """Publish an arm's result if all its units are there; a share that is not the last one finds some missing."""
    units = _units(config, subject.arm, len(parts))
    with exclusive(folder.results, PATIENCE_S):
        if _is_done(folder, subject):  # another share was the last one
            return
        missing = [unit for unit in units if _problem(folder, subject, unit, parts)]
        if missing:
            say(f"evaluate: {subject.arm}: {len(missing)} of {len(units)} batches and explanations are missing yet")
            return
        outcomes = join_outcomes([read_outcomes(folder.part(subject.arm, part)) for part in range(len(parts))])
        explained = read_explained(folder, subject) if config.evaluation.explained else None
        with publish(folder.outcomes(subject.arm)) as table:
            write_outcomes(table, outcomes)
        result = describe_result(config, folder, subject, outcomes, explained)
        write_json(folder.result(subject.arm), result)  # last: it says what the other files must be
        shutil.rmtree(folder.parts(subject.arm))
    worst = result["worst"]
    say(f"evaluate: {subject.arm}: {worst['right']} of {worst['of']} right under every attack: "
        f"{folder.result(subject.arm)}")  # fmt: skip


def _say_plan(config: Config, folder: RunFolder, asked: Asked) -> None:
    wanted = config.evaluation
    count, images = _count(config, asked), sum(map(len, asked.parts))
    say(f"run folder   {folder.path}")
    say(f"images       {images} in {len(asked.parts)} batches of at most {wanted.batch_size}")
    version = wanted.autoattack if isinstance(wanted.autoattack, str) else ", ".join(wanted.autoattack)
    say(f"attacks      {wanted.norm} {wanted.eps:.4g}: FGSM, {', '.join(pgd_names(wanted))}, AutoAttack: {version}")
    if wanted.curve:
        say(f"curve        {len(wanted.curve)} radii up to {wanted.curve[-1]:.4g}, the first {wanted.curve_images}")
    for arm in asked.subjects:
        left = sum(unit.arm == arm for unit in asked.missing)
        say(f"  {arm}: {len(_units(config, arm, len(asked.parts))) - left} units are there, {left} to do")
    if seconds := _seconds_a_batch(folder, asked):
        left = sum(unit.part is not None for unit in asked.missing)
        each = f"{duration(seconds, 1)} a batch, by those that are there"
        say(
            f"cost         {each}: about {duration(seconds * left / wanted.workers, 1)} with {wanted.workers} worker(s)"
        )
    elif count:
        say("cost         not known before a first batch is there")
    say("dry run: nothing was started or written")


def _seconds_a_batch(folder: RunFolder, asked: Asked) -> float | None:
    units = [Unit(arm, part) for arm in asked.subjects for part in range(len(asked.parts))]
    there = [unit for unit in units if not _problem(folder, asked.subjects[unit.arm], unit, asked.parts)]
    if not there:
        return None
    found = [read_outcomes(folder.part(unit.arm, unit.part or 0)) for unit in there]
    return sum(sum(each.seconds.values()) for each in found) / len(found)


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("evaluate"))
