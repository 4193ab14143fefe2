"""What the kernel says of memory: whether it has killed processes of this job."""

from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


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


def _count(file: Path) -> int:
    try:
        pairs = dict(line.split() for line in file.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        return 0
    return int(pairs.get("oom_kill", 0))
