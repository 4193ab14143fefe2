"""Progress of long work: a rich bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the user, at once even when stdout is a file."""
    print(text, flush=True)


class Meter:
    """How much of `total` is done; call advance(n), or note(text) to show something beside it."""

    def __init__(self, what: str, total: int, unit: str, bar: Progress | None) -> None:
        self.what, self.total, self.unit, self._bar = what, total, unit, bar
        self.done, self._note = 0, ""
        self._started = self._last_line = time.monotonic()
        self._task = bar.add_task(what, total=total, note="") if bar else None

    def advance(self, amount: int = 1) -> None:
        self.done += amount
        self._show()

    def set(self, done: int, note: str = "") -> None:
        self.done, self._note = done, note
        self._show()

    def note(self, text: str) -> None:
        self._note = text
        self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, note=self._note)
        elif now - self._last_line >= LINE_EVERY_S:
            self._last_line = now
            spent = now - self._started
            left = f", {spent / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            say(f"{self.what}: {self.done}/{self.total} {self.unit} after {spent:.0f} s{left}  {self._note}".rstrip())


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Meter]:
    """Show progress of `total` units of work while the block runs."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        yield Meter(what, total, unit, None)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Meter(what, total, unit, bar)
