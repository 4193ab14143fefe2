"""A sweep: a base configuration, and what its cells change in it."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from hpcguard.config.explain import explain
from hpcguard.config.load import load_config, read_yaml, validated, with_overrides
from hpcguard.config.root import Config
from hpcguard.config.section import Section
from hpcguard.errors import InputError

RESOLVED = "sweep.yaml"  # in a sweep's folder: the sweep as it was last started there
LARGEST = 10**18  # whole numbers from here on do not fit the table's columns


class RangeConfig(Section):
    """Values from start to stop, both included."""

    start: int | float
    stop: int | float
    step: int | float | None = None
    """Distance of two values, negative where they fall; or count."""
    count: int | None = Field(None, ge=2)
    """Values; or step."""
    scale: Literal["linear", "log"] = "linear"
    """log: equal ratios, with count."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "RangeConfig":
        if (self.step is None) == (self.count is None) or self.step == 0:
            raise ValueError("give step (not 0) or count, and not both")
        if self.scale == "log" and (self.count is None or min(self.start, self.stop) <= 0):
            raise ValueError("scale = log: give count, and start and stop above 0")
        return self


class SweepConfig(Section):
    run: Path = Path("runs/sweep")
    """The sweep's folder: everything that it writes."""
    base: Path | None = None
    """Configuration that the cells change, such as configs/cifar10_small.yaml. Its refinement is what they train; its
    controls are left out."""
    config: dict[str, Any] = {}
    """Changes to base for all cells, or a whole configuration in its place."""
    axes: dict[str, Any] = {}
    """Each key of data, model, attribution, baseline or refinement, with a list of its values, {range: {start, stop,
    count or step}} (scale: log for ratios), or a name of your own with {label: {key: value, ...}, ...}; and rounds, how
    often a cell explains and refines. Cells are all combinations."""
    zip: list[dict[str, Any]] = []
    """Groups of axes that move together, each written as axes are, all of a group equally long."""
    exclude: list[dict[str, Any]] = []
    """Combinations to leave out: {axis: value, ...} leaves out all cells that have these."""
    cells: list[dict[str, Any]] = []
    """More cells, each {axis or key: value, ...}, with a name of their own under `name` where that helps."""
    seeds: list[Any] | dict[str, Any] = []
    """Every cell is done with each of these, a list or a range; none: the base's seed alone."""
    seed_keys: list[str] = Field(["refinement.seed"], min_length=1)
    """Keys that take the seed. With refinement.seed alone, stores are shared between the seeds."""
    control: dict[str, Any] = {}
    """{axis: value, ...} of the cells that the table compares each cell with, seed by seed."""
    max_jobs: int = Field(1, gt=0, le=1024)
    """Processes of stages at once; their own workers and threads come on top. On Slurm cluster.slurm.tasks_at_once is
    what counts."""
    pack: int = Field(1, gt=0, le=1000)
    """Arms of one folder that a process (on Slurm: a task) trains or measures one after the other: short ones cost less
    so."""


def load_sweep(source: Path, overrides: list[str]) -> tuple[SweepConfig, Config]:
    """A sweep and its base, from a YAML file or a sweep's folder; overrides change keys of either.

    Raises InputError with one line that names the key, the value and what is allowed.
    """
    path = source / RESOLVED if source.is_dir() else source
    if not path.is_file():
        what = f"holds no {RESOLVED}, so it is no sweep's folder" if source.is_dir() else "no such file"
        raise InputError(f"{source}: {what}; give a sweep such as configs/sweeps/components_small.yaml, or its folder")
    values = read_yaml(path)
    try:
        check_plain(values, str(path), labels=True)
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply; write it without anchors that hold themselves") from error
    if source.is_dir():
        values["run"] = str(source)
    own = [each for each in overrides if each.split("=")[0].split(".")[0] in SweepConfig.model_fields]
    try:
        sweep = SweepConfig.model_validate(with_overrides(values, own, path))
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, SweepConfig)}") from error
    if sweep.base is None and not sweep.config:
        raise InputError(
            f"{path}: base and config are both empty; name a configuration in base, or write one in config"
        )
    base = load_config(sweep.base).model_dump(mode="json", exclude_unset=True) if sweep.base else {}
    combined = _combined(base, sweep.config, f"{path}: config")
    changed = with_overrides(combined, [each for each in overrides if each not in own], path)
    return sweep, validated(changed, path)


def _combined(base: dict[str, Any], changes: dict[str, Any], where: str) -> dict[str, Any]:
    """`base` with the keys that `changes` names, section by section."""
    combined = dict(base)
    for key, value in changes.items():
        held, place = combined.get(key), f"{where}.{key}"
        if isinstance(held, dict) and isinstance(value, dict):
            combined[key] = _combined(held, value, place)
        elif isinstance(held, dict) and value is not None:
            raise InputError(f"{place} = {value!r}: write the keys that change, as in {key}: {{key: value}}")
        else:
            combined[key] = value
    return combined


def check_plain(value: Any, where: str, labels: bool = False) -> None:
    """InputError unless a value is null, a truth value, a finite number, text, or lists and mappings of these.

    labels: keys may be numbers and truth values too, for they may be an axis' labels.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str) and not (labels and isinstance(key, int | float)):
                raise InputError(f"{where}: the key {key!r} is no text; write the name of a key, or put it in quotes")
            check_plain(each, f"{where}.{key}", labels)
    elif isinstance(value, list):
        for place, each in enumerate(value):
            check_plain(each, f"{where}[{place}]", labels)
    elif isinstance(value, int | float):
        if not math.isfinite(value) if isinstance(value, float) else abs(value) >= LARGEST:
            told = value if isinstance(value, float) else "a number of more than 18 digits"
            raise InputError(f"{where} = {told}: write a finite number below {LARGEST:.0e}, or put it in quotes")
    elif value is not None and not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{where} = {value}: a {kind}; write a number, a list, a mapping, or text in quotes")
