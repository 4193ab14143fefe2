"""A real Slurm cluster for tests, by tools/mini_slurm: fixture `slurm`, two nodes n0 and n1, shared by a session."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "mini_slurm"
PATH = f"{os.environ['PATH']}:/usr/local/sbin:/usr/sbin:/sbin"


def need(**programs: str) -> None:
    """Skip where a program is missing: need(munged="munge")."""
    missing = sorted({package for program, package in programs.items() if not shutil.which(program, path=PATH)})
    if missing:
        pytest.skip(f"needs system package {', '.join(missing)}")


def need_slurm() -> None:
    need(munged="munge", slurmctld="slurm-wlm", slurmd="slurm-wlm", sinfo="slurm-wlm")


def need_accounting() -> None:
    need_slurm()
    need(slurmdbd="slurmdbd", mariadbd="mariadb-server-core", my_print_defaults="mariadb-client-core")


def clean_environment() -> dict[str, str]:
    """The environment without what a surrounding job or cluster would tell Slurm's commands."""
    prefixes = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def tool(*arguments: object, tool: Path = TOOL, **more: object) -> subprocess.CompletedProcess[str]:
    """mini_slurm ARGUMENTS, in a clean environment."""
    options = {"env": clean_environment(), "capture_output": True, "text": True, "timeout": 120, **more}
    return subprocess.run([sys.executable, str(tool), *map(str, arguments)], **options)


class Slurm:
    """One running cluster."""

    def __init__(self, *options: object) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-")).resolve()
        self.work = Path(tempfile.mkdtemp(prefix="slurm-work-")).resolve()  # for jobs: scripts and output
        done = self.tool("start", *options)
        assert done.returncode == 0, done.stderr
        self.started = done.stdout
        self.env = {**clean_environment(), "SLURM_CONF": str(self.folder / "clients.conf")}

    def tool(self, verb: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return tool(verb, *arguments, "--folder", self.folder)

    def run(self, command: str, seconds: float = 30, given: str = "", environment: dict[str, str] | None = None) -> str:
        """A shell command of the cluster's, in its work folder, given this on standard input; its output."""
        options = {
            "env": environment or self.env,
            "cwd": self.work,
            "capture_output": True,
            "text": True,
            "timeout": seconds,
        }
        done = subprocess.run(["bash", "-c", command], input=given, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a bash script; the job's id. Its output goes to work/JOB.out (ARRAY_TASK.out)."""
        output = "%A_%a.out" if any(option.startswith("--array") for option in options) else "%j.out"
        command = ["sbatch", "--parsable", f"--output={output}", "--open-mode=append", *options]
        return self.run(shlex.join(command), given=f"#!/bin/bash\n{script}\n")

    @property
    def separate(self) -> bool:
        """Whether each node has a host name of its own."""
        return bool(json.loads((self.folder / "cluster.json").read_text())["namespaces"])

    def state(self, job: str) -> str:
        """As squeue has it; empty for a job that it has forgotten."""
        return self.run(f"squeue -h -t all -j {job} -o %T")

    def node_state(self, node: str) -> str:
        return self.run(f"sinfo -h -p normal -n {node} -o %T")

    @staticmethod
    def wait_for(condition: Callable[[], object], seconds: float = 30, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what or condition}"
            time.sleep(0.1)

    def stop(self) -> None:
        done = self.tool("stop")
        shutil.rmtree(self.work)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes with 2 CPUs, 4000 MB and 2 fake GPUs each. Leave it as you found it: no jobs, nodes up."""
    need_slurm()
    shape = ("--nodes", 2, "--cpus", 2, "--memory", 4000, "--gpus", 2, "--max-array-size", 6)
    cluster = Slurm(*shape, "--grace", 2, "--set", "KillWait=1")
    yield cluster
    cluster.stop()
