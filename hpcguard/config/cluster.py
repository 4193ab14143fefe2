"""Where work runs: the local pool and Slurm."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from hpcguard.config.section import Section, Share

OWN_OPTIONS = frozenset(
    """array begin chdir comment dependency error export export-file get-user-env input job-name kill-on-invalid-dep
    no-requeue open-mode output parsable quiet requeue signal test-only wait wrap clusters""".split()  # noqa: SIM905
)
"""sbatch options that hpcguard sets itself, or relies on."""
OWN_KEYS = {
    "time": "minutes", "mem": "memory_gb", "nodes": "nodes", "ntasks": "tasks_per_node",
    "ntasks-per-node": "tasks_per_node", "cpus-per-task": "cpus_per_task", "gpus-per-node": "gpus_per_node",
}  # fmt: skip
"""sbatch options that have keys of their own."""


def check_plain(value: str) -> str:
    """No control characters: a line break would start another line of an sbatch script."""
    if not value or not value.isprintable():
        raise ValueError(f"{value!r}: write printable characters in one line")
    return value


def check_option(name: str) -> str:
    if not re.fullmatch("[a-z][a-z-]*", name):
        raise ValueError(f"{name!r}: write the long name of an sbatch option without --, such as mem-per-cpu")
    if name in OWN_KEYS:
        raise ValueError(f"{name}: use {OWN_KEYS[name]} of the kind of job instead")
    if name in OWN_OPTIONS:
        raise ValueError(f"{name}: hpcguard sets it itself; leave it out")
    return name


def check_variable(name: str) -> str:
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f"{name!r}: write the name of an environment variable")
    if name.startswith(("SLURM", "SBATCH", "SRUN", "SUBMITIT")) or name == "CUDA_VISIBLE_DEVICES":
        raise ValueError(f"{name}: Slurm sets it for each job; leave it out")
    return name


Plain = Annotated[str, AfterValidator(check_plain)]
Options = dict[Annotated[str, AfterValidator(check_option)], bool | int | float | Plain]


class JobConfig(Section):
    """What one kind of job asks for."""

    nodes: int = Field(1, gt=0)
    """Nodes of the job; an array task of attribution has one."""
    tasks_per_node: int = Field(1, gt=0)
    """Processes on each node, started by srun (refine: one a GPU); attribution has one, with a worker a GPU."""
    cpus_per_task: int | None = Field(None, gt=0)
    """CPU cores of each process; null: the cluster's default."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs on each node; 0: none are asked for."""
    memory_gb: float | None = Field(None, gt=0)
    """Memory on each node in GiB; null: the cluster's default."""
    minutes: int = Field(60, gt=0)
    """Time limit. Attribution and refinement that reach it are requeued and go on where they were."""
    options: Options = {}
    """Any other sbatch options of this kind of job by their long names, such as {exclusive: true}."""


class SlurmConfig(Section):
    """How jobs are submitted (cluster.executor = slurm)."""

    partition: Plain | None = None
    """sbatch --partition; null: the cluster's default."""
    account: Plain | None = None
    """sbatch --account."""
    qos: Plain | None = None
    """sbatch --qos."""
    constraint: Plain | None = None
    """sbatch --constraint, such as a100."""
    options: Options = {}
    """Any other sbatch options of all jobs by their long names, such as {reservation: week, mail-user: me@lab}."""
    modules: list[Plain] = []
    """Environment modules that a job loads first."""
    source: Path | None = None
    """A shell file that a job sources next, such as a virtual environment's bin/activate."""
    python: list[Plain] = []
    """Command of the Python that jobs run, word by word, such as [apptainer, exec, --nv, image.sif, python]; empty: the
    one that submits."""
    srun: list[Plain] = []
    """More arguments of srun, such as [--container-image=lab/image]."""
    export: list[Annotated[str, AfterValidator(check_variable)]] = []
    """Names of further environment variables that jobs inherit; no others go with them but PATH and the like."""
    shards_per_task: int | None = Field(None, gt=0)
    """Shards that an array task works through; null: one for each of its workers. More where the cluster's limits on
    jobs ask for it."""
    tasks_at_once: int = Field(64, gt=0)
    """Array tasks that run at once at the most, over all arrays of a submission."""
    signal_seconds: int = Field(90, ge=1)
    """A task is told so long before its time limit, finishes its unit of images, or its training step and a checkpoint,
    and is requeued."""
    rounds: int = Field(3, ge=0)
    """Times that missing shards are submitted again by themselves before a person must (`hpcguard retry`)."""
    max_memory_gb: float | None = Field(None, gt=0)
    """Shards that ran out of memory are submitted again with twice as much, up to this; null: four times memory_gb."""
    then: list[Literal["refine", "evaluate", "report"]] = []
    """Stages submitted with attribution to follow its consolidation, such as [refine, evaluate, report]."""
    next: Path | None = None
    """Configuration of the next round, attributed when the last of those stages has ended well."""
    next_stage: Literal["attribute", "loop"] = "attribute"
    """What is run on it; loop: the closed loop, which sets these keys of its rounds itself."""
    attribute: JobConfig = JobConfig()
    """An array task of attribution."""
    consolidate: JobConfig = JobConfig()
    """The job after the arrays: verifies, submits again what may be, consolidates; of a sweep, writes its table."""
    refine: JobConfig = JobConfig(minutes=24 * 60)
    """Training."""
    evaluate: JobConfig = JobConfig(minutes=24 * 60)
    """Evaluation and report."""

    @model_validator(mode="after")
    def _one_node_for_arrays(self) -> "SlurmConfig":
        for kind in ("attribute", "consolidate", "evaluate"):
            job: JobConfig = getattr(self, kind)
            if job.nodes * job.tasks_per_node > 1:
                raise ValueError(f"{kind}: runs in one process on one node; leave nodes and tasks_per_node at 1")
        return self


class ClusterConfig(Section):
    executor: Literal["local", "slurm"] = "local"
    """Where attribution runs: local is a bounded pool of worker processes on this machine; slurm submits array jobs,
    which cluster.slurm describes, and returns at once."""
    workers: int = Field(2, gt=0, le=1024)
    """Worker processes at once (at most one a shard), locally; an array task has one a GPU, or by cpus_per_task."""
    shards: int = Field(4, gt=0, le=100_000)
    """Shards to plan. The stored values do not depend on it."""
    threads: int = Field(1, gt=0, le=1024)
    """Torch threads of each worker process."""
    segmenters: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    """Processes of each worker that segment coming images while it explains; 0: the worker does it itself, in between.
    auto: up to 4 of the worker's share of the cores where the model runs on a GPU and segmentation does not, else 0.
    The stored values do not depend on it."""
    mpi_ranks: int = Field(1, gt=0, le=1024)
    """Ranks that consolidate starts when it is not already under mpiexec or srun."""
    attempts: int = Field(2, gt=0)
    """Times that a shard is tried at once when its worker process dies."""
    equal_errors: int = Field(3, gt=0)
    """Attribution stops when so many shards failed with the same error: the rest would too."""
    quarantine: Share = 0.01
    """Largest share of the images that may be left out because they cannot be read or explained."""
    images_per_second: float | None = Field(None, gt=0)
    """Rate of one worker, for --dry-run on a machine unlike those of the jobs; null: measured on two images."""
    slurm: SlurmConfig = SlurmConfig()
    """How jobs are submitted."""

    @property
    def workers_of_a_task(self) -> int:
        """Workers of an array task: one a GPU, else by its cores."""
        asked = self.slurm.attribute
        return asked.gpus_per_node or max(1, (asked.cpus_per_task or 1) // self.threads)
