"""A bounded pool of worker processes on this machine that survives the death of any of them.

concurrent.futures gives up on all work when one worker is killed; here the task goes to a new worker instead, and
workers end with their parent, however it ends.
"""

import multiprocessing as mp
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from hpcguard.cluster.lifetime import end_with_parent
from hpcguard.errors import InputError

Report = Callable[[int], None]
Task = Callable[[Any, int, Report], None]
"""task(item, slot, report): slot is the worker's number, for choosing a GPU; report(n) tells of n more units done."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    slot: int
    item: Any = None


@dataclass
class Outcome:
    done: list[Any] = field(default_factory=list)
    failed: dict[Any, str] = field(default_factory=dict)  # item: what happened


def run_local(
    task: Task, items: Sequence[Any], workers: int, threads: int, attempts: int,
    on_progress: Callable[[Any, int], None], on_end: Callable[[Any, str | None], None],
) -> Outcome:  # fmt: skip
    """Run task(item, slot, report) for every item in at most `workers` spawned processes.

    An exception fails its item at once (it would come again); a worker that dies has its item tried `attempts` times.
    Other items always go on. Raises InputError if a worker did.
    """
    waiting = deque(items)
    tries = dict.fromkeys(items, 0)
    outcome = Outcome()
    pool: dict[int, _Worker] = {}
    try:
        for slot in range(min(workers, len(items))):
            pool[slot] = _start(task, slot, threads)
        for worker in pool.values():
            _assign(worker, waiting, tries)
        while busy := {worker.pipe: worker for worker in pool.values() if worker.item is not None}:
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                kind, value = _receive(worker)
                if kind == "progress":
                    on_progress(worker.item, value)
                    continue
                item, worker.item = worker.item, None
                if kind == "input-error":
                    raise InputError(value)
                if kind == "died":
                    pool[worker.slot] = worker = _start(task, worker.slot, threads)
                    if tries[item] < attempts:
                        waiting.append(item)
                        on_progress(item, 0)
                        _assign(worker, waiting, tries)
                        continue
                if kind == "done":
                    outcome.done.append(item)
                else:
                    outcome.failed[item] = value
                on_end(item, None if kind == "done" else value)
                _assign(worker, waiting, tries)
    finally:
        for worker in pool.values():
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()
    return outcome


def cores_of_a_worker(workers: int) -> int:
    """This process's cores, divided among so many workers; at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // workers)


def _assign(worker: _Worker, waiting: deque[Any], tries: dict[Any, int]) -> None:
    if waiting:
        worker.item = waiting.popleft()
        tries[worker.item] += 1
        worker.pipe.send(worker.item)


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.process.join()
        code = worker.process.exitcode
        how = f"the worker process was killed by signal {-code}" if code and code < 0 else f"exit status {code}"
        return "died", how


def _start(task: Task, slot: int, threads: int) -> _Worker:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    # Not daemonic: a task may start processes of its own. It ends with us all the same: see _serve and run_local.
    process = context.Process(target=_serve, args=(task, slot, threads, theirs, os.getpid()), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours, slot)


def _serve(task: Task, slot: int, threads: int, pipe: Connection, parent: int) -> None:
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent ends us in order
    torch.set_num_threads(threads)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            task(item, slot, lambda amount: pipe.send(("progress", amount)))
            pipe.send(("done", None))
        except InputError as error:
            pipe.send(("input-error", str(error)))
        except Exception:
            pipe.send(("failed", traceback.format_exc()))
