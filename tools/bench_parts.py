"""What the benches share: their parts run one after the other, a table of figures, the machine and how busy it was."""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Figures = dict[str, float | None]
Part = Callable[[argparse.Namespace], Figures]


def run_parts(
    functions: Mapping[str, Part], parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> tuple[Figures, dict[str, float]]:
    """Figures of the parts that arguments.parts names, printed as they come, and the load of the machine by part."""
    figures: Figures = {}
    load: dict[str, float] = {}
    for part in arguments.parts.split(","):
        if part not in functions:
            parser.error(f"unknown part {part!r}: some of {', '.join(functions)}")
        print(f"{part}: {functions[part].__doc__}", flush=True)
        before = os.getloadavg()[0]
        for name, value in functions[part](arguments).items():
            figures[name] = value
            print(f"  {name:<34} {'not measured' if value is None else f'{value:.6g}'}", flush=True)
        load[part] = max(before, os.getloadavg()[0])
        print(f"  load of the machine {before:.1f} before, {os.getloadavg()[0]:.1f} after", flush=True)
    return figures, load


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} core{'s' if cores > 1 else ''}, {model}"


def in_turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each task by the clock, by round; one round before them to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    shuffled = random.Random(0)
    for number in range(-1, rounds):
        for name in shuffled.sample(list(tasks), len(tasks)):
            started = clock()
            tasks[name]()
            if number >= 0:
                seconds[name].append(clock() - started)
    return seconds


def ratio(upper: list[float], lower: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(upper, lower, strict=True))
