"""`hpcguard cancel` on a real Slurm: this run's jobs and no others, and nothing that waits for them starts."""

from pathlib import Path

import pytest
from slurm_cluster import Slurm

from hpcguard.cancel import order
from hpcguard.cli import main
from hpcguard.cluster.slurm import QueuedJob


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    return slurm


def run_folder(path: Path) -> Path:
    path.mkdir(mode=0o700)
    (path / "config.yaml").write_text("data: {name: digits}\n")
    return path


def test_it_cancels_the_jobs_of_this_run_alone(
    tmp_path: Path, cluster: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "run2")
    trace = tmp_path / "trace"
    comment = f"--comment={run}"
    array = cluster.sbatch("sleep 60", "--array=0-3%1", "--job-name=hpcguard-attribute-0003-0", comment)
    after = cluster.sbatch(
        f"touch {trace}", f"--dependency=afterany:{array}", "--job-name=hpcguard-consolidate-0003", comment
    )
    same_name = cluster.sbatch("sleep 60", "--job-name=hpcguard-attribute-0003-0", f"--comment={other}")
    try:
        cluster.wait_for(lambda: cluster.state(f"{array}_0") == "RUNNING")
        assert main(["cancel", str(run), "--dry-run"]) == 0
        listed = capsys.readouterr().out
        assert f"{array:<9} attribute    submission 0003  3 PENDING, 1 RUNNING" in listed
        assert f"{after:<9} consolidate  submission 0003  1 PENDING" in listed
        assert "2 jobs (5 tasks)" in listed
        assert len(cluster.run(f"squeue -h -r -j {array},{after}").splitlines()) == 5
        assert main(["cancel", str(run)]) == 0
        cluster.wait_for(lambda: cluster.run("squeue -h -o %i").split() == [same_name])
        assert cluster.state(after) == "CANCELLED"
        assert not trace.exists()
        capsys.readouterr()
        assert main(["cancel", str(run)]) == 0
        assert capsys.readouterr().out == f"cancel: no job of {run} is in Slurm's queue\n"
    finally:
        cluster.run(f"scancel {array} {after} {same_name}")
    cluster.wait_for(lambda: not cluster.run("squeue -h"))


def test_without_slurm_or_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run")
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["cancel", str(run)]) == 2
    assert "squeue" in capsys.readouterr().err
    assert main(["cancel", str(tmp_path / "none")]) == 2


def test_attribution_is_cancelled_last() -> None:
    """What waits for another's end must be gone before it, however slowly a controller takes them one by one."""
    names = (("12", "attribute-0001-0"), ("13", "attribute-0001-6"), ("15", "consolidate-0001"), ("16", "refine-0001"))
    jobs = [QueuedJob(id, id, None, "PENDING", "None", f"hpcguard-{name}", "/run") for id, name in names]
    assert order(jobs, "attribute") == ["16", "15", "13", "12"]


def test_of_a_sweep_the_newest_is_cancelled_first() -> None:
    """A store waits for an older training, and is waited for by newer ones."""
    names = (("12", "refine-0001-0"), ("9", "refine-0001-1"), ("13", "attribute-0001-2"), ("14", "report-0001"))
    jobs = [QueuedJob(id, id, None, "PENDING", "None", f"hpcguard-{name}", "/sweep") for id, name in names]
    assert order(jobs, "") == ["14", "13", "12", "9"]
