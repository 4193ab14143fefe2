"""Compare measured models: accuracies with intervals, and paired on the same images.

Reads RUN/results/ARM.json of any runs and, where they lie beside them, the per-image outcomes ARM.h5. Prints a table;
with --out writes it as comparison.csv, comparison.md and comparison.png. Every model is compared with the first, image
by image: the difference of accuracies with a 95% bootstrap interval, and McNemar's test. Results of other images, eps
or attacks are refused.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.reporting.arms import radius
from hpcguard.reporting.compare_results import (
    AGAIN,
    Measured,
    Outcomes,
    check_alike,
    check_outcomes,
    other_settings,
    paired_by_attack,
    parse_result,
)
from hpcguard.reporting.compare_tables import Pairs, accuracy_rows, comparison_csv, paired_rows
from hpcguard.reporting.tables import to_markdown, to_text
from hpcguard.runs import digest_file, publish, read_json

EXAMPLE = (
    "python -m hpcguard.compare runs/a/results/guided.json runs/a/results/pgd.json",
    "python -m hpcguard.compare runs/*/results/guided.json --out comparison",
)
SECTIONS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write CSV, Markdown and a plot there")


def run(paths: list[Path], arguments: argparse.Namespace) -> int:
    results = _named([_read(path) for path in paths], paths)
    if len(results) < 2:
        raise InputError(f"{paths[0]}: compared with what? give two results or more")
    check_alike(results)
    first = results[0]
    pairs: Pairs = {other.arm.name: found for other in results[1:] if (found := paired_by_attack(first, other))}
    notes = _notes(results, pairs)
    say(to_text(accuracy_rows(results)).rstrip())
    if pairs:
        say("\n" + to_text(paired_rows(first.arm.name, pairs)).rstrip())
    for note in notes:
        say(f"note: {note}")
    if arguments.out:
        _write(arguments.out, results, pairs, notes)
        say(f"compare: {arguments.out}/comparison.md")
    return 0


def _read(path: Path) -> Measured:
    try:
        values = read_json(path, AGAIN)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise InputError(f"{path}: damaged, not JSON that can be read ({type(error).__name__}); {AGAIN}") from error
    result = parse_result(values, str(path))
    result = replace(result, outcomes=_outcomes(path.with_suffix(".h5"), result.arm.result["outcomes_sha256"]))
    check_outcomes(result)
    return result


def _outcomes(path: Path, digest: str | None) -> Outcomes | None:
    if not path.exists():
        return None
    if digest is not None and digest != digest_file(path):
        raise InputError(f"{path}: not the per-image outcomes that the result beside it was made of; {AGAIN}")
    from hpcguard.store.outcomes import read_outcomes  # brings torch, which results alone can do without

    return read_outcomes(path)


def _named(results: list[Measured], paths: list[Path]) -> list[Measured]:
    """With names that tell them apart: the arm's, or RUN/arm."""
    places = [path.resolve() for path in paths]
    for path in paths:
        if places.count(path.resolve()) > 1:
            raise InputError(f"{path}: given twice; name each result once")
    arms = [one.arm.name for one in results]
    longer = [f"{_run_name(place)}/{arm}" for place, arm in zip(places, arms, strict=True)]
    names = [long if arms.count(arm) > 1 else arm for arm, long in zip(arms, longer, strict=True)]
    names = [f"{name}#{number}" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]
    return [replace(one, arm=replace(one.arm, name=name)) for one, name in zip(results, names, strict=True)]


def _run_name(path: Path) -> str:
    folder = path.parent.parent if path.parent.name == "results" else path.parent
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in folder.name)


def _notes(results: list[Measured], pairs: Pairs) -> list[str]:
    notes = [
        f"{one.arm.name} is not to be trusted: {', '.join(one.red)} (red alarms)" for one in results if not one.trusted
    ]
    without = [one.arm.name for one in results if one.outcomes is None]
    if without:
        notes.append(f"no per-image outcomes beside the result of {', '.join(without)}: not compared image by image")
    if len(pairs) > 1:
        notes.append("McNemar's p values are of each comparison by itself, not corrected for their number")
    return notes + other_settings(results)


def _write(folder: Path, results: list[Measured], pairs: Pairs, notes: list[str]) -> None:
    from hpcguard.reporting.plots import accuracy_figure  # matplotlib takes a second, which the table need not wait for

    first = results[0]
    parts = [
        f"# {', '.join(one.arm.name for one in results)}",
        f"{first.arm.attacks['clean']['of']} {first.arm.split} images, eps {radius(first.arm.evaluation)}. "
        "Accuracy with Wilson's 95% interval.",
        to_markdown(accuracy_rows(results)).rstrip(),
    ]
    if pairs:
        parts.append(
            f"On the same images: accuracy less that of {first.arm.name} with a 95% bootstrap interval, images that "
            "only one of the two gets right, and McNemar's test (exact, mid-p)."
        )
        parts.append(to_markdown(paired_rows(first.arm.name, pairs)).rstrip())
    parts += [f"- {note}" for note in notes]
    contents = {
        "comparison.png": accuracy_figure([one.arm for one in results]),
        "comparison.csv": comparison_csv(results, pairs).encode(),
        "comparison.md": ("\n\n".join(parts) + "\n").encode(),
    }
    for name, content in contents.items():
        with publish(folder / name) as temporary:
            temporary.write_bytes(content)


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("compare"))
