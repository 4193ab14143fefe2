"""Text of sbatch scripts: options, environment, and the jobs that follow attribution."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcguard.config import JobConfig, SlurmConfig

Value = bool | int | float | str


def options(slurm: SlurmConfig, job: JobConfig, memory_gb: float | None = None) -> dict[str, Value]:
    """sbatch's long options, without --, that a configuration asks for; memory_gb instead of the job's own."""
    memory = memory_gb or job.memory_gb
    asked: dict[str, Value | None] = {
        "time": job.minutes,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "cpus-per-task": job.cpus_per_task,
        "gpus-per-node": job.gpus_per_node or None,
        "mem": None if memory is None else f"{round(memory * 1024)}M",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "requeue": True,
        **slurm.options,
        **job.options,
    }
    if memory_gb not in (None, job.memory_gb):  # raised after a lack of it: what else says of memory would contradict
        asked = {name: value for name, value in asked.items() if not name.startswith("mem-")}
    return {name: value for name, value in asked.items() if value is not None and value is not False}


def setup(slurm: SlurmConfig) -> list[str]:
    """Shell lines that prepare a job; it ends where one fails. Everything from the configuration is quoted."""
    commands = [f"module load {shlex.quote(name)}" for name in slurm.modules]
    if slurm.source:
        commands.append(f". {shlex.quote(str(slurm.source.expanduser().resolve()))}")
    return [
        f"{command} || {{ echo {shlex.quote(f'hpcguard: failed: {command}')} >&2; exit 1; }}" for command in commands
    ]


def python(slurm: SlurmConfig) -> list[str]:
    """The words that start Python in a job."""
    return [*slurm.python] if slurm.python else [sys.executable]


def srun(slurm: SlurmConfig, job: JobConfig) -> list[str]:
    """srun's own arguments: it takes --cpus-per-task from the job no more (since Slurm 22.05)."""
    cpus = [f"--cpus-per-task={job.cpus_per_task}"] if job.cpus_per_task else []
    return [*cpus, *slurm.srun]


def script(asked: Mapping[str, Value], before: Sequence[str], commands: Sequence[str]) -> str:
    """An sbatch script."""
    lines = [f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={shlex.quote(str(value))}"
             for name, value in sorted(asked.items())]  # fmt: skip
    return "\n".join(["#!/bin/bash", *lines, *before, "set -e", *commands, ""])


def stage(slurm: SlurmConfig, name: str, config: Path, *more: str) -> str:
    """A shell command that runs a stage."""
    return shlex.join([*python(slurm), "-m", f"hpcguard.{name}", str(config), *more])
