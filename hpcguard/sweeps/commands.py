"""The hpcguard commands that made each cell, in their order."""

import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path

from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, command


def job_commands(folder: SweepFolder, graph: Graph) -> dict[str, str]:
    """By job, for those that were begun: with the configuration of its last attempt, and alone if it had company."""
    shown = shown_path(folder)
    files = {name: file for file in _by_age(folder) for name in _jobs_in(file)}
    return {
        name: shlex.join(["hpcguard", *command(shown / "configs" / files[name].name, [job])])
        for name, job in graph.jobs.items()
        if name in files
    }


def shown_path(folder: SweepFolder) -> Path:
    """As it was given, an absolute one cut down to its name: where it lay is nobody's business."""
    return Path(folder.path.name) if folder.path.is_absolute() else folder.path


def cell_commands(graph: Graph, known: Mapping[str, str]) -> list[list[str]]:
    """For every cell all that it builds on, then its own; a comment in the place of what was never begun."""
    place = {name: number for number, name in enumerate(graph.jobs)}
    return [
        [
            known.get(name, f"# {name}: not begun yet")
            for name in sorted(graph.before([cell.evaluate]), key=place.__getitem__)
        ]
        for cell in graph.cells
    ]


def _by_age(folder: SweepFolder) -> list[Path]:
    dated = [(file.stat().st_mtime_ns, file) for file in folder.path.glob("configs/*.yaml")]
    return [file for _, file in sorted(dated)]


def _jobs_in(file: Path) -> list[str]:
    """Names of the jobs that a configuration was written for: its first line is their command."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        words = lines.readline().removeprefix("# ").split()
    if words[1:3] == ["attribute", "consolidate"]:
        return [file.stem]
    return [f"{words[1]}-{arm}" for option, arm in itertools.pairwise(words) if option == "--arm"]
