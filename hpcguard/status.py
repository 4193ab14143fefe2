"""Show what a run folder holds and what runs of it: shards, jobs, failures, speed, store, arms, report.

Looks at manifests, records and Slurm's queue only, so it is quick on any run, from any shell that sees the folder;
`consolidate` is what verifies bytes. Unknown is shown as unknown, never as done.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from hpcguard.cluster.evidence import Watcher, log_tail
from hpcguard.cluster.overview import UNKNOWN, shard_states, summarise
from hpcguard.cluster.plan import read_plan
from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.reporting.terminal import draw, one_line
from hpcguard.runs import RunFolder, read_json
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.overview import follow, lines, overview

EXAMPLE = (
    "python -m hpcguard.status runs/quickstart",
    "python -m hpcguard.status runs/quickstart --watch",
    "python -m hpcguard.status configs/quickstart.yaml --json",
    "python -m hpcguard.status runs/sweeps/components_small",
)
SECTIONS = ("run",)
WATCH_S = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    how.add_argument(
        "--watch", nargs="?", type=_seconds, const=WATCH_S, metavar="SECONDS",
        help=f"look again every so many seconds (default {WATCH_S:g}) until nothing runs, or Ctrl-C",
    )  # fmt: skip


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: write seconds from 0.1 to 86400, or RUN before --watch")
    return seconds


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    if not folder.path.is_dir():
        raise InputError(f"run = {folder.path}: no such folder; `python -m hpcguard.attribute` makes it")
    watcher = Watcher(folder)
    if arguments.watch:
        state = _watch(config, watcher, arguments.watch)
    else:
        state = _look(config, watcher)
    if arguments.json:
        print(json.dumps(state))
    else:
        Console(soft_wrap=True, highlight=False).print(draw(state))
    return 0


def run_sweep(path: Path, arguments: argparse.Namespace) -> int:
    """The same for a sweep's folder: its cells and jobs, as it was last started."""
    try:
        state = follow(SweepFolder(path), arguments.watch) if arguments.watch else overview(SweepFolder(path))
    except KeyboardInterrupt:
        state = overview(SweepFolder(path))
    if arguments.json:
        print(json.dumps(state))
    else:
        for line in lines(state):
            say(line)
    return 0


def _look(config: Config, watcher: Watcher) -> dict[str, Any]:
    folder = watcher.folder
    state: dict[str, Any] = {"run": str(folder.path), **_shards(watcher)}
    for example in state.get("failing", ()):
        if example["log"] and not example["tail"]:  # a killed process leaves no traceback
            log = (folder.path / example["log"]).resolve()
            if log.is_relative_to(folder.path.resolve()):  # a record may say anything
                example["tail"] = log_tail(log)
    return {
        **state,
        "store": _store(folder),
        "arms": {arm: _arm(folder, arm) for arm in ["baseline", *config.arms()]},
        "report": str(folder.report) if folder.report.exists() else None,
    }


def _watch(config: Config, watcher: Watcher, seconds: float) -> dict[str, Any]:
    """Show the run until nothing of it runs; the last state."""
    console = Console(highlight=False)
    state = _look(config, watcher)
    idle = 0
    try:
        with Live(draw(state), console=console, auto_refresh=False, transient=True, screen=False) as live:
            said = ""
            while True:
                idle = idle + 1 if _rests(state) else 0
                if console.is_terminal:
                    live.update(draw(state), refresh=True)
                elif said != (line := one_line(state)):
                    say(f"{time.strftime('%H:%M:%S')} {line}")
                    said = line
                # Between two shards a local run may hold no lock for a moment.
                if idle > 1 or (idle and state["shards"]["state"] != "incomplete"):
                    return state
                time.sleep(seconds)
                state = _look(config, watcher)
    except KeyboardInterrupt:
        return state


def _rests(state: dict[str, Any]) -> bool:
    """Whether nothing of the run is running or queued, as far as that is known."""
    if "progress" not in state:
        return True
    return state["progress"]["running"] == 0 and state["slurm"]["jobs_in_queue"] == 0


def _shards(watcher: Watcher) -> dict[str, Any]:
    if not watcher.folder.plan.exists():
        return {"shards": {"state": "not planned"}}
    try:
        evidence = watcher.look()
    except InputError as error:
        return {"shards": {"state": UNKNOWN, "why": str(error)}}
    states = shard_states(evidence)
    missing = [index for index, state in states.items() if state != "done"]
    shards = {
        "state": "incomplete" if missing else "done",
        "planned": len(states), "done": len(states) - len(missing), "missing": missing,
        "images": evidence.plan.num_images,
    }  # fmt: skip
    return {"shards": shards, **summarise(evidence)}


def _store(folder: RunFolder) -> dict[str, Any]:
    if not folder.store.exists():
        return {"state": "not there"}
    try:
        recorded = read_json(folder.store_manifest, "run consolidate again", fingerprint=str, statistics=dict)
        fits = recorded["fingerprint"] == read_plan(folder.plan).fingerprint
    except (InputError, KeyError) as error:
        return {"state": "unknown", "why": str(error)}
    return {"state": "done" if fits else "of another plan", **recorded["statistics"]}


def _arm(folder: RunFolder, arm: str) -> dict[str, Any]:
    state: dict[str, Any] = {"trained": folder.weights(arm).exists(), "epochs_done": 0, "accuracy": None}
    try:
        lines = folder.training_log(arm).read_text(encoding="utf-8").splitlines()
        state["epochs_done"] = json.loads(lines[-1])["epoch"] if lines else 0
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError):
        state["epochs_done"] = "unknown"
    if folder.result(arm).exists():
        try:
            attacks = read_json(folder.result(arm), "run evaluate again", attacks=dict)["attacks"]
            state["accuracy"] = {name: float(row["accuracy"]) for name, row in attacks.items()}
        except (InputError, KeyError, TypeError, ValueError) as error:
            state["accuracy"] = f"unknown: {error}"
    return state


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("status"))
