"""Refinement on a real Slurm: warned of its time limit it saves, is requeued, and ends with the same bits."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from conftest import REPOSITORY
from slurm_cluster import Slurm

from hpcguard.cli import run_stage

CHANGES = ["refinement.engine=torch", "refinement.epochs=40", "refinement.log_every=1", "data.validation=0"]


def test_a_job_that_is_warned_goes_on_where_it_was(slurm: Slurm, tmp_path: Path, attributed: Path) -> None:
    whole, run = tmp_path / "whole", slurm.work / "warned"
    for copy in (whole, run):
        shutil.copytree(attributed, copy)
    environment = {**slurm.env, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [
        "sbatch", "--parsable", "--ntasks=1", "--output=warned.out", "--open-mode=append",
        str(REPOSITORY / "slurm/refine.sh"), str(run), "--arm", "pgd", *CHANGES,
    ]  # fmt: skip
    job = slurm.run(shlex.join(command), environment=environment)
    arm = run / "checkpoints/pgd"
    try:
        slurm.wait_for(lambda: list(arm.glob("state-*")), 60, "the first checkpoint")
        slurm.run(f"scancel --signal=USR2 {job}")  # as --signal in slurm/refine.sh has Slurm do before the limit
        slurm.wait_for(lambda: " Restarts=1 " in slurm.run(f"scontrol show job {job}"), 60, "a requeue")
        slurm.wait_for((arm / "model.safetensors").exists, 120, "the end of the second start")
        slurm.wait_for(lambda: slurm.state(job) == "COMPLETED", 30, "the end of the job")
    finally:
        slurm.run(f"scancel {job}")
    said = (slurm.work / "warned.out").read_text()
    assert "was told to stop and is saved after step" in said
    assert said.count("pgd trained, ") == 1
    steps = [json.loads(line)["step"] for line in (arm / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert run_stage("refine", [str(whole), "--arm", "pgd", *CHANGES]) == 0
    other = whole / "checkpoints/pgd/model.safetensors"
    assert (arm / "model.safetensors").read_bytes() == other.read_bytes()
