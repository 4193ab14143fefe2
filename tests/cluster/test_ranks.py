"""Ranks: launching them, and refusing a world that is half described."""

import shlex
import sys
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


def test_launchers_that_describe_no_torch_world_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task would train alone, all in one folder."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one of 2 tasks"):
        ranks.torch_rank()


def test_tasks_of_srun_know_their_place(slurm: Slurm) -> None:
    """Real tasks on two nodes: rank and size are srun's, all meet at the first node."""
    look = "from hpcguard.cluster.ranks import torch_rank as t; import os; p = t(); " \
        "print(p.rank, p.size, p.local_rank, os.environ['MASTER_ADDR'], os.environ['SLURMD_NODENAME'])"  # fmt: skip
    command = shlex.join([sys.executable, "-c", look])
    lines = slurm.run(f"srun --nodes 2 --ntasks-per-node 2 {command}", seconds=120).splitlines()
    assert sorted(lines) == ["0 4 0 n0 n0", "1 4 1 n0 n0", "2 4 0 n0 n1", "3 4 1 n0 n1"]
