"""StoreReader: rows of a store, a shard or an explanation file by their numbers, decoded from where they really lie."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcguard.errors import InputError
from hpcguard.store.schema import COLUMN, RECOMPUTE, schema_problem

MOST_OPEN = 256  # files at a time: a store may have ten thousand shards, a process often but 1,024 files
BLOCK_BYTES = 2**18  # decoded; what one read should have at least, for h5py's own cost of a read to vanish
_ABANDONED: list[object] = []  # a parent's open files, which a forked child must neither use nor close


@dataclass(frozen=True)
class Piece:
    """Rows start:stop of the store, in one file."""

    start: int
    stop: int
    path: Path


class StoreReader:
    """Reads around a virtual view, from its sources: a source that is missing is an error here and never fill values.

    Files are opened when first read, once a process (a forked child opens its own), MOST_OPEN at most. May be pickled.
    One thread at a time.
    """

    def __init__(self, store: Path) -> None:
        self.store = store
        try:
            with open_file(store) as file:
                schema, self.fingerprint = file.attrs.get("schema"), str(file.attrs.get("fingerprint", ""))
                self.schema = schema.item() if isinstance(schema, np.generic) else schema
                extents = self._describe(file)
        except (OSError, KeyError, RuntimeError) as error:
            raise InputError(f"{store}: cannot be read as a store ({error})") from error
        if "image_id" not in self.shapes or self.schema is None:
            raise InputError(f"{store}: holds no schema and image_id, so it is no store of hpcguard's")
        if problem := schema_problem(self.schema):
            raise InputError(f"{store}: {problem}; {RECOMPUTE}")
        if {name: shape[0] for name, shape in self.shapes.items() if shape[0] != len(self)}:
            raise InputError(f"{store}: damaged, its columns have different lengths")
        if len(set(extents.values())) > 1 or not _covers(self.pieces, len(self)):
            raise InputError(f"{store}: damaged, its columns come from different places, or from nowhere")
        self._starts = np.array([piece.start for piece in self.pieces], np.int64)
        self._rows = {piece.path: piece.stop - piece.start for piece in self.pieces}
        self._files = _Files()

    def _describe(self, file: h5py.File) -> dict[str, tuple[object, ...]]:
        """Shapes, types and pieces; returns where each column begins and ends."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.pieces: list[Piece] = []
        extents = {}
        for name in COLUMN:
            if name in file:
                dataset = file[name]  # one at a time: over ten thousand sources it takes 60 MB, and a while to open
                self.shapes[name], self.dtypes[name], extents[name] = dataset.shape, dataset.dtype, _extent(dataset)
                if name == "image_id":
                    self.pieces = _layout(self.store, dataset)
        return extents

    def __len__(self) -> int:
        return self.shapes["image_id"][0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _files=_Files())

    def row_bytes(self, names: Sequence[str]) -> int:
        """Decoded bytes of a row."""
        return sum(int(np.prod(self.shapes[name][1:])) * self.dtypes[name].itemsize for name in names)

    def block_rows(self, names: Sequence[str]) -> int:
        """How many rows to read at a time: whole chunks, about BLOCK_BYTES or more."""
        chunk = max(self.chunk_rows(name) for name in names)
        return chunk * -(-BLOCK_BYTES // max(1, chunk * self.row_bytes(names)))

    def files(self) -> list[Path]:
        """The files that hold the rows."""
        return list(dict.fromkeys(piece.path for piece in self.pieces))

    def blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """All rows as (start, stop), at most `rows` each, none across two files."""
        for piece in self.pieces:
            for start in range(piece.start, piece.stop, rows):
                yield start, min(start + rows, piece.stop)

    def column(self, name: str) -> np.ndarray:
        """A whole column."""
        out = np.empty(self.shapes[name], self.dtypes[name])
        for piece in self.pieces:
            self._read(name, piece, piece.start, piece.stop, out[piece.start : piece.stop])
        return out

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows start:stop of a column."""
        return self.rows(name, np.arange(start, stop))

    def rows(self, name: str, rows: np.ndarray, dtype: np.dtype | None = None) -> np.ndarray:
        """Rows [n] of a column, in their order; every chunk that holds some of them is decoded once."""
        dtype = dtype or self.dtypes[name]
        order = np.argsort(rows, kind="stable")
        ascending = rows[order]
        spans = self._spans(name, ascending)
        starts = np.cumsum([0, *(stop - start for _, start, stop in spans)])
        buffer = np.empty((starts[-1], *self.shapes[name][1:]), dtype)
        for begin, (piece, start, stop) in zip(starts[:-1], spans, strict=True):
            self._read(name, piece, start, stop, buffer[begin : begin + stop - start])
        if len(buffer) == len(rows) and np.array_equal(order, np.arange(len(rows))):
            return buffer
        firsts = np.array([start for _, start, _ in spans], np.int64)
        span = np.searchsorted(firsts, ascending, side="right") - 1
        places = np.empty(len(rows), np.int64)
        places[order] = starts[span] + ascending - firsts[span]
        return buffer[places]

    def _spans(self, name: str, ascending: np.ndarray) -> list[tuple[Piece, int, int]]:
        """(piece, start, stop) to be read for ascending rows: those of one chunk, or of neighbouring ones, at once."""
        if not len(ascending):
            return []
        piece = np.searchsorted(self._starts, ascending, side="right") - 1
        chunk = (ascending - self._starts[piece]) // self.chunk_rows(name)
        breaks = np.flatnonzero((np.diff(piece) != 0) | (np.diff(chunk) > 1)) + 1
        firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(ascending)]]) - 1
        return [
            (self.pieces[piece[first]], int(ascending[first]), int(ascending[last]) + 1)
            for first, last in zip(firsts, lasts, strict=True)
        ]

    def chunk_rows(self, name: str) -> int:
        """Rows of a chunk of a column, in its first file."""
        chunks = self._files.dataset(self.pieces[0].path, name, self._check).chunks if self.pieces else None
        return chunks[0] if chunks else 1

    def _check(self, path: Path, file: h5py.File) -> None:
        """InputError if a file is not what the view was made over: it was replaced since."""
        found = (file.attrs.get("schema"), str(file.attrs.get("fingerprint", "")), len(file["image_id"]))
        if found != (self.schema, self.fingerprint, self._rows[path]):
            raise InputError(
                f"{path}: not the file that {self.store} was made over (schema, plan or number of rows differ); "
                "run `python -m hpcguard.consolidate` on this run again"
            )

    def _read(self, name: str, piece: Piece, start: int, stop: int, out: np.ndarray) -> None:
        source = np.s_[start - piece.start : stop - piece.start]
        try:
            dataset = self._files.dataset(piece.path, name, self._check)
            if dataset.shape[1:] == out.shape[1:]:
                dataset.read_direct(out, source)
            else:  # a shard of fewer segments than the widest
                out[...] = np.array(COLUMN[name].fill).astype(out.dtype)
                out[(slice(None), *map(slice, dataset.shape[1:]))] = dataset[source]
        except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(
                f"{piece.path}: {name} cannot be read ({error}); run `hpcguard inspect {self.store} --verify`"
            ) from error


class _Files:
    """Open files and data sets of one process, the least recently used closed first."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._open: OrderedDict[Path, tuple[h5py.File, dict[str, h5py.Dataset]]] = OrderedDict()

    def dataset(self, path: Path, name: str, check: Callable[[Path, h5py.File], None]) -> h5py.Dataset:
        """check: looks at a file that has just been opened."""
        if self._pid != os.getpid():
            _ABANDONED.append(self._open)
            self.__init__()  # type: ignore[misc]
        if path not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._open.popitem(last=False)[1][0].close()
            file = open_file(path)
            check(path, file)
            self._open[path] = (file, {})
        self._open.move_to_end(path)
        file, datasets = self._open[path]
        if name not in datasets:
            datasets[name] = file[name]
        return datasets[name]


def open_file(path: Path) -> h5py.File:
    """To read, also where the file system has no locks; without a cache of chunks, for each is asked for once."""
    return h5py.File(path, "r", locking="best-effort", rdcc_nbytes=0)


def _layout(store: Path, dataset: h5py.Dataset) -> list[Piece]:
    """Where a column's rows lie, by their first row."""
    if not dataset.is_virtual:
        return [Piece(0, dataset.shape[0], store)]
    pieces = []
    for source in dataset.virtual_sources():
        (start, *_), (last, *_) = source.vspace.get_select_bounds()
        pieces.append(Piece(int(start), int(last) + 1, store.parent / source.file_name))
    return sorted(pieces, key=lambda piece: piece.start)


def _extent(dataset: h5py.Dataset) -> tuple[object, ...]:
    """How many sources a column has, the first one and the last: of thousands, each alone takes its time.

    What lies between is as it was written, or the digest of the view does not fit.
    """
    if not dataset.is_virtual:
        return (0,)
    made = dataset.id.get_create_plist()
    last = made.get_virtual_count() - 1
    if last < 0:
        return (-1,)
    names = (made.get_virtual_filename(0), made.get_virtual_filename(last))
    bounds = (made.get_virtual_vspace(place).get_select_bounds() for place in (0, last))
    return (last, *names, *((int(start[0]), int(stop[0])) for start, stop in bounds))


def _covers(pieces: list[Piece], rows: int) -> bool:
    ends = [0, *(piece.stop for piece in pieces)]
    return ends[-1] == rows and all(piece.start == end for piece, end in zip(pieces, ends[:-1], strict=True))
