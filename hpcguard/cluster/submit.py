"""Array jobs through submitit. Each of their tasks starts with hpcguard/cluster/task.py.

submitit pickles one module-level function and one number a task; everything else a task reads from the submission's
JSON. A task looks at who owns the run folder, and who may enter it, before it unpickles anything from it.
"""

import os
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit
from submitit.core.submission import submitit_main
from submitit.core.utils import FailedJobError, FailedSubmissionError

from hpcguard.cluster import sbatch
from hpcguard.cluster.environment import only_job_environment
from hpcguard.cluster.packing import Chunk
from hpcguard.cluster.task import TOLD
from hpcguard.config import JobConfig, SlurmConfig
from hpcguard.errors import InputError
from hpcguard.runs import check_private

ENDLESS = 1_000_000  # submitit counts time-outs and gives up at three; ours requeue themselves
BY_KEYWORD = {"time": "time", "nodes": "nodes", "ntasks-per-node": "ntasks_per_node"}  # submitit writes these itself


@dataclass(frozen=True)
class Array:
    """One array job: a chunk of a submission's tasks."""

    folder: Path  # of the submission, absolute
    slurm: SlurmConfig
    name: str
    comment: str
    chunk: Chunk
    after: tuple[str, ...]  # jobs that must have ended, however
    memory_gb: float | None  # instead of the configuration's
    needs: tuple[str, ...] = ()  # jobs and tasks that must have ended well; where one has not, Slurm cancels the array
    job: JobConfig | None = None  # what a task asks for, where it is not attribution


class _Executor(submitit.SlurmExecutor):
    """submitit's, whose tasks start with ours."""

    def __init__(self, folder: Path, python: Sequence[str]) -> None:
        super().__init__(folder, max_num_timeout=ENDLESS)
        self.command = [*python, "-u", "-m", "hpcguard.cluster.task", str(folder)]

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join(self.command)


def _executor(array: Array) -> _Executor:
    if not shutil.which("srun"):
        raise InputError(
            "cluster.executor = slurm: srun is not here; run this on a machine of the cluster, or set it to local"
        )
    slurm, job = array.slurm, array.job or array.slurm.attribute
    asked = sbatch.options(slurm, job, array.memory_gb)
    if array.needs:
        asked["kill-on-invalid-dep"] = "yes"
    waits = [f"afterok:{':'.join(array.needs)}"] * bool(array.needs) + [f"afterany:{':'.join(array.after)}"] * bool(
        array.after
    )
    executor = _Executor(array.folder, sbatch.python(slurm))
    executor.update_parameters(
        **{keyword: asked.pop(option) for option, keyword in BY_KEYWORD.items()},
        job_name=array.name,
        comment=array.comment,
        wckey=None,
        array_parallelism=array.chunk.parallel,
        dependency=",".join(waits) or None,
        signal_delay_s=slurm.signal_seconds,
        setup=sbatch.setup(slurm),
        srun_args=sbatch.srun(slurm, job),
        additional_parameters=asked,
    )
    return executor


def array_text(array: Array) -> str:
    """The sbatch script that submit_array would submit."""
    executor = _executor(array)
    if array.chunk.tasks > 1:
        executor.parameters["map_count"] = array.chunk.tasks
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_array(task: Callable[[int], None], array: Array) -> str:
    """Submit task(number) for the tasks of one chunk; the job's id. InputError if Slurm refuses it."""
    executor = _executor(array)
    numbers = list(range(array.chunk.first, array.chunk.first + array.chunk.tasks))
    try:
        with only_job_environment(array.slurm.export):
            jobs = executor.map_array(task, numbers)
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        # The caller looks whether Slurm has it all the same: sbatch may only have waited too long for an answer.
        for orphan in array.folder.glob("[0-9a-f]" * 32 + ".pkl"):
            orphan.unlink()
        reason = str(error).strip().splitlines()[-1]
        raise InputError(f"sbatch refused an array of {len(numbers)} tasks: {reason}; change cluster.slurm") from error
    return str(jobs[0].job_id).partition("_")[0]


def own_submission() -> Path:
    """RUN/slurm/NUMBER of the array task that this process is."""
    return Path(submitit.JobEnvironment().paths.folder)


def own_log() -> str:
    """The file that this task's output goes to."""
    return str(submitit.JobEnvironment().paths.stdout)


def told_to_stop() -> bool:
    """Whether Slurm has sent its warning: time is nearly up, or another job needs the nodes."""
    return signal.sigtimedwait({TOLD}, 0) is not None


def run_task(folder: Path) -> None:
    """Run the array task that this process is."""
    os.umask(0o077)
    for inside in (folder.parents[1], folder.parent, folder):
        check_private(inside)
    submitit_main()
