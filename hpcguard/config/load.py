"""A configuration from YAML with dotted overrides."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from hpcguard.config.explain import explain
from hpcguard.config.root import Config
from hpcguard.errors import InputError

RECORDED = "recorded"  # what a run folder's config.yaml holds beside the configuration: digests, code revision


def load_config(source: Path, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, or a run folder's config.yaml, and apply `section.key=value` overrides.

    Raises InputError with one line that names the key, the value and what is allowed.
    """
    path = source / "config.yaml" if source.is_dir() else source
    if not path.is_file():
        what = "holds no config.yaml, so it is no run folder" if source.is_dir() else "no such file"
        raise InputError(f"{source}: {what}; give a configuration such as configs/quickstart.yaml, or a run folder")
    merged = read_yaml(path)
    merged.pop(RECORDED, None)
    if source.is_dir():
        merged["run"] = str(source)  # a run folder may have been moved, or be named from elsewhere
    return validated(with_overrides(merged, overrides or [], path), path)


def with_overrides(values: dict[str, Any], overrides: list[str], path: Path) -> dict[str, Any]:
    """`values` of the file `path` with `section.key=value` applied; InputError for what is no override."""
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise InputError(f"{override!r} is no override: write section.key=value, for example data.size=32")
    try:
        combined = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        changed = OmegaConf.to_container(combined, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} with {overrides or 'no overrides'}: {str(error).splitlines()[0]}") from error
    assert isinstance(changed, dict)
    return {str(key): value for key, value in changed.items()}


def validated(values: dict[str, Any], path: Path) -> Config:
    """The configuration that the file `path` describes."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: {explain(error, Config)}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError if there is none, empty for an empty file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{path}: {where}not valid YAML ({getattr(error, 'problem', None) or error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections such as 'data:' at the top level, found {type(values).__name__}")
    return values
