"""What a training writes down as it goes: log.jsonl (epochs), steps.jsonl (some steps), TensorBoard events.

After a resume none holds a step twice: log.jsonl comes with the checkpoint, steps.jsonl is cut back to its step, and
the events are made anew from both.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from hpcguard.refinement.checkpoint import Progress
from hpcguard.runs import RunFolder, publish

Entry = dict[str, Any]
ALWAYS = ("step", "epoch", "time")  # keys of an entry that are no measurements


class TrainingLog:
    """The logs of one arm, for the first rank alone. `shares` of flagged segments stand in every epoch's line."""

    def __init__(self, folder: RunFolder, arm: str, done: Progress, shares: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and only here

        self._epochs, self._shares = folder.training_log(arm), {f"share_{name}": each for name, each in shares.items()}
        steps = _steps_until(folder.steps_log(arm), done.step)
        with publish(folder.steps_log(arm)) as temporary:
            temporary.write_text("".join(map(_line, steps)), encoding="utf-8")
        self._steps = folder.steps_log(arm).open("a", encoding="utf-8")
        shutil.rmtree(folder.events(arm), ignore_errors=True)
        self._events = SummaryWriter(str(folder.events(arm)))
        for entry in steps:
            self._show("steps", entry)
        for entry in done.log:
            self._show("epochs", entry)
        self._write_epochs(done.log)

    def step(self, entry: Entry) -> None:
        """Add a line to steps.jsonl."""
        self._steps.write(_line(entry))
        self._steps.flush()
        self._show("steps", entry)

    def epoch(self, log: list[Entry]) -> None:
        """Publish log.jsonl, whole at any time, with the last epoch's entry."""
        self._write_epochs(log)
        self._show("epochs", log[-1])

    def close(self) -> None:
        self._steps.close()
        self._events.close()

    def _write_epochs(self, log: list[Entry]) -> None:
        with publish(self._epochs) as temporary:
            temporary.write_text("".join(_line({**entry, **self._shares}) for entry in log), encoding="utf-8")

    def _show(self, group: str, entry: Entry) -> None:
        for name, value in entry.items():
            if name not in ALWAYS:
                self._events.add_scalar(f"{group}/{name}", value, entry["step"], walltime=entry["time"])


def _line(entry: Entry) -> str:
    return json.dumps(entry) + "\n"


def _steps_until(path: Path, step: int) -> list[Entry]:
    """Lines of steps.jsonl up to a step; a torn line, and what follows it, was written after any checkpoint's."""
    entries: list[Entry] = []
    if not path.exists():
        return entries
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            break
        entries.append(entry)
    return entries
