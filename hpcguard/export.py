"""Copy rows of a store into one file that needs no hpcguard: OUT.npz for NumPy, or OUT.h5, plain HDF5.

Without --images and --labels all rows; with both, the rows that fit both. docs/store.md says what the columns are and
how to read them from C, Julia and MATLAB. Digests of the store are not checked; `hpcguard inspect --verify` does.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from hpcguard.errors import InputError
from hpcguard.progress import say
from hpcguard.store import rows_of, write_npz, write_plain
from hpcguard.stored import Stored, find_store

EXAMPLE = (
    "python -m hpcguard.export runs/quickstart all.h5",
    "python -m hpcguard.export runs/quickstart/store.h5 some.npz --images 3,17,100-199",
    "python -m hpcguard.export runs/quickstart cats.h5 --labels cat,5",
)
SECTIONS = ("data",)
WRITERS = {".npz": write_npz, ".h5": write_plain, ".hdf5": write_plain}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", type=Path, metavar="OUT", help="OUT.npz or OUT.h5; must not be there yet")
    parser.add_argument("--images", metavar="IDS", help="image ids and ranges of them: 3,17,100-199")
    parser.add_argument("--labels", metavar="LABELS", help="true classes, by name or number: cat,5")


def run(source: Path, arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.suffix not in WRITERS:
        raise InputError(f"OUT = {out}: {out.suffix or 'no'} ending; one of {', '.join(WRITERS)}")
    if out.exists():
        raise InputError(f"OUT = {out}: is there already; remove it, or name another file")
    stored = find_store(source, arguments.overrides)
    classes = stored.classes()
    rows = np.arange(len(stored.reader))
    if arguments.images is not None:
        rows = _rows_of_images(stored, arguments.images)
    if arguments.labels is not None:
        wanted = _labels(arguments.labels, classes)
        rows = rows[np.isin(stored.reader.column("label")[rows], wanted)]
    if not len(rows):
        chosen = " and ".join(f"--{name}" for name in ("images", "labels") if getattr(arguments, name) is not None)
        raise InputError(f"{stored.path}: no row fits {chosen}" if chosen else f"{stored.path}: holds no rows")
    WRITERS[out.suffix](out, stored.reader, rows, classes)
    say(f"export: {len(rows)} of {len(stored.reader)} rows: {out}, {out.stat().st_size} bytes")
    return 0


def _rows_of_images(stored: Stored, text: str) -> np.ndarray:
    held = stored.reader.column("image_id")
    chosen = np.zeros(len(held), bool)
    single: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise InputError(f"--images {text}: {part.strip()!r} is no id; write ids and ranges such as 3,17,100-199")
        if dash:  # a range may have gaps: images that were held out, or could not be explained
            found = (held >= int(first)) & (held <= int(last))
            if not found.any():
                raise InputError(f"--images {text}: {stored.path} has no row in {part.strip()}")
            chosen |= found
        else:
            single.append(int(first))
    if single:
        rows, absent = rows_of(stored.reader, single)
        if absent:
            raise InputError(f"--images {text}: {stored.path} has no row of image {absent[0]}")
        chosen[rows] = True
    return np.flatnonzero(chosen)


def _labels(text: str, classes: tuple[str, ...]) -> list[int]:
    wanted = []
    for part in (each.strip() for each in text.split(",")):
        if part in classes:
            wanted.append(classes.index(part))
        elif part.isdecimal() and (not classes or int(part) < len(classes)):
            wanted.append(int(part))
        else:
            known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
            names = f"one of {known}, or 0 to {len(classes) - 1}" if classes else "a number: names are not known here"
            raise InputError(f"--labels {text}: {part!r} is no class; {names}")
    return wanted


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("export"))
