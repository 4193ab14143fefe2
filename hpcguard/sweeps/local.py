"""Jobs as hpcguard commands on this machine, so many at once."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from hpcguard.cluster.evidence import log_tail
from hpcguard.cluster.lifetime import owned_environment
from hpcguard.cluster.told import END, TIME_IS_UP, told_by
from hpcguard.config import Config
from hpcguard.runs import claimed, write_json
from hpcguard.sweeps.evidence import has_its_bytes, is_done
from hpcguard.sweeps.folder import SweepFolder, measured_alike, write_yaml
from hpcguard.sweeps.jobs import Graph, Job, Kind, command, job_config
from hpcguard.sweeps.ready import Ready

LOOK_EVERY_S = 0.05
STOP_S = 120.0  # for a training step and a checkpoint, then they are killed


@dataclass
class Outcome:
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # job: why
    held_up: set[str] = field(default_factory=set)
    stopped: bool = False


@dataclass
class _Child:
    batch: list[Job]
    name: str
    process: subprocess.Popen[bytes]
    started: float
    slot: int
    locks: ExitStack


Hear = Callable[[str, list[Job], float, str], None]
"""hear(what, jobs, seconds, why): what is started, done or failed."""


@dataclass
class LocalRun:
    """Jobs of one sweep in processes here. They end with this process, however it ends."""

    folder: SweepFolder
    base: Config
    graph: Graph
    max_jobs: int
    gpus: int
    hear: Hear
    told_to_stop: Callable[[], bool] = lambda: False  # asked besides the signals; once true, always true
    outcome: Outcome = field(default_factory=Outcome)
    children: list[_Child] = field(default_factory=list)

    def do(self, ready: Ready) -> Outcome:
        """Do all jobs that can be done; a failed one holds up only what needs it."""
        with told_by(END, TIME_IS_UP) as told:
            try:
                while not (told or self.told_to_stop()) and self._fill(ready):
                    time.sleep(LOOK_EVERY_S)
                    self.outcome.stopped = bool(told)  # scancel tells the children too: what it ended has not failed
                    self._settle(ready)
            finally:
                self.outcome.stopped = bool(told) or self.told_to_stop()
                self._stop(ready)
        return self.outcome

    def _fill(self, ready: Ready) -> bool:
        """Start what may start; whether anything runs."""
        while len(self.children) < self.max_jobs and (batch := ready.take()):
            self.children.append(self._start(batch))
        return bool(self.children)

    def _start(self, batch: list[Job]) -> _Child:
        name = batch[0].name + (f"+{len(batch) - 1}" if len(batch) > 1 else "")
        slot = min(set(range(self.max_jobs)) - {child.slot for child in self.children})
        file = self.folder.config(name)
        config = job_config(self.folder.path, self.base, batch, self.graph.inputs)
        words = [*command(file, batch), *on_gpu(config, batch[0].kind, slot, self.gpus)]
        line = shlex.join(["hpcguard", *words])
        write_yaml(file, config, f"# {line}\n")
        locks = ExitStack()
        for job in batch:
            locks.enter_context(claimed(self.folder.lock(job.name)))
        with self.folder.log(name).open("ab") as log:
            log.write(f"$ {line}\n".encode())
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "hpcguard", *words], stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env=owned_environment(),
                start_new_session=True,  # Ctrl-C comes to us alone, and we let it save
            )  # fmt: skip
        self.hear("started", batch, 0.0, "")
        return _Child(batch, name, process, time.monotonic(), slot, locks)

    def _settle(self, ready: Ready) -> None:
        """Deal with the processes that have ended."""
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self._end(child, ready)
            child.locks.close()

    def _end(self, child: _Child, ready: Ready) -> None:
        seconds = time.monotonic() - child.started
        done = [job for job in child.batch if self._is_done(job, child)]
        for job in done:
            self._record(job, child, 0, seconds / len(child.batch), "")
            self.outcome.done += 1
            ready.done(job.name)
        if done:
            self.hear("done", done, seconds, "")
        left = [job for job in child.batch if job not in done]
        if self.outcome.stopped or not left:
            return
        if len(child.batch) > 1:  # one of them may have stopped the others
            for job in left:
                ready.again_alone(job)
            return
        why = _why(child, log_tail(self.folder.log(child.name)))
        self._record(left[0], child, child.process.returncode or 1, seconds, why)
        self.outcome.failed[left[0].name] = why
        self.outcome.held_up |= ready.held_up_by(left[0].name)
        self.hear("failed", left, seconds, why)

    def _is_done(self, job: Job, child: _Child) -> bool:
        """By its files. A process that ended badly may have done some of several jobs: then their bytes must fit."""
        if child.process.returncode and len(child.batch) == 1:
            return False
        if child.process.returncode and job.kind == "refine" and not has_its_bytes(self.folder.run(job), job.arm):
            return False
        return is_done(self.folder, job, measured_alike(self.base))

    def _record(self, job: Job, child: _Child, status: int, seconds: float, why: str) -> None:
        values: dict[str, Any] = {"status": status, "seconds": round(seconds, 2), "why": why}
        write_json(
            self.folder.record(job.name), {**values, "log": str(self.folder.log(child.name)), "time": time.time()}
        )

    def _stop(self, ready: Ready) -> None:
        """Tell what still runs to end, wait for it, and count what it has done all the same."""
        if not self.children:
            return
        self.outcome.stopped = True
        for child in self.children:
            child.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + STOP_S
        for child in self.children:
            try:
                child.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._settle(ready)


def on_gpu(config: Mapping[str, Any], kind: Kind, slot: int, gpus: int) -> list[str]:
    """The override that gives the processes of a slot their GPU: where there are several, and a job has one process."""
    if kind == "refine":
        processes = max(arm["processes"] for arm in config["controls"].values())
    else:
        processes = config["evaluation" if kind == "evaluate" else "cluster"]["workers"]
    return [f"device=cuda:{slot % gpus}"] if config["device"] == "auto" and gpus > 1 and processes == 1 else []


def _why(child: _Child, tail: str) -> str:
    code = child.process.returncode
    lines = [line for line in tail.splitlines() if line.strip() and not line.startswith("$ ")]
    last = lines[-1].strip() if lines else "it said nothing"
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name}); its last line: {last}"
    return last if code else f"ended well, but its files are not there; its last line: {last}"


def seconds_by_kind(records: Mapping[str, Mapping[str, Any]], graph: Graph) -> dict[str, list[float]]:
    """Seconds of the jobs that have ended well, by kind."""
    found: dict[str, list[float]] = {}
    for name, record in records.items():
        if record.get("status") == 0:
            found.setdefault(graph.jobs[name].kind, []).append(record["seconds"])
    return found
