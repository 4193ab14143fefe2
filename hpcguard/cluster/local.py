"""A bounded pool of worker processes on this machine that survives the death of any of them.

concurrent.futures gives up on all work when one worker is killed; here the task goes to a new worker instead, and
workers end with their parent, however it ends.
"""

import multiprocessing as mp
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from hpcguard.cluster.failures import Problem, is_broken_gpu, problem_of
from hpcguard.cluster.lifetime import end_with_parent
from hpcguard.cluster.memory import oom_kills
from hpcguard.errors import InputError

Report = Callable[[int], None]
Task = Callable[[Any, int, Report], None]
"""task(item, slot, report): slot is the worker's number, for choosing a GPU; report(n) tells of n more units done, and
raises Stopped where the pool is to end. Whoever waits calls report(0)."""

STOP = "stop"
BROKEN_GPU = 70  # exit status of a worker
LOOK_EVERY_S = 0.5


class Stopped(Exception):
    """The pool is to end: the task has finished its unit, and goes on another time."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    slot: int
    item: Any = None


@dataclass
class Outcome:
    done: list[Any] = field(default_factory=list)
    failed: dict[Any, Problem] = field(default_factory=dict)
    stopped: list[Any] = field(default_factory=list)  # begun or not, when the pool was told to end


@dataclass(frozen=True)
class Events:
    """What the caller of a pool is told, and asked."""

    progress: Callable[[Any, int], None]  # item, n more units
    end: Callable[[Any, Problem | None], None]  # item, why it failed
    restart: Callable[[Any, Problem], None]  # item whose worker died; it begins again
    stop: Callable[[], bool] = lambda: False  # asked every LOOK_EVERY_S: shall the pool end?


def run_local(task: Task, items: Sequence[Any], workers: int, threads: int, attempts: int, events: Events) -> Outcome:
    """Run task(item, slot, report) for every item in at most `workers` spawned processes.

    An exception fails its item at once (it would come again); a worker that dies has its item tried `attempts` times.
    Other items always go on. Raises InputError if a worker did.
    """
    pool = _Pool(task, threads, attempts, events, deque(items))
    try:
        for slot in range(min(workers, len(items))):
            pool.start(slot)
        while pool.busy():
            pool.step()
    finally:
        pool.close()
    pool.outcome.stopped += pool.waiting
    return pool.outcome


class _Pool:
    def __init__(self, task: Task, threads: int, attempts: int, events: Events, waiting: deque[Any]) -> None:
        self.task, self.threads, self.attempts, self.events, self.waiting = task, threads, attempts, events, waiting
        self.tries = dict.fromkeys(waiting, 0)
        self.workers: dict[int, _Worker] = {}
        self.outcome = Outcome()
        self.stopping = False
        self.oom_kills = oom_kills()

    def start(self, slot: int) -> None:
        self.workers[slot] = _start(self.task, slot, self.threads)
        self._assign(self.workers[slot])

    def busy(self) -> dict[Any, _Worker]:
        return {worker.pipe: worker for worker in self.workers.values() if worker.item is not None}

    def step(self) -> None:
        """Wait for news of any worker, for a moment, and deal with it."""
        busy = self.busy()
        for pipe in wait(list(busy), LOOK_EVERY_S):
            self._hear(busy[pipe])
        if not self.stopping and self.events.stop():
            self.stopping = True
            for worker in self.busy().values():
                with suppress(OSError):  # it has just died, which the next step hears of
                    worker.pipe.send(STOP)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.pipe.close()
            worker.process.kill()
            worker.process.join()

    def _hear(self, worker: _Worker) -> None:
        kind, value = _receive(worker)
        if kind == "progress":
            if value:
                self.events.progress(worker.item, value)
            return
        item, worker.item = worker.item, None
        if kind == "input-error":
            raise InputError(value)
        if kind == "died":
            value = self._death(worker)
            if self.tries[item] < self.attempts:
                self.waiting.append(item)
                self.events.restart(item, value)
            else:
                self._end(item, value)
            worker.pipe.close()
            if self.waiting and not self.stopping:
                self.start(worker.slot)
            return
        if kind == "stopped":
            self.outcome.stopped.append(item)
        else:
            self._end(item, value)
        self._assign(worker)

    def _death(self, worker: _Worker) -> Problem:
        worker.process.join()
        code = worker.process.exitcode or 0
        if code == -signal.SIGKILL and (kills := oom_kills()) > self.oom_kills:
            self.oom_kills = kills
            return Problem("out-of-memory", "the kernel killed the worker process for want of memory")
        how = f"the worker process was killed by signal {-code}" if code < 0 else f"exit status {code}"
        if code == BROKEN_GPU:
            how = "the worker's GPU failed (its output has the traceback)"
        return Problem("killed", how)

    def _end(self, item: Any, problem: Problem | None) -> None:
        if problem is None:
            self.outcome.done.append(item)
        else:
            self.outcome.failed[item] = problem
        self.events.end(item, problem)

    def _assign(self, worker: _Worker) -> None:
        if self.waiting and not self.stopping:
            worker.item = self.waiting.popleft()
            self.tries[worker.item] += 1
            worker.pipe.send(worker.item)


def cores_of_a_worker(workers: int) -> int:
    """This process's cores, divided among so many workers; at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // workers)


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        return worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        return "died", None


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
    # Slurm sends it to every process of a job that it is about to end; the parent decides, and we end with it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    import torch  # here only: who waits for workers needs none

    torch.set_num_threads(threads)

    def report(amount: int) -> None:
        pipe.send(("progress", amount))
        if pipe.poll():  # while a task runs, nothing else can come
            pipe.recv()
            raise Stopped

    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        if item == STOP:  # it crossed our last answer
            continue
        try:
            task(item, slot, report)
            pipe.send(("done", None))
        except Stopped:
            pipe.send(("stopped", None))
        except InputError as error:
            pipe.send(("input-error", str(error)))
        except Exception as error:
            if is_broken_gpu(error):  # a new process may get it back; this one would fail all that follows
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(BROKEN_GPU)
            pipe.send(("failed", problem_of(error)))
