"""Write what a run shows as one HTML page, tables and figures; computes nothing anew.

Reads RUN/results, the checkpoints' training.json and log.jsonl, store.json, and of a round the loop's loop.json, as far
as they are there. Writes RUN/report/index.html (self-contained), results.md, and every figure as a PNG with its
numbers as a CSV. Arms that were measured with different settings are refused, not mixed. Of a sweep's folder: its
tables (table.csv, .h5, .md, .tex) and report/ with means over seeds, differences from the control, main effects, the
Pareto front, cost, and every cell's commands.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpcguard.config import Config
from hpcguard.data import ImageSet, load_images
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.reporting.arms import (
    Arm,
    check_comparable,
    check_result,
    check_rounds,
    check_store,
    check_training,
    parse_log,
    radius,
)
from hpcguard.reporting.html import render_page, without_machine_paths
from hpcguard.reporting.measures import (
    alarm_table,
    bound_table,
    claim_picture,
    claim_table,
    corruption_picture,
    corruption_rows,
    corruption_summary,
    curve_picture,
    paired_table,
    quality_table,
)
from hpcguard.reporting.pictures import (
    Picture,
    accuracy_picture,
    explanation_pictures,
    rounds_picture,
    training_picture,
)
from hpcguard.reporting.summary import cautions, summarise
from hpcguard.reporting.tables import (
    attribution_table,
    cost_table,
    hardware_table,
    loss_table,
    result_table,
    rounds_table,
    stability_table,
    to_markdown,
    to_text,
    training_table,
)
from hpcguard.runs import LoopFolder, RunFolder, differences, digest_file, publish, read_json
from hpcguard.store import open_rows, read_table
from hpcguard.store.schema import rows_problem
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.report import write_report

EXAMPLE = (
    "python -m hpcguard.report runs/quickstart",
    "python -m hpcguard.report configs/quickstart.yaml",
    "python -m hpcguard.report runs/sweeps/components_small",
)
SECTIONS = ("data", "evaluation", "controls")
OWN = (
    "accuracy",
    "curve",
    "corruptions",
    "vulnerability",
    "training",
    "rounds",
    "explanation_",
)  # how the pictures' names begin
EVALUATE = "run `python -m hpcguard.evaluate` again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options beside the common ones."""


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    names = [name for name in ("baseline", *config.arms()) if folder.result(name).exists()]
    _say_left_out(config, folder, names)
    if not names:
        command = f"python -m hpcguard.evaluate {arguments.config}"
        raise InputError(f"{folder.results}: no results yet; run `{command}` first")
    arms = [_read_arm(config, folder, name) for name in names]
    check_comparable(arms)
    store = _read_store(folder)
    warnings = [*cautions(arms, store), *_changed_settings(config, arms)]
    table = result_table(arms)
    page, pictures = _page(config, arms, store, _read_rounds(folder), warnings)
    folder.create()
    numbers = {picture.csv_name: picture.csv for picture in pictures}
    texts = {**numbers, "results.md": _markdown(config, arms, warnings), folder.report.name: render_page(page)}
    _publish(folder, {picture.name: picture.png for picture in pictures}, texts)
    say(to_text(table).rstrip())
    for warning in warnings:
        say(f"note: {warning}")
    say(f"report: {folder.report}")
    return 0


def run_sweep(path: Path, arguments: argparse.Namespace) -> int:
    """The same for a sweep's folder, as far as it is done."""
    if arguments.overrides:
        raise InputError(f"{arguments.overrides[0]}: a sweep's report has no keys; `hpcguard sweep` takes them")
    write_report(SweepFolder(path))
    return 0


def _say_left_out(config: Config, folder: RunFolder, names: list[str]) -> None:
    for path in sorted(folder.results.glob("*.json")):
        if path.stem not in names:
            say(f"report: {path} is left out: {path.stem} is no arm of this configuration")
    for name in ("baseline", *config.arms()):
        if names and name not in names:
            say(f"report: {name} is not measured yet")


def _read_arm(config: Config, folder: RunFolder, name: str) -> Arm:
    result = read_json(folder.result(name), EVALUATE)
    check_result(result, name, str(folder.result(name)))
    training, log, rows = None, [], None
    # With model.weights set, the baseline was trained elsewhere, whatever else lies in checkpoints/baseline.
    if folder.training(name).exists() and not (name == "baseline" and config.model.weights):
        training = read_json(folder.training(name), "run `python -m hpcguard.refine` again")
        check_training(training, str(folder.training(name)))
        log = _read_log(folder.training_log(name))
    if result["identity"]["evaluation"].get("explained"):
        rows = _read_explanations(folder.explanations(name))
    tables = _read_tables(folder, name, result)
    outcomes = {key.removeprefix("right/"): each for key, each in tables.pop("attacks", {}).items() if "/" in key}
    return Arm(name, result, training, log, rows, outcomes, tables)


def _read_tables(folder: RunFolder, name: str, result: Mapping[str, Any]) -> dict[str, Mapping[str, np.ndarray]]:
    """Figures image by image of each kind that the result names, columns by name; those that are still there."""
    named = {"attacks": result.get("outcomes_sha256"), **result.get("tables_sha256", {})}
    found: dict[str, Mapping[str, np.ndarray]] = {}
    for kind, digest in named.items():
        path = folder.figures(name, kind)
        if digest is None or not path.exists():
            continue
        if digest_file(path) != digest:
            raise InputError(f"{path}: not what {folder.result(name)} was made of; delete it and {EVALUATE}")
        found[kind] = read_table(path).columns
    return found


def _read_explanations(path: Path) -> dict[str, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path}: not there; {EVALUATE}")
    rows = open_rows(path)
    if problem := rows_problem(rows):
        raise InputError(f"{path}: damaged, {problem}; delete it and {EVALUATE}")
    return rows


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        return parse_log(path.read_text(encoding="utf-8"), str(path)) if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); delete it to leave the curves out") from error


def _read_store(folder: RunFolder) -> dict[str, Any] | None:
    if not folder.store_manifest.exists():
        return None
    store = read_json(folder.store_manifest, "run `python -m hpcguard.consolidate` again")
    check_store(store, str(folder.store_manifest))
    return store


def _read_rounds(folder: RunFolder) -> list[dict[str, Any]]:
    """The loop's rounds, if the run is one of them."""
    record = LoopFolder(folder.path.resolve().parent).record
    if not folder.path.resolve().name.startswith("round-") or not record.exists():
        return []
    loop = read_json(record, "run `python -m hpcguard.loop` again")
    check_rounds(loop, str(record))
    return list(loop["rounds"])


def _changed_settings(config: Config, arms: list[Arm]) -> list[str]:
    """Where the arms were made with other settings than the configuration that the page shows."""
    notes = []
    for arm in arms:
        wanted = config.evaluation.identity()
        if changed := differences(arm.evaluation, wanted):
            notes.append(f"{arm.name} was measured with other settings than this configuration: {changed}.")
        if arm.training and (arm.name != "baseline" or config.baseline is not None):
            now = config.arm(arm.name).identity()
            if changed := differences(arm.training["identity"]["training"], now):
                notes.append(f"{arm.name} was trained with other settings than this configuration: {changed}.")
    return notes


def _page(
    config: Config, arms: list[Arm], store: dict[str, Any] | None, rounds: list[dict[str, Any]], warnings: list[str]
) -> tuple[dict[str, Any], list[Picture]]:
    """What the template needs, and all pictures in it."""
    accuracy, curves, explained = accuracy_picture(arms), training_picture(arms), _explanations(config, arms)
    by_round = rounds_picture(rounds) if rounds else None
    by_radius, corrupted, claim = curve_picture(arms), corruption_picture(arms), claim_picture(arms)
    values = {
        "title": config.run.resolve().name,
        "subject": _subject(config, arms),
        "summary": summarise(arms),
        "cautions": warnings,
        "results": result_table(arms),
        "accuracy": accuracy,
        "eps": radius(arms[0].evaluation),
        "norm": "L2" if arms[0].evaluation.get("norm") == "l2" else "L∞",
        "paired": paired_table(arms),
        "alarms": alarm_table(arms),
        "by_radius": by_radius,
        "corruptions": corruption_summary(arms, config.evaluation.corruptions.reference),
        "corrupted": corrupted,
        "each_corruption": corruption_rows(arms),
        "quality": quality_table(arms),
        "claim": claim,
        "claims": claim_table(arms),
        "bound": bound_table(arms),
        "explanations": explained,
        "stability": stability_table(arms),
        "training": training_table(arms),
        "losses": loss_table(arms),
        "curves": curves,
        "rounds": rounds_table(rounds) if rounds else None,
        "by_round": by_round,
        "cost": cost_table(arms, store),
        "attribution": attribution_table(store) if store else None,
        "commands": _commands(config, arms, store),
        "hardware": hardware_table(arms),
        "settings": yaml.safe_dump(without_machine_paths(config.model_dump(mode="json")), sort_keys=False),
    }
    return values, [accuracy, *filter(None, [by_radius, corrupted, claim, curves, by_round]), *explained]


def _subject(config: Config, arms: list[Arm]) -> str:
    result, eps = arms[0].result, radius(arms[0].evaluation)
    model = result["identity"].get("model", {}).get("name", config.model.name)
    return f"{model} on {config.data.name}, {result['images']} {arms[0].split} images, eps {eps}"


def _explanations(config: Config, arms: list[Arm]) -> list[Picture]:
    """A picture for every explained test image, the same ones for all arms."""
    first = arms[0].explanations
    if first is None:
        return []
    test = load_images(config.data, config.evaluation.split)
    for arm in arms:
        _check_rows(arm, first, test)
    return explanation_pictures(arms, test.images(first["image_id"]), test.classes)


def _check_rows(arm: Arm, first: dict[str, np.ndarray], test: ImageSet) -> None:
    """The rows must be those of the other arms and of the images in hand."""
    rows = arm.explanations
    if rows is None or not np.array_equal(rows["image_id"], first["image_id"]):
        raise InputError(f"the explanations of arm {arm.name} are of other images than the rest; {EVALUATE}")
    fits = rows["segments"].shape[1:] == test.shape[1:] and rows["predicted"].max(initial=0) < len(test.classes)
    if not fits or not np.array_equal(rows["label"], test.labels_of(rows["image_id"])):
        raise InputError(f"the explanations of arm {arm.name} do not fit this configuration's data; {EVALUATE}")


def _commands(config: Config, arms: list[Arm], store: dict[str, Any] | None) -> list[str]:
    """The stages that made what the page shows, in their order, into a fresh folder beside this one."""
    source = config.run.resolve().name if config.run.is_absolute() or not config.run.name else str(config.run)
    trained = [arm.name for arm in arms if arm.training]
    stages = ["refine --arm baseline"] if "baseline" in trained else []
    stages += ["attribute", "consolidate"] if store else []
    stages += ["refine"] if set(trained) - {"baseline"} else []
    stages += ["evaluate", "report"]
    words = [stage.partition(" ") for stage in stages]
    return [
        f"python -m hpcguard.{stage} {shlex.quote(source)} {shlex.quote(f'run={source}-repeat')} {option}".rstrip()
        for stage, _, option in words
    ]


def _markdown(config: Config, arms: list[Arm], warnings: list[str]) -> str:
    parts = [f"# {config.run.resolve().name}", _subject(config, arms) + ".", " ".join(summarise(arms))]
    parts += [f"- {warning}" for warning in warnings]
    parts.append(to_markdown(result_table(arms)).rstrip())
    parts.append("Accuracy with Wilson's 95% interval. One training run an arm.")
    return "\n\n".join(parts) + "\n"


def _publish(folder: RunFolder, images: dict[str, bytes], texts: dict[str, str]) -> None:
    """Publish all files, the page last, and remove those of an earlier report that are not in this one."""
    for name, content in {**images, **{name: text.encode() for name, text in texts.items()}}.items():
        with publish(folder.report.with_name(name)) as temporary:
            temporary.write_bytes(content)
    names = {*images, *texts}
    for old in folder.report.parent.iterdir():
        if old.name.startswith(OWN) and old.suffix in (".png", ".csv") and old.name not in names:
            old.unlink()


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("report"))
