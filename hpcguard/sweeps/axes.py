"""One axis of a sweep: its values, and what each changes."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from hpcguard.config.evaluation import ATTACKS
from hpcguard.config.explain import explain
from hpcguard.config.sweep import RangeConfig, check_plain
from hpcguard.errors import InputError
from hpcguard.runs import flatten

SECTIONS = ("data", "model", "attribution", "baseline", "refinement")  # that an axis may change
ROUNDS = "rounds"
NO_RESULT = ("cluster", "device", "run", "loop", "controls")
MOST = 100_000
TAKEN = ("seed", "name", "state", "clean", "corrupted", "all-attacks", "flagged", "left_out", "red_alarms", "weights")
TAKEN_BEGINNINGS = ("validation_", "explanation_", "refine_", "evaluate_", "fgsm", "pgd-", "autoattack", *ATTACKS)


class Option(NamedTuple):
    """One value of an axis, or of several that move together."""

    values: dict[str, Any]  # by axis, as the table shows them
    changes: dict[str, Any]  # by dotted key


def options_of(name: str, given: Any, where: str) -> list[Option]:
    """The values of one axis, as a list, a range or labels with their changes."""
    if name in TAKEN or name.startswith(TAKEN_BEGINNINGS):
        raise InputError(
            f"{where}: the table has columns of such names; rename the axis (for seeds write seeds: [0, 1, 2])"
        )
    if isinstance(given, dict) and "range" not in given:
        options = [Option({name: label(key)}, _changes(value, f"{where}.{label(key)}")) for key, value in given.items()]
    else:
        check_key(name, where)
        listed = ranged(given, where) if isinstance(given, dict) else given
        if not isinstance(listed, list):
            raise InputError(f"{where} = {given!r}: write a list, {{range: ...}}, or {{label: {{key: value}}, ...}}")
        options = [
            Option({name: value}, leaves(name, value, f"{where}[{place}]")) for place, value in enumerate(listed)
        ]
    if not options:
        raise InputError(f"{where}: has no values; write some, or leave the axis out")
    check_once([option.values[name] for option in options], where)
    return options


def zipped(group: Mapping[str, Any], where: str) -> list[Option]:
    """Axes that move together, value by value."""
    members = {name: options_of(name, given, f"{where}.{name}") for name, given in group.items()}
    lengths = {name: len(options) for name, options in members.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise InputError(f"{where}: axes that move together need equally many values; {told or 'it is empty'}")
    return [joined(options) for options in zip(*members.values(), strict=True)]


def joined(options: tuple[Option, ...]) -> Option:
    values: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for option in options:
        values |= option.values
        changes |= option.changes
    return Option(values, changes)


def label(value: Any) -> str:
    """A label as written: YAML reads on and off as truth values."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def shown(value: Any) -> str:
    """A value in one cell of a table."""
    return value if isinstance(value, str) else json.dumps(value)


def ranged(given: Mapping[str, Any], where: str) -> list[Any]:
    """Values of {range: {...}}."""
    if set(given) != {"range"}:
        raise InputError(f"{where} = {given}: write {{range: {{start, stop, step or count}}}} alone")
    return spread(given["range"], where)


def spread(given: Any, where: str) -> list[Any]:
    """Values of a range, both ends included, whole where they can be."""
    asked = _range(given, f"{where}.range")
    start, stop = asked.start, asked.stop
    steps = (stop - start) / asked.step if asked.step is not None else (asked.count or 0) - 1
    if not 0 <= steps + 1e-9 < MOST:
        raise InputError(
            f"{where}.range = {given}: gives {0 if steps < 0 else 'too many'} values; write from 1 to {MOST:,}"
        )
    width = stop / start if asked.scale == "log" else stop - start
    if not math.isfinite(width) or (asked.scale == "log" and not width):
        raise InputError(f"{where}.range = {given}: start and stop are too far apart to count with; bring them closer")
    count = math.floor(steps + 1e-9) + 1
    if asked.scale == "log":
        values = [start * width ** (k / (count - 1)) for k in range(count)]
    else:
        step = width / (count - 1) if asked.step is None else asked.step
        values = [start + k * step for k in range(count)]
    rounded = [float(f"{value:.12g}") for value in values]  # 0.3, not 0.30000000000000004
    whole = isinstance(start, int) and isinstance(stop, int) and all(value.is_integer() for value in rounded)
    return [int(value) for value in rounded] if whole else list(rounded)


def _range(given: Any, where: str) -> RangeConfig:
    check_plain(given, where)
    try:
        return RangeConfig.model_validate(given)
    except ValidationError as error:
        raise InputError(explain(error, RangeConfig, where)) from error


def leaves(key: str, value: Any, where: str) -> dict[str, Any]:
    """A change as its single keys, so that a mapping changes what it names and leaves the rest."""
    check_plain(value, where)
    single = flatten({key: value})
    for leaf in single:
        check_key(leaf, where)
    return single


def _changes(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InputError(
            f"{where} = {given!r}: write what the label changes, {{refinement.masking.weight: 0}}, or {{}}"
        )
    check_plain(given, where)
    return {leaf: each for key, value in given.items() for leaf, each in leaves(key, value, where).items()}


def check_key(key: str, where: str) -> None:
    """InputError unless a cell may change the key."""
    first = key.split(".")[0]
    if key == "data.root":
        raise InputError(
            f"{where}: data.root is no axis, for it says where images lie, not which; make a sweep of each, with its "
            "own run, and set data.root in config"
        )
    if key == ROUNDS or first in SECTIONS:
        return
    if first == "evaluation":
        raise InputError(
            f"{where}: {key} is no axis, for results of different evaluations cannot be compared; set it in config"
        )
    if first in NO_RESULT:
        raise InputError(f"{where}: {key} is no axis, for no result depends on it; set it in config")
    raise InputError(f"{where}: {key} is no key of {', '.join(SECTIONS)}, nor rounds")


def check_once(values: list[Any], where: str) -> None:
    seen: set[str] = set()
    for value in values:
        text = json.dumps(value, sort_keys=True)
        if text in seen:
            raise InputError(f"{where}: {text} is there twice; write each value once")
        seen.add(text)
