"""A new HDF5 file on a disk that may be full: one error, where HDF5 itself would end the process."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

MOST = 1 << 30  # bytes of one call of write; Linux takes no more than two


class Sink(io.RawIOBase):
    """A file that HDF5 writes to, and that never fails it: HDF5 that cannot flush a file cannot close it either.

    From the first error on, what is written stays in memory: `check` raises it, to be called after every block.
    """

    def __init__(self, path: Path, shown: Path) -> None:
        self._shown = shown
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._place = self._size = 0
        self._error: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []

    def check(self) -> None:
        if self._error:
            raise OSError(self._error.errno, self._error.strerror, str(self._shown)) from self._error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._error is None:
            try:
                done = 0
                while done < len(view):
                    done += os.pwrite(self._file, view[done : done + MOST], self._place + done)
            except OSError as error:
                self._error = error
        if self._error is not None:
            self._kept.append((self._place, bytes(view)))
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._size - self._place))
        found = os.pread(self._file, wanted, self._place)
        view[:wanted] = found + bytes(wanted - len(found))
        for start, data in self._kept:
            first, last = max(start, self._place), min(start + len(data), self._place + wanted)
            if first < last:
                view[first - self._place : last - self._place] = data[first - start : last - start]
        self._place += wanted
        return wanted

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        try:
            os.ftruncate(self._file, self._size)
        except OSError as error:
            self._error = self._error or error
        return self._size

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


@contextmanager
def new_file(path: Path, shown: Path, **options: Any) -> Iterator[tuple[h5py.File, Sink]]:
    """A new HDF5 file and its sink. Raises OSError, with the name `shown`, for what did not fit in the end."""
    with Sink(path, shown) as sink:
        with h5py.File(sink, "w", **options) as file:
            yield file, sink
        sink.check()
