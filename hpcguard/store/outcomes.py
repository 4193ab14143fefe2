"""Outcomes: image by image, what a model got right under every attack."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcguard.errors import InputError
from hpcguard.store.image_table import AGAIN, ImageTable, read_table


@dataclass(frozen=True)
class Outcomes:
    """One row an image."""

    image_id: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    right: Mapping[str, np.ndarray]  # by attack, from the weakest to the strongest: bool [N]

    def __len__(self) -> int:
        return len(self.image_id)

    def columns(self) -> dict[str, np.ndarray]:
        """As a table holds them."""
        right = {f"right/{name}": each for name, each in self.right.items()}
        return {"label": self.label, **right}


def outcomes_of(table: ImageTable) -> Outcomes:
    """Raises ValueError for a table of something else."""
    right = {name.partition("/")[2]: each for name, each in table.columns.items() if name.startswith("right/")}
    expected = {"label": "int64", **{f"right/{name}": "bool" for name in right}}
    for name, dtype in expected.items():
        column = table.columns.get(name)
        if column is None or column.dtype != dtype or column.ndim != 1:
            found = "not there" if column is None else f"{column.dtype} {list(column.shape)}"
            raise ValueError(f"{name} is {found}, expected {dtype} [N]")
    if "clean" not in right:
        raise ValueError("right/clean is not there")
    return Outcomes(table.image_id, table.columns["label"], right)


def read_outcomes(path: Path) -> Outcomes:
    """Raises InputError if the file is not there, damaged, or holds something else."""
    table = read_table(path)
    try:
        return outcomes_of(table)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as outcomes of attacks ({error}); {AGAIN}") from error
