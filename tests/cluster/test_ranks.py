"""Ranks: launching them, and refusing a world that is half described."""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_cluster import Slurm

from hpcguard.cluster import ranks
from hpcguard.cluster.devices import pick_device
from hpcguard.errors import InputError

WORLD = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def test_every_rank_knows_the_world(tmp_path: Path) -> None:
    code = (
        "import sys; from hpcguard.cluster.ranks import torch_rank, is_first_rank; r = torch_rank();"
        "open(f'{sys.argv[1]}/{r.rank}', 'w').write(f'{r.size} {is_first_rank()}')"
    )
    assert ranks.run_ranks([sys.executable, "-c", code, str(tmp_path)], 2, 1) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "2 True", "1": "2 False"}


def test_one_failing_rank_ends_all_with_its_status() -> None:
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert ranks.run_ranks([sys.executable, "-c", code], 2, 1) == 3
    killed = "import os, time; os.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(600)"
    assert ranks.run_ranks([sys.executable, "-c", killed], 2, 1) == 128 + 9


def test_mpiexec_ends_with_a_killed_parent(tmp_path: Path) -> None:
    rank = "import os, sys, time; open(f'{sys.argv[1]}/{os.getpid()}', 'w').close(); time.sleep(600)"
    code = (
        "import sys; from hpcguard.cluster.ranks import mpi_command, run_mpi;"
        "run_mpi(mpi_command(2, [sys.executable, '-c', *sys.argv[1:]]))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, rank, str(tmp_path)])
    try:
        wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(Path(f"/proc/{path.name}").exists() for path in tmp_path.iterdir()))


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_half_a_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WORLD:
        monkeypatch.delenv(name, raising=False)
    assert ranks.torch_rank() is None
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    assert ranks.torch_rank() == ranks.Place(1, 4, 1)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match="but not MASTER_PORT"):
        ranks.torch_rank()


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    for name in ("gpu", "meta", "cuda:999"):
        with pytest.raises(InputError, match=f"device = {name}"):
            pick_device(name)


LOOK = (
    "import os, sys; from hpcguard.cluster.ranks import torch_rank as t; p = t();"
    "open(f'{sys.argv[1]}/{p.rank}', 'w').write(f\"{p.size} {p.local_rank} {os.environ['MASTER_ADDR']} \""
    "+ os.environ['MASTER_PORT'])"
)


def test_ranks_of_mpiexec_agree_on_an_address(tmp_path: Path) -> None:
    """Two jobs on one machine at once: each has its own port."""
    commands = {}
    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
        commands[folder] = ranks.mpi_command(2, [sys.executable, "-c", LOOK, str(folder)])
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(ranks.run_mpi, commands.values())) == [0, 0]
    ports = set()
    for folder in commands:
        said = {path.name: path.read_text().split() for path in folder.iterdir()}
        assert {rank: words[:3] for rank, words in said.items()} == {
            "0": ["2", "0", "127.0.0.1"], "1": ["2", "1", "127.0.0.1"],
        }  # fmt: skip
        assert said["0"][3] == said["1"][3]
        ports.add(said["0"][3])
    assert len(ports) == 2


def test_an_mpiexec_that_is_not_mpi4pys_is_refused(tmp_path: Path) -> None:
    """Each task would train alone, all in one folder. MPICH's variables, and mpi4py's MPI is another."""
    environment = {name: value for name, value in os.environ.items() if name not in WORLD}
    environment |= {"PMI_SIZE": "2", "PMI_RANK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode
    assert "mpiexec started 2 processes, but mpi4py's MPI sees 1" in done.stderr


def test_which_launcher_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpiexec's daemons are started by srun inside a job, and srun --mpi=pmi2 sets MPICH's variables."""
    for name in (*WORLD, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    chosen = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "0") | {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
    said: list[str] = []
    monkeypatch.setattr(ranks, "_ranks_of_mpiexec", lambda: said.append("mpiexec") or chosen)
    monkeypatch.setattr(ranks, "_ranks_of_srun", lambda: said.append("srun") or chosen)
    for environment, expected in (
        ({"OMPI_COMM_WORLD_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ["mpiexec"]),
        ({"OMPI_COMM_WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ["mpiexec"]),
        ({"PMI_SIZE": "8", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ["mpiexec"]),
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, ["srun"]),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, ["srun"]),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, []),
    ):
        said.clear()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            ranks.torch_rank()
        assert said == expected, environment
        for name in WORLD:
            os.environ.pop(name, None)


def test_what_tells_the_launcher_to_stop_reaches_its_ranks(tmp_path: Path) -> None:
    """The launcher waits for what they do about it, and returns their status."""
    rank = (
        "import os, signal, sys, time; from hpcguard.cluster.told import END, TIME_IS_UP, told_by\n"
        "with told_by(END, TIME_IS_UP) as told:\n"
        "    open(f\"{sys.argv[1]}/{os.environ['RANK']}\", 'w').close()\n"
        "    while not told: time.sleep(0.01)\n"
        "    time.sleep(0.3); open(f\"{sys.argv[1]}/told{os.environ['RANK']}\", 'w').write(str(told))\n"
        "    sys.exit(75)"
    )
    launcher = (
        "import sys; from hpcguard.cluster.ranks import run_ranks;"
        f"sys.exit(run_ranks({[sys.executable, '-c', rank]!r} + sys.argv[1:], 2, 1))"
    )
    for number in (signal.SIGUSR2, signal.SIGTERM):
        folder = tmp_path / number.name
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", launcher, str(folder)])
        while len(list(folder.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == 75
        assert [(folder / f"told{each}").read_text() for each in (0, 1)] == [f"{{{int(number)}}}"] * 2


def test_tasks_of_srun_know_their_place(slurm: Slurm) -> None:
    """Real tasks on two nodes: rank and size are srun's, all meet at the first node."""
    look = "from hpcguard.cluster.ranks import torch_rank as t; import os; p = t(); " \
        "print(p.rank, p.size, p.local_rank, os.environ['MASTER_ADDR'], os.environ['SLURMD_NODENAME'])"  # fmt: skip
    command = shlex.join([sys.executable, "-c", look])
    lines = slurm.run(f"srun --nodes 2 --ntasks-per-node 2 {command}", seconds=120).splitlines()
    assert sorted(lines) == ["0 4 0 n0 n0", "1 4 1 n0 n0", "2 4 0 n0 n1", "3 4 1 n0 n1"]
