"""The environment that jobs and Slurm's commands get: an allow-list.

sbatch hands its own environment to the job. What a surrounding job left there would mislead the new one (a leaked
SLURM_ARRAY_TASK_ID makes it do another job's work), SBATCH_* would override the script, SQUEUE_FORMAT and the like
would change what is parsed here, and secrets would be written to the disks of the cluster. So only what is known to be
needed passes. A user passes more, secrets too, by naming it: `cluster.slurm.export: [WANDB_API_KEY]`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hpcguard.errors import InputError

KEPT = frozenset({
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "BASH_ENV", "SLURM_CONF",
    "LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH", "CC", "CXX", "VIRTUAL_ENV", "MAMBA_EXE", "MAMBA_ROOT_PREFIX",
    "MODULEPATH", "MODULESHOME", "LOADEDMODULES", "_LMFILES_",
    "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "CUDA_DEVICE_ORDER", "TORCH_HOME", "TORCH_EXTENSIONS_DIR",
    "TORCH_CUDA_ARCH_LIST", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
})  # fmt: skip
KEPT_PREFIXES = (
    "LC_", "PYTHON", "CONDA_", "MODULES_", "LMOD_", "__LMOD_", "__MODULES_", "_LMFILES_", "_ModuleTable", "BASH_FUNC_",
    "NCCL_", "GLOO_", "UCX_", "FI_",
)  # fmt: skip

SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|KEY|AUTH", re.I)  # a prefix says little of what follows it
JOBS_OWN = re.compile(
    r"(SLURM|SBATCH_|SRUN_|SUBMITIT|MASTER_|LOCAL_|PMI|HPCGUARD_).*|RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES"
)


def job_environment(extra: Sequence[str] = ()) -> dict[str, str]:
    """What of this process's environment a job is given; `extra`: further variables, passed where they are set.

    Raises InputError for an extra name that is none, or that every job must get afresh.
    """
    for name in extra:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InputError(f"cluster.slurm.export = {name}: write names of environment variables, without values")
        if JOBS_OWN.fullmatch(name):
            raise InputError(f"cluster.slurm.export = {name}: every job gets its own; remove it")
    return {name: value for name, value in os.environ.items() if name in extra or _is_kept(name)}


def check_tasks(world: int) -> None:
    """InputError where srun started several tasks, and this one is alone in its MPI world: each would do all the work.

    world: its size. srun without --mpi makes such tasks, and so does an MPI without support for the one given.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if tasks > 1 and world == 1 and "SLURM_PROCID" in os.environ:
        raise InputError(
            f"srun started {tasks} tasks, and MPI knows of one: start them with `srun --mpi=pmix "
            "--kill-on-bad-exit=1` (`srun --mpi=list` shows what there is), or with `mpiexec`"
        )


@contextmanager
def only_job_environment(extra: Sequence[str] = ()) -> Iterator[None]:
    """os.environ is job_environment(extra) for the block: submitit calls sbatch with os.environ."""
    kept, before = job_environment(extra), dict(os.environ)
    try:
        _replace_environment(kept)
        yield
    finally:
        _replace_environment(before)


@contextmanager
def outside_step() -> Iterator[None]:
    """os.environ without what srun told this task, for the block: commands of this job that start ranks themselves."""
    before = dict(os.environ)
    own = {name for name in before if JOBS_OWN.fullmatch(name)} - {"SLURM_CONF", "CUDA_VISIBLE_DEVICES"}
    try:
        _replace_environment({name: value for name, value in before.items() if name not in own})
        yield
    finally:
        _replace_environment(before)


def _is_kept(name: str) -> bool:
    return name in KEPT or (name.startswith(KEPT_PREFIXES) and not SECRET.search(name))


def _replace_environment(values: dict[str, str]) -> None:
    for name in os.environ.keys() - values.keys():
        del os.environ[name]
    os.environ.update(values)
