"""The local pool: bounded, and alive after its workers are killed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from hpcguard.cluster.failures import Problem
from hpcguard.cluster.local import Events, Outcome, Report, run_local
from hpcguard.errors import InputError


def task(folder: Path, item: str, slot: int, report: Report) -> None:
    with (folder / f"{item}.starts").open("a") as file:
        file.write(f"{os.getpid()} {slot} {torch.get_num_threads()}\n")
    report(1)
    if item.startswith("error"):
        raise ValueError("this item is broken")
    if item.startswith("input"):
        raise InputError("data.root: wrong")
    if item.startswith("killed") and len((folder / f"{item}.starts").read_text().splitlines()) <= int(item[-1]):
        os.kill(os.getpid(), signal.SIGKILL)
    if item.startswith("slow"):
        time.sleep(0.3)
    if item.startswith("endless"):
        time.sleep(600)
    (folder / f"{item}.done").touch()


def run(folder: Path, items: list[str], workers: int = 2) -> tuple[Outcome, list[tuple[str, int]]]:
    progress: list[tuple[str, int]] = []
    events = Events(
        progress=lambda item, n: progress.append((item, n)),
        end=lambda *_: None,
        restart=lambda item, problem: progress.append((item, 0)),
    )
    outcome = run_local(partial(task, folder), items, workers, 1, 2, events)
    return outcome, progress


def test_all_items_are_done_by_at_most_so_many_workers(tmp_path: Path) -> None:
    items = [f"slow{k}" for k in range(5)]
    outcome, progress = run(tmp_path, items)
    assert sorted(outcome.done) == items
    assert outcome.failed == {}
    assert sorted(progress) == [(item, 1) for item in items]
    starts = [path.read_text().split() for path in tmp_path.glob("*.starts")]
    assert len({pid for pid, _, _ in starts}) == 2
    assert {slot for _, slot, _ in starts} == {"0", "1"}
    assert {threads for *_, threads in starts} == {"1"}


def test_an_error_fails_its_item_only_and_is_not_repeated(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, ["error", "a", "b"])
    assert sorted(outcome.done) == ["a", "b"]
    problem = outcome.failed["error"]
    assert (problem.kind, problem.message) == ("error", "ValueError: this item is broken")
    assert "test_local.py" in problem.tail
    assert len((tmp_path / "error.starts").read_text().splitlines()) == 1


def test_a_killed_worker_is_replaced_and_its_item_tried_again(tmp_path: Path) -> None:
    outcome, progress = run(tmp_path, ["killed1", "a", "b"])
    assert sorted(outcome.done) == ["a", "b", "killed1"]
    assert [n for item, n in progress if item == "killed1"] == [1, 0, 1]


def test_an_item_that_always_kills_its_worker_fails_alone(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, ["killed9", "a", "b"])
    assert sorted(outcome.done) == ["a", "b"]
    assert outcome.failed == {"killed9": Problem("killed", "the worker process was killed by signal 9")}
    assert len((tmp_path / "killed9.starts").read_text().splitlines()) == 2


def test_bad_input_stops_everything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root: wrong"):
        run(tmp_path, ["input", "slow"], workers=1)
    assert not (tmp_path / "slow.done").exists()


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += f"from pathlib import Path; import test_local; test_local.run(Path({str(tmp_path)!r}), ['endless'])"
    parent = subprocess.Popen([sys.executable, "-c", code])
    starts = tmp_path / "endless.starts"
    deadline = time.monotonic() + 60
    while not (starts.exists() and starts.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int(starts.read_text().split()[0])
    parent.kill()
    parent.wait()
    while time.monotonic() < deadline and _alive(worker):
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


HOG = """
import sys
from pathlib import Path
from hpcguard.cluster.local import Events, run_local


def task(item, slot, report):
    if item == "hog":
        bytearray(3 << 30)[:] = b"x" * (3 << 30)


if __name__ == "__main__":
    told = []
    events = Events(lambda *_: None, lambda *_: None, lambda item, problem: told.append(problem.kind))
    outcome = run_local(task, ["hog", "modest"], 1, 1, 2, events)
    print(outcome.done, [problem.kind for problem in outcome.failed.values()], told)
"""


def test_a_worker_killed_by_the_kernel_for_its_memory_is_told_from_other_kills(tmp_path: Path) -> None:
    """In a real memory cgroup, as Slurm makes one for a job."""
    group = Path(f"/sys/fs/cgroup/memory/hpcguard-test-{os.getpid()}")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2 << 30))
    except OSError as error:
        pytest.skip(f"cannot make a memory cgroup (version 1) here: {error}")
    (tmp_path / "hog.py").write_text(HOG)
    command = f"echo $$ > {group}/cgroup.procs && exec '{sys.executable}' {tmp_path}/hog.py"
    try:
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    finally:
        while (group / "cgroup.procs").read_text():  # multiprocessing's helpers end a moment later
            time.sleep(0.05)
        group.rmdir()
    assert done.stdout == "['modest'] ['out-of-memory'] ['out-of-memory']\n"
