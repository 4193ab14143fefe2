"""Progress of long work: a rich bar on a terminal, plain lines elsewhere."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


def say(text: str) -> None:
    """One line for the user, at once even when stdout is a file."""
    print(text, flush=True)


def duration(seconds: float, digits: int = 0) -> str:
    """Seconds as a person says them; below 100 with so many digits behind the point."""
    if seconds < 100:
        return f"{seconds:.{digits}f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Meter:
    """How much of `total` is done; call advance(n) or set(done, note), or note(text) to show something beside it."""

    def __init__(self, what: str, total: int, unit: str, even: bool, bar: Progress | None) -> None:
        self.what, self.total, self.unit, self._even, self._bar = what, total, unit, even, bar
        self.done, self._note, self._first = 0, "", None if even else 0
        self._started = time.monotonic()
        self._task = bar.add_task(what, total=total, note="") if bar else None

    def advance(self, amount: int = 1) -> None:
        self.set(self.done + amount, self._note)

    def note(self, text: str) -> None:
        self.set(self.done, text)

    def set(self, done: int, note: str = "") -> None:
        if self._first is None and done > 0:
            self._first = done - 1 if done > 1 else 0
        self.done, self._note = done, note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, note=note)

    def line(self) -> str:
        """The state in one line, for where there is no terminal."""
        spent = time.monotonic() - self._started
        new = self.done - (self._first or 0)  # a resumed job does not do all of it now
        left = f", about {spent / new * (self.total - self.done):.0f} s left" if new > 0 and self._even else ""
        return f"{self.what}: {self.done}/{self.total} {self.unit} after {spent:.0f} s{left}  {self._note}".rstrip()


@contextmanager
def progress(what: str, total: int, unit: str, even: bool = True) -> Iterator[Meter]:
    """Show progress of `total` units of work while the block runs; the time left too if units cost about the same."""
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        with _lines(Meter(what, total, unit, even, None)) as meter:
            yield meter
        return
    columns = [
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(),
        *([TimeRemainingColumn()] if even else []), TextColumn("{task.fields[note]}"),
    ]  # fmt: skip
    with Progress(*columns, console=console) as bar:
        yield Meter(what, total, unit, even, bar)


@contextmanager
def _lines(meter: Meter) -> Iterator[Meter]:
    """A line every LINE_EVERY_S, also while nothing finishes: silence looks like a hang."""
    ended = threading.Event()

    def speak() -> None:
        while not ended.wait(LINE_EVERY_S):
            say(meter.line())

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        ended.set()
        thread.join()
