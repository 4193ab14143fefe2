"""The page: one self-contained HTML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_page(values: Mapping[str, Any], template: str = "report.html.j2") -> str:
    """Fill a template; everything in `values` is escaped, and a missing value is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template(template).render(values)


def without_machine_paths(value: Any) -> Any:
    """`value` with every absolute path cut down to its last name: where files lay is nobody's business."""
    if isinstance(value, dict):
        return {key: without_machine_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_machine_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
