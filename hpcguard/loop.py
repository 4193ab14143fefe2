"""The closed loop: explain, refine with the explanations, explain the refined model, and so on.

Each round is a run folder of its own, RUN/round-1, RUN/round-2, ..., with the configuration RUN/round-N.yaml: it
attributes the model of the round before, consolidates, trains the guided arm from those weights, and evaluates it.
Ends after loop.rounds, when validation robust accuracy gains nothing, or when the flagged segments no longer move.
Killed or interrupted, the same command goes on. With cluster.executor=slurm a round is a chain of jobs, the last of
which comes back here; this command then returns at once. Controls are for plain runs. Writes RUN/loop.json.
"""

import argparse
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hpcguard.cluster.lifetime import owned_environment
from hpcguard.config import Config, LoopConfig, load_config
from hpcguard.data import load_images
from hpcguard.errors import InputError
from hpcguard.metrics.attribution import mean_set_jaccard
from hpcguard.progress import say
from hpcguard.refinement.spurious import flag_segments
from hpcguard.runs import LoopFolder, RunFolder, differences, exclusive, publish, read_json, write_json
from hpcguard.store import AttributionDataset, read_store_manifest

EXAMPLE = (
    "python -m hpcguard.loop configs/quickstart.yaml run=runs/loop loop.rounds=3",
    "python -m hpcguard.loop configs/quickstart.yaml run=runs/loop --dry-run",
)
SECTIONS = ("data", "model", "attribution", "cluster", "baseline", "refinement", "evaluation", "loop")
STAGES = ("attribute", "consolidate", "refine", "evaluate", "report")


@dataclass(frozen=True)
class Round:
    """What a finished round gave."""

    number: int
    weights: str
    validation_clean: float | None
    validation_robust: float | None
    spurious: dict[str, float]  # shares: flagged segments and area, images with empty and with full masks
    jaccard: float | None  # of its flagged segments with those of the round before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; do nothing")


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = LoopFolder(config.run)
    _check(config)
    if arguments.dry_run:
        return _dry_run(config, folder)
    folder.create()
    with exclusive(folder.path):
        return _go_on(config, folder)


def _check(config: Config) -> None:
    if config.loop.min_gain is not None and config.loop.rounds > 1 and not config.data.validation:
        raise InputError(
            "loop.min_gain needs images to measure it on: set data.validation, for example 0.02, or loop.min_gain=null"
        )
    if not config.refinement.guided:
        raise InputError("refinement uses no explanations: set masking.weight or sensitivity.weight above 0")


def _go_on(config: Config, folder: LoopFolder) -> int:
    """Do what is missing of every round, one after the other, until one of the reasons to stop holds."""
    for number in range(1, config.loop.rounds + 1):
        _check_same(folder.round_config(number), round_config(config, folder, number))
    _write_yaml(folder.config, config.model_dump(mode="json"))
    rounds: list[Round] = []
    while not (reason := stop_reason(rounds, config.loop)):
        number = len(rounds) + 1
        own = round_config(config, folder, number)
        _write_yaml(folder.round_config(number), own.model_dump(mode="json"))
        on_slurm = config.cluster.executor == "slurm"
        if not (on_slurm and _is_done(own)):
            say(f"== round {number} of at most {config.loop.rounds}: {own.run}")
            if status := _do(own, folder.round_config(number), number):
                say(f"loop: round {number} stopped with exit status {status}; the same command goes on from there")
                return status
            if on_slurm:
                say(f"loop: round {number} is in Slurm's queue; its last job goes on with the loop")
                return 0
        rounds.append(_measure(own, rounds, folder))
        write_json(folder.record, {"rounds": [asdict(each) for each in rounds], "stopped": None})
    write_json(folder.record, {"rounds": [asdict(each) for each in rounds], "stopped": reason})
    _stage(["report", str(folder.round_config(len(rounds)))])  # now with all rounds
    for line in table(rounds):
        say(line)
    say(f"loop: {reason}; best: {best(rounds).weights}")
    return 0


def _check_same(path: Path, own: Config) -> None:
    """InputError if a round was done with other settings; of one that is not done, its stages look to that."""
    if not path.is_file() or not RunFolder(own.run).weights("guided").is_file():
        return
    begun = load_config(path)
    for name in ("data", "model", "attribution", "baseline", "refinement", "evaluation"):
        before, now = getattr(begun, name), getattr(own, name)
        if changed := differences(before.identity() if before else {}, now.identity() if now else {}):
            raise InputError(
                f"{path}: that round was done with other settings: {name}.{changed}; restore them, or change run"
            )


def round_config(config: Config, folder: LoopFolder, number: int) -> Config:
    """The configuration of one round: the same but for its folder, its start, and what follows it on Slurm."""
    values = config.model_dump(mode="json")
    values |= {"run": str(folder.round(number)), "controls": {}}
    if number > 1:
        values["model"]["weights"] = str(RunFolder(folder.round(number - 1)).weights("guided"))
        values["baseline"] = None
        values["refinement"]["seed"] += number - 1  # another order and other attack noise
    if config.cluster.executor == "slurm":
        values["cluster"]["slurm"] |= {
            "then": ["refine", "evaluate", "report"], "next": str(folder.config), "next_stage": "loop",
        }  # fmt: skip
    return Config.model_validate(values)


def _do(own: Config, path: Path, number: int) -> int:
    """A round's stages, in one process; what is done they find done."""
    if own.cluster.executor == "slurm":
        if own.baseline is not None and not RunFolder(own.run).weights("baseline").is_file():
            raise InputError(
                f"{RunFolder(own.run).weights('baseline')}: train the model to be explained first: "
                f"sbatch slurm/refine.sh {path} --arm baseline"
            )
        return _stage(["attribute", str(path)])
    if number == 1 and own.baseline is not None and (status := _stage(["refine", str(path), "--arm", "baseline"])):
        return status
    return _stage([*STAGES, str(path)])


def _stage(command: list[str]) -> int:
    """Run stages in a process of their own, which is told what we are told: it saves first."""
    process = subprocess.Popen([sys.executable, "-m", "hpcguard", *command], env=owned_environment())
    passed_on = (signal.SIGTERM, signal.SIGUSR2)
    before = {each: signal.signal(each, lambda number, _: process.send_signal(number)) for each in passed_on}
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the terminal has told it too: it may end in order, until a second Ctrl-C
        process.wait()
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return status if status >= 0 else 128 - status


def _is_done(own: Config) -> bool:
    folder = RunFolder(own.run)
    return folder.weights("guided").is_file() and folder.result("guided").is_file()


def _measure(own: Config, before: list[Round], folder: LoopFolder) -> Round:
    number = len(before) + 1
    this = RunFolder(own.run)
    training = read_json(
        this.training("guided"), f"delete {this.checkpoint('guided')} to train it again", chosen=dict, spurious=dict
    )
    flagged = flagged_segments(own)
    jaccard = None
    if before:
        former = flagged_segments(load_config(folder.round_config(number - 1)))
        jaccard = mean_set_jaccard(*_of_the_same_images(former, flagged))
    entry = training["chosen"]
    return Round(
        number, str(this.weights("guided")), entry.get("validation_clean"), entry.get("validation_robust"),
        training["spurious"], jaccard,
    )  # fmt: skip


def flagged_segments(own: Config) -> tuple[np.ndarray, np.ndarray]:
    """Image ids [N] and flagged segments [N, S] of a round."""
    store = RunFolder(own.run)
    images = load_images(own.data, "train")
    left_out = read_store_manifest(store.store_manifest).get("quarantined", [])
    images = images.subset(images.ids[~np.isin(images.ids, left_out)])
    rows = AttributionDataset(store.store, images, (), False).rows
    return images.ids, flag_segments(rows, own.refinement.spurious, own.refinement.seed)


def _of_the_same_images(
    one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Flagged segments of the images that are in both, equally wide: a quarantined image is in neither."""
    _, first, second = np.intersect1d(one[0], other[0], return_indices=True)
    width = max(one[1].shape[1], other[1].shape[1])
    wide = [np.pad(each, ((0, 0), (0, width - each.shape[1]))) for each in (one[1][first], other[1][second])]
    return wide[0], wide[1]


def stop_reason(rounds: list[Round], settings: LoopConfig) -> str | None:
    """Why no further round is to be done after these, or None."""
    if not rounds:
        return None
    last = rounds[-1]
    if settings.max_jaccard is not None and last.jaccard is not None and last.jaccard >= settings.max_jaccard:
        return f"the flagged segments of round {last.number} are those before (Jaccard {last.jaccard:.3f})"
    earlier = [each.validation_robust for each in rounds[:-1] if each.validation_robust is not None]
    if settings.min_gain is not None and earlier and last.validation_robust is not None:
        gain = last.validation_robust - max(earlier)
        if gain <= settings.min_gain:
            return f"round {last.number} gains {gain:+.3f} of validation robust accuracy"
    if len(rounds) >= settings.rounds:
        return f"all {settings.rounds} rounds are done"
    return None


def best(rounds: list[Round]) -> Round:
    """The round of highest robust accuracy on the validation split, the first of equals; else the last."""
    measured = [each for each in rounds if each.validation_robust is not None]
    return max(measured, key=lambda each: (each.validation_robust, -each.number)) if measured else rounds[-1]


def table(rounds: list[Round]) -> list[str]:
    def number(value: float | None) -> str:
        return f"{'-':>9}" if value is None else f"{value:9.3f}"

    lines = ["round   flagged   Jaccard     clean    robust   (clean and robust on the validation split)"]
    for each in rounds:
        values = (each.spurious["flagged"], each.jaccard, each.validation_clean, each.validation_robust)
        lines.append(f"{each.number:5d} " + " ".join(number(value) for value in values))
    return lines


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    with publish(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _dry_run(config: Config, folder: LoopFolder) -> int:
    for number in range(1, config.loop.rounds + 1):
        own = round_config(config, folder, number)
        start = own.model.weights or "its baseline, trained first"
        say(f"round {number}{' (done)' if _is_done(own) else ''}: {own.run}, explains and refines {start}")
    say("dry run: nothing was started or written; for one round's cost: hpcguard attribute CONFIG --dry-run")
    return 0


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("loop"))
