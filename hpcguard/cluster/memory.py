"""Memory of this process: whether the kernel has killed for want of it, and whether what was freed is kept."""

import ctypes
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
NEVER = 2**31 - 1


def oom_kills() -> int:
    """Processes of our own memory cgroup that were killed for want of memory so far; 0 where that cannot be known."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    total = 0
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers == "memory":  # cgroup v1
            total += _count(ROOT / "memory" / path.lstrip("/") / "memory.oom_control")
        elif not controllers:  # v2
            total += _count(ROOT / path.lstrip("/") / "memory.events")
    return total


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, up to this process's peak; False where the C library is not glibc.

    A training step on a CPU frees the gigabytes that the next one asks for. By default glibc gives them back to the
    kernel, which clears each page anew: about a tenth of a guided step's time (`tools/bench_refine.py`, part step).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(mallopt(M_MMAP_MAX, 0))


def _count(file: Path) -> int:
    try:
        pairs = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("oom_kill", 0))
