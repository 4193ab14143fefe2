"""Code of the user's own that a configuration names as package.module:callable."""

import importlib
from collections.abc import Callable
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
