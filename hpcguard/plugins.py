"""Code of the user's own that a configuration names as package.module:callable."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcguard.errors import InputError


def import_callable(name: str, key: str) -> Callable[..., Any]:
    """What `name`, the value of `key`, stands for. Raises InputError if there is no such callable."""
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # importing somebody's module runs somebody's code
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(
            f"{key} = {name}: cannot be imported ({reason}); "
            "write package.module:callable and see that PYTHONPATH holds the package"
        ) from error
    if not callable(found):
        raise InputError(f"{key} = {name}: {attribute} is a {type(found).__name__}, not callable")
    return found


def source_file(name: str, key: str) -> Path | None:
    """The file in which the callable is written; None where there is none."""
    found = inspect.unwrap(import_callable(name, key))
    try:
        file = inspect.getsourcefile(found)
    except TypeError:  # an instance, or compiled code
        file = inspect.getsourcefile(type(found)) if not inspect.isbuiltin(found) else None
    return Path(file) if file else None
