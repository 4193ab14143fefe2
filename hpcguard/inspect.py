"""Show what a store holds in numbers, and with --image one explanation; --verify checks every byte and value.

Reads RUN/store.h5, or any shard, packed or explanation file. A picture needs the images, so the data section of the
run's configuration; the numbers need nothing but the store. Writes nothing but the picture.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hpcguard.errors import InputError
from hpcguard.progress import progress, say
from hpcguard.reporting.pictures import stored_explanation
from hpcguard.reporting.tables import Table, to_text
from hpcguard.runs import publish
from hpcguard.store import describe, rows_of, stored_problem
from hpcguard.stored import Stored, find_store

EXAMPLE = (
    "python -m hpcguard.inspect runs/quickstart",
    "python -m hpcguard.inspect runs/quickstart/store.h5 --verify",
    "python -m hpcguard.inspect runs/quickstart --image 3 --picture image3.png",
)
SECTIONS = ("data",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", type=int, metavar="ID", help="show the explanation of this image")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --image: draw it, as a PNG")
    parser.add_argument("--verify", action="store_true", help="check digests of all files, and the values of all rows")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(source: Path, arguments: argparse.Namespace) -> int:
    if arguments.picture and arguments.image is None:
        raise InputError(f"--picture {arguments.picture}: of which image? add --image ID")
    if arguments.picture and arguments.picture.suffix != ".png":
        raise InputError(f"--picture {arguments.picture}: pictures are PNG; name it FILE.png")
    stored = find_store(source, arguments.overrides)
    if arguments.image is not None:
        row = _row(stored, arguments.image)
        if arguments.picture:
            _draw(stored, row, arguments.picture)
        _show(_explanation(row), arguments.json, _explanation_text)
        if arguments.picture and not arguments.json:
            say(f"inspect: {arguments.picture}")
    elif not arguments.verify:
        _show(describe(stored.reader, stored.record()), arguments.json, _text)
    if arguments.verify:
        checked = _verify(stored, not arguments.json)
        say(json.dumps({"verified": len(stored.reader)}) if arguments.json else f"inspect: {stored.path}: {checked}")
    return 0


def _show(values: dict[str, Any], as_json: bool, text: Any) -> None:
    say(json.dumps(values) if as_json else text(values).rstrip())


# ---------------------------------------------------------------------------------------------------------- verify
def _verify(stored: Stored, shown: bool) -> str:
    """What was checked. Raises InputError with what is wrong."""
    problem, compared = stored.digest_problem()
    if problem:
        raise InputError(problem)
    reader = stored.reader
    if shown:
        with progress("verify", len(reader), "rows") as meter:
            problem = stored_problem(reader, meter.advance)
    else:
        problem = stored_problem(reader)
    if problem:
        raise InputError(f"{stored.path}: {problem}; attribute, then consolidate, again")
    return f"verified {compared} and the values of {len(reader)} rows"


# ----------------------------------------------------------------------------------------------------- explanation
def _row(stored: Stored, image: int) -> dict[str, np.ndarray]:
    rows, _ = rows_of(stored.reader, [image])
    if not len(rows):
        ids = stored.reader.column("image_id")
        held = f"{len(ids)} ids from {ids.min()} to {ids.max()}" if len(ids) else "no rows"
        raise InputError(f"--image {image}: {stored.path} has no row of it; it holds {held}")
    return {name: stored.reader.rows(name, rows[:1])[0] for name in stored.reader.shapes}


def _draw(stored: Stored, row: dict[str, np.ndarray], path: Path) -> None:
    images = stored.images()
    number = [int(row["image_id"])]
    if images.labels_of(number)[0] != row["label"]:
        raise InputError(
            f"{stored.path}: image {number[0]} is of class {row['label']}, in {images.name} of class "
            f"{images.labels_of(number)[0]}: these are other images; name theirs with data.name and data.root"
        )
    picture = stored_explanation(row, images.images(number)[0], images.classes)
    with publish(path) as temporary:
        temporary.write_bytes(picture.png)


def _explanation(row: dict[str, np.ndarray]) -> dict[str, Any]:
    count = int(row["num_segments"])
    values = {name: row[name].item() for name in ("image_id", "label", "predicted", "num_segments", "num_samples")}
    per_label = ("target", "probability", "intercept", "score")
    per_segment = [name for name in ("coefficients", "standard_error", "interval") if name in row]
    labels = [
        {name: row[name][k].item() for name in per_label}
        | {name: row[name][k, :count].tolist() for name in per_segment}
        for k in range(len(row["target"]))
    ]
    pixels = np.bincount(row["segments"].ravel(), minlength=count).tolist()
    # None where attribution did not compute them: JSON has no NaN.
    more: dict[str, Any] = {
        name: None if np.isnan(row[name][:count]).any() else row[name][:count].tolist()
        for name in ("sensitivity", "instability")
        if name in row
    }
    return {**values, "pixels": pixels, **more, "explained": labels}


def _explanation_text(values: dict[str, Any]) -> str:
    labels = values["explained"]
    lines = [
        f"image {values['image_id']}: class {values['label']}, predicted {values['predicted']}, "
        f"{values['num_segments']} segments, {values['num_samples']} samples"
    ]
    lines += [
        f"  class {each['target']}: probability {each['probability']:.3f}, intercept {each['intercept']:.3f}, "
        f"weighted R^2 {each['score']:.3f}"
        for each in labels
    ]
    order = np.argsort(-np.abs(labels[0]["coefficients"]), kind="stable")
    more = [name for name in ("sensitivity", "instability") if values.get(name)]
    columns = ["segment", "pixels", *(f"class {each['target']}" for each in labels), *more]
    table = [
        [str(k), str(values["pixels"][k]), *(_with_error(each, int(k)) for each in labels),
         *(f"{values[name][k]:.3g}" for name in more)]
        for k in order
    ]  # fmt: skip
    return "\n".join([*lines, to_text(Table(columns, table))])


def _with_error(label: dict[str, Any], segment: int) -> str:
    return f"{label['coefficients'][segment]:+.4f} ({label['standard_error'][segment]:.4f})"


# --------------------------------------------------------------------------------------------------------- numbers
def _text(values: dict[str, Any]) -> str:
    lines = [
        f"{values['store']}: {values['images']} images of {values['height']}x{values['width']}, "
        f"{values['explained_labels']} explained labels, at most {values['widest']} segments",
        f"  {values['files']} file(s), {values['bytes']} bytes, {values['bytes_per_image']:.0f} an image, "
        f"schema {values['schema']}, plan {str(values['fingerprint'])[:12]}",
    ]
    if values["images"]:
        mean = values["statistics"]
        lines += [f"  {name:<9} {_range(values[name])}" for name in ("image_id", "segments", "samples")]
        lines.append(
            f"  mean weighted R^2 {mean['score']:.3f}, mean |coefficient| {mean['mean_abs_coefficient']:.4f}, standard "
            f"error / largest |coefficient| {mean['relative_error']:.3f}, accuracy {mean['accuracy']:.3f}"
        )
        columns = ["class", "images", "accuracy", "segments", "R^2", "|coefficient|"]
        names = ("images", "accuracy", "segments", "score", "mean_abs_coefficient")
        rows = [[label, *(f"{each[name]:.4g}" for name in names)] for label, each in values["classes"].items()]
        more = [f"  ({len(rows) - 20} more classes: --json shows all)"] if len(rows) > 20 else []
        lines += ["", to_text(Table(columns, rows[:20])).rstrip(), *more]
    if "spurious" in values:
        lines += ["", _spurious_text(values["spurious"])]
    columns = ["column", "type", "shape", "bytes an image", "stored", "how"]
    count = max(1, values["images"])
    rows = [
        [name, each["dtype"], "x".join(map(str, each["shape"])), f"{each['bytes'] / count:.1f}",
         f"{each['stored_bytes'] / count:.1f}", each["filters"]]
        for name, each in values["columns"].items()
    ]  # fmt: skip
    return "\n".join([*lines, "", to_text(Table(columns, rows))])


def _spurious_text(spurious: dict[str, Any]) -> str:
    names = list(spurious["all"])
    rows = [
        [label, *(f"{shares[name]:.3f}" for name in names)]
        for label, shares in [("all", spurious["all"]), *list(spurious["classes"].items())[:20]]
    ]
    title = "  share of segments that each criterion of spurious flags by itself, before its share cuts them"
    return f"{title}\n{to_text(Table(['class', *names], rows)).rstrip()}"


def _range(values: dict[str, float]) -> str:
    return f"{values['least']:g} to {values['most']:g}, mean {values['mean']:.1f}"


if __name__ == "__main__":
    from hpcguard.cli import run_stage

    sys.exit(run_stage("inspect"))
