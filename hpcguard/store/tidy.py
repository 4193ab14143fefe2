"""A tidy table as HDF5: a data set a column, text as UTF-8, missing numbers as NaN."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError

VERSION = 1
VERSION_KEY = "tidy_table"


def write_tidy(path: Path, columns: Mapping[str, Sequence[Any]], units: Mapping[str, str], digest: str) -> None:
    """The caller publishes it. digest: of the table's other form, for who wants to know whether they are the same."""
    buffer = io.BytesIO()  # HDF5 is not at its best where a disk is full
    with h5py.File(buffer, "w", libver="v110") as file:
        file.attrs[VERSION_KEY] = VERSION
        file.attrs["columns"] = json.dumps(list(columns))
        file.attrs["rows"] = max(map(len, columns.values()), default=0)
        file.attrs["digest"] = digest
        for name, values in columns.items():
            kind, data = typed(values)
            text = kind == "text"
            stored = file.create_dataset(name, data=data, dtype=h5py.string_dtype() if text else None)
            stored.attrs["type"] = kind
            stored.attrs["unit"] = units.get(name, "")
    path.write_bytes(buffer.getbuffer())


def typed(values: Sequence[Any]) -> tuple[str, np.ndarray]:
    """integer, real (missing: NaN) or text (missing: empty; what is neither text nor number: as JSON)."""
    known = [value for value in values if value is not None]
    numbers = bool(known) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known)
    if numbers and len(known) == len(values) and all(isinstance(value, int) for value in known):
        try:
            return "integer", np.array(values, dtype=np.int64)
        except OverflowError:
            pass
    if numbers or not known:
        return "real", np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    return "text", np.array([_text(value) for value in values], dtype=object)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def read_tidy(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], str]:
    """Columns in their order, units, digest. Raises InputError if the file is not there, damaged, or something else."""
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            if file.attrs.get(VERSION_KEY) != VERSION:
                raise InputError(f"{path}: no tidy table of version {VERSION}; `hpcguard report SWEEP` writes it")
            names = json.loads(file.attrs["columns"])
            columns = {
                name: file[name].asstr()[:] if file[name].attrs["type"] == "text" else file[name][:] for name in names
            }
            return columns, {name: str(file[name].attrs["unit"]) for name in names}, str(file.attrs["digest"])
    except FileNotFoundError as error:
        raise InputError(f"{path}: not there; `hpcguard report SWEEP` writes it") from error
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read as a tidy table ({' '.join(str(error).split())})") from error
