"""Show what a run folder holds: shards, store, arms, results, report.

Looks at manifests and names only, so it is quick on any run; `consolidate` is what verifies bytes. Unknown is shown as
unknown, never as done.
"""

import argparse
import json
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from hpcguard.cluster.plan import read_plan
from hpcguard.config import Config
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, read_json

EXAMPLE = ("python -m hpcguard.status runs/quickstart", "python -m hpcguard.status configs/quickstart.yaml --json")
SECTIONS = ("run",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(config: Config, arguments: argparse.Namespace) -> int:
    folder = RunFolder(config.run)
    if not folder.path.is_dir():
        raise InputError(f"run = {folder.path}: no such folder; `python -m hpcguard.attribute` makes it")
    state = {
        "run": str(folder.path),
        "shards": _shards(folder),
        "store": _store(folder),
        "arms": {arm: _arm(folder, arm) for arm in ["baseline", *config.arms()]},
        "report": str(folder.report) if folder.report.exists() else None,
    }
    if arguments.json:
        print(json.dumps(state))
    else:
        _show(state)
    return 0


def _shards(folder: RunFolder) -> dict[str, Any]:
    if not folder.plan.exists():
        return {"state": "not planned"}
    try:
        plan = read_plan(folder.plan)
    except InputError as error:
        return {"state": "unknown", "why": str(error)}
    missing = [k for k in range(plan.num_shards) if not (folder.manifest(k).exists() and folder.shard(k).exists())]
    done = plan.num_shards - len(missing)
    return {
        "state": "done" if not missing else "incomplete",
        "planned": plan.num_shards, "done": done, "missing": missing, "images": plan.num_images,
    }  # fmt: skip


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


def _show(state: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    shards, store = state["shards"], state["store"]
    counts = f", {shards['done']} of {shards['planned']} ({shards['images']} images)" if "planned" in shards else ""
    console.print(f"run     {state['run']}", highlight=False)
    console.print(f"shards  {shards['state']}{counts}{_why(shards)}", highlight=False)
    if shards.get("missing"):
        console.print(f"        missing: {', '.join(map(str, shards['missing'][:20]))}", highlight=False)
    console.print(f"store   {store['state']}{_why(store)}", highlight=False)
    table = Table("arm", "trained", "epochs", "accuracy", box=box.SIMPLE)
    for arm, row in state["arms"].items():
        accuracy = row["accuracy"]
        if isinstance(accuracy, dict):
            accuracy = ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
        table.add_row(arm, "yes" if row["trained"] else "no", str(row["epochs_done"]), accuracy or "not measured")
    console.print(table)
    console.print(f"report  {state['report'] or 'not written'}", highlight=False)


def _why(part: dict[str, Any]) -> str:
    return f": {part['why']}" if "why" in part else ""


if __name__ == "__main__":
    import sys

    from hpcguard.cli import run_stage

    sys.exit(run_stage("status"))
