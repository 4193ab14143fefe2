"""What went wrong with a shard: its class, what a person needs to see of it, and what is to be done about it."""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, read_json, write_json

Kind = Literal[
    "pre-empted",
    "time-out",
    "node-failure",
    "requeued",
    "out-of-memory",
    "gpu-out-of-memory",
    "disk",
    "error",
    "killed",
    "cancelled",
    "unknown",
]
TAIL_LINES = 12
FORGIVEN = ".forgiven"  # appended to a record's name by `hpcguard retry`
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "unable to allocate")


@dataclass(frozen=True)
class Problem:
    """How a task failed."""

    kind: Kind
    message: str  # one line
    signature: str | None = None  # equal for equal errors, whatever they happened to
    tail: str = ""  # of the traceback


@dataclass(frozen=True)
class Failure:
    """A problem with one shard in one attempt, as recorded in RUN/failures; not final if it goes on by itself."""

    shard: int
    attempt: str
    kind: Kind
    final: bool
    message: str
    signature: str | None = None
    tail: str = ""
    host: str | None = None
    job: str | None = None
    log: str | None = None
    units: int = 0
    memory_gb: float | None = None  # that the job had
    time: float = 0.0


def problem_of(error: BaseException) -> Problem:
    """Classify an exception of a task."""
    kind = _kind(error)
    root: BaseException = error
    while root.__cause__:  # what our own words stand for: of a user's code, their own line
        root = root.__cause__
    frames = traceback.extract_tb(root.__traceback__)
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
    lines = "".join(traceback.format_exception(root, chain=False)).strip().splitlines()
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    tail = [*lines[-TAIL_LINES:], *([] if root is error else [message])]
    return Problem(kind, message, f"{type(root).__name__} at {where}", "\n".join(tail))


def _kind(error: BaseException) -> Kind:
    if is_out_of_memory(error):
        return "gpu-out-of-memory" if type(error).__name__ == "OutOfMemoryError" else "out-of-memory"
    return "disk" if isinstance(error, OSError) and error.errno is not None else "error"


def is_broken_gpu(error: BaseException) -> bool:
    """Whether this process can use its GPU no more, so that everything that it tries next would fail too."""
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_out_of_memory(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine had no memory left for it."""
    torch = sys.modules.get("torch")  # who has not imported it raises none of its errors
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error).lower() for mark in OUT_OF_MEMORY)


def record(folder: RunFolder, failure: Failure) -> None:
    """Publish RUN/failures/SHARD.ATTEMPT.json."""
    write_json(folder.failure(failure.shard, failure.attempt), {**asdict(failure), "time": time.time()})


def read_failures(folder: RunFolder, shard: int | None = None) -> list[Failure]:
    """All records that nobody has forgiven, or a shard's, oldest first; damaged ones are told of as unknown."""
    found = []
    for path in folder.failures.glob("*.json" if shard is None else f"{shard:05d}.*.json"):
        if not path.exists():  # forgiven since
            continue
        try:
            values: dict[str, Any] = read_json(path, "remove it", shard=int, kind=str)
            found.append(Failure(**values))
        except (InputError, TypeError) as error:
            number, attempt = path.name.removesuffix(".json").split(".", 1)
            found.append(Failure(int(number), attempt, "unknown", True, f"{path}: damaged ({error})"))
    return sorted(found, key=lambda failure: failure.time)


def by_shard(failures: Sequence[Failure]) -> dict[int, list[Failure]]:
    """The records of each shard that has any, in their order."""
    grouped: dict[int, list[Failure]] = {}
    for failure in failures:
        grouped.setdefault(failure.shard, []).append(failure)
    return grouped


def forgive(folder: RunFolder, shards: Sequence[int]) -> int:
    """Take the records of these shards out of account, so that they are tried afresh; how many there were."""
    wanted = {f"{shard:05d}" for shard in shards}
    paths = [path for path in folder.failures.glob("*.json") if path.name.split(".", 1)[0] in wanted]
    for path in paths:
        path.replace(Path(f"{path}{FORGIVEN}"))
    return len(paths)


def equal_errors(failures: Sequence[Failure]) -> tuple[int, Failure | None]:
    """The error that most shards failed with: how many, and the first of them."""
    groups: dict[str, dict[int, Failure]] = {}
    for failure in failures:
        if failure.kind == "error" and failure.signature:
            groups.setdefault(failure.signature, {}).setdefault(failure.shard, failure)
    largest = max(groups.values(), key=len, default={})
    return len(largest), next(iter(largest.values()), None)
