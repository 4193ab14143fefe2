"""A validation error in one line, and every key with its meaning."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for a validation error: key, value, what is allowed."""
    details = error.errors(include_url=False)
    keys = [_keys(detail) for detail in details]
    same = [detail for detail, key in zip(details, keys, strict=True) if key == keys[0]]
    line = _explain_one(details[0], model, prefix)
    # One key that takes either of several types is one mistake, with several ways to mend it.
    line += "".join(f", or {detail['msg'][0].lower()}{detail['msg'][1:]}" for detail in same[1:])
    return line if len(same) == len(details) else f"{line} (and {len(details) - len(same)} more)"


def _keys(detail: ErrorDetails) -> list[str]:
    """Where a validation error lies, without the names that pydantic gives to the members of a union."""
    members = ("literal[", "constrained-")
    parts = [str(part) for part in detail["loc"]]
    return [part for part in parts if part not in ("float", "int") and not part.startswith(members)]


def _explain_one(detail: ErrorDetails, model: type[BaseModel], prefix: str) -> str:
    keys = _keys(detail)
    name = ".".join([*([prefix] if prefix else []), *keys])
    if detail["type"] == "extra_forbidden":
        allowed = list(_section(model, keys[:-1]).model_fields)
        close = difflib.get_close_matches(keys[-1], allowed, 1)
        guess = f"; did you mean {close[0]}?" if close else ""
        return f"unknown key {name} = {_short(detail['input'])}{guess} Allowed: {', '.join(allowed)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"expected the keys {', '.join(_section(model, keys).model_fields)}"
    if detail["type"] == "value_error":
        return f"{name}: {message}" if name else message
    return f"{name} = {_short(detail['input'])}: {message[0].lower()}{message[1:]}"


def _section(model: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    for key in keys:
        field = model.model_fields.get(key)
        nested = [t for t in _flatten(field.annotation) if _is_section(t)] if field else []
        if nested:
            model = nested[0]
    return model


def _flatten(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", None) or (annotation,)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_default(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float) and 0 < value < 1 and (255 * value).is_integer() and len(str(value)) > len("0.25"):
        return f"{255 * value:.0f}/255"
    return "null" if value is None else str(value)


def describe_keys(
    model: type[BaseModel],
    prefix: str = "",
    sections: tuple[str, ...] = (),
    defaults: BaseModel | None = None,
) -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every key, for --help; `sections` keeps only those top-level sections."""
    rows: list[tuple[str, str, str]] = []
    for key, field in model.model_fields.items():
        if sections and not prefix and key not in sections:
            continue
        default = getattr(defaults, key) if defaults else field.default
        nested = [kind for kind in _flatten(field.annotation) if _is_section(kind)]
        if nested:
            own = default if isinstance(default, BaseModel) else None
            rows += describe_keys(nested[0], f"{prefix}{key}.", defaults=own)
        else:
            rows.append((prefix + key, _show_default(default), field.description or ""))
    return rows
