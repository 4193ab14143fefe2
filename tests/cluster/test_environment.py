"""What jobs are given of an environment."""

import os
import subprocess

import pytest

from hpcguard.cluster.environment import job_environment, only_job_environment
from hpcguard.errors import InputError

NEEDED = {
    "PATH": "/opt/bin:/usr/bin:/bin",
    "HOME": "/home/ada",
    "LC_ALL": "C.UTF-8",
    "LD_LIBRARY_PATH": "/opt/lib",
    "VIRTUAL_ENV": "/home/ada/venv",
    "CONDA_PREFIX": "/home/ada/conda",
    "PYTHONPATH": "/home/ada/src",
    "SLURM_CONF": "/etc/slurm/slurm.conf",
    "LOADEDMODULES": "cuda/12.4",
    "BASH_FUNC_module%%": "() { :; }",
    "CUDA_HOME": "/usr/local/cuda",
}
OTHERS = (
    *("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_MEM_PER_NODE", "SLURM_CLUSTERS", "SLURMD_NODENAME", "SRUN_DEBUG"),
    *(
        "SBATCH_PARTITION",
        "SQUEUE_FORMAT",
        "SACCT_FORMAT",
        "SCANCEL_STATE",
        "SUBMITIT_EXECUTOR",
        "CUDA_VISIBLE_DEVICES",
    ),
    *(
        "MASTER_ADDR",
        "MASTER_PORT",
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_RANK",
        "PMI_RANK",
        "PMIX_RANK",
    ),
    *("HPCGUARD_PARENT", "HPCGUARD_FAULTS", "DISPLAY"),
    *("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "HF_TOKEN", "GITHUB_TOKEN", "KRB5CCNAME"),
    *("LC_MY_TOKEN", "CONDA_TOKEN", "PYTHON_PASSWORD"),  # prefixes that pass, secrets that do not
)


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in {**NEEDED, **dict.fromkeys(OTHERS, "1")}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("surroundings")
def test_only_what_is_needed_passes_and_what_is_named() -> None:
    assert job_environment() == NEEDED
    assert job_environment(["WANDB_API_KEY", "NOT_SET"]) == {**NEEDED, "WANDB_API_KEY": "1"}


@pytest.mark.usefixtures("surroundings")
def test_the_process_has_only_that_for_the_block_even_if_it_fails() -> None:
    before = dict(os.environ)
    with pytest.raises(ZeroDivisionError), only_job_environment(["HF_TOKEN"]):
        # a child asks the process's real environment, not Python's copy
        shown = subprocess.run(["/usr/bin/env", "-0"], capture_output=True, check=True).stdout.decode()
        os.environ["LEFT_BEHIND"] = "1"
        raise ZeroDivisionError
    given = dict(entry.split("=", 1) for entry in shown.split("\0")[:-1])
    given = {name: given[name] for name in given.keys() - {"LINES", "COLUMNS"}}  # readline's, unknown to Python
    assert given == {**NEEDED, "HF_TOKEN": "1"}
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SLURM_JOB_ID", "every job gets its own"),
        ("SLURMD_NODENAME", "every job gets its own"),
        ("SUBMITIT_EXECUTOR", "every job gets its own"),
        ("CUDA_VISIBLE_DEVICES", "every job gets its own"),
        ("RANK", "every job gets its own"),
        ("A=1", "names of environment variables"),
        ("2FAST", "names of environment variables"),
        ("", "names of environment variables"),
    ],
)
def test_names_that_cannot_be_passed(name: str, said: str) -> None:
    before = dict(os.environ)
    with pytest.raises(InputError, match=rf"^cluster\.slurm\.export = {name}: .*{said}"), only_job_environment([name]):
        pass
    assert dict(os.environ) == before
