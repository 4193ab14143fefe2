"""What becomes of missing shards, class by class."""

import json
from pathlib import Path

import pytest
from slurm_cluster import Slurm

from hpcguard.cluster.dispatch import SUBMITTED_AGAIN
from hpcguard.cluster.failures import Failure, read_failures, record
from hpcguard.cluster.settle import decide, settle, settling
from hpcguard.cluster.submission import Job, Submission, new_submission, read_submissions
from hpcguard.config import ClusterConfig, Config
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder


def failure(kind: str, final: bool, memory: float | None = None, shard: int = 0) -> Failure:
    return Failure(shard, "1_0.r0.n0", kind, final, f"it was {kind}", memory_gb=memory)  # type: ignore[arg-type]


def settings(**changes: object) -> ClusterConfig:
    return ClusterConfig(slurm={"attribute": {"memory_gb": 2.0}, "rounds": 3, **changes})


AGAIN = [
    ("nothing is known", [], "", 1, 2.0),
    ("killed", [failure("killed", False)], "FAILED", 1, 2.0),
    ("killed for good in the pool", [failure("killed", True)], "FAILED", 1, 2.0),
    ("pre-empted", [failure("pre-empted", False)], "", 3, 2.0),
    ("time-out with progress", [failure("time-out", False)], "TIMEOUT", 1, 2.0),
    ("node failure", [failure("node-failure", False)], "NODE_FAIL", 2, 2.0),
    ("out of memory, smaller batches first", [failure("out-of-memory", False, 2.0)], "OUT_OF_MEMORY", 1, 2.0),
    ("then more memory", [failure("out-of-memory", False, 2.0), failure("out-of-memory", True, 2.0)], "", 2, 4.0),
    ("and more", [failure("out-of-memory", True, 2.0), failure("out-of-memory", True, 4.0)], "", 3, 8.0),
]


@pytest.mark.parametrize(("name", "own", "state", "rounds", "memory"), AGAIN, ids=[name for name, *_ in AGAIN])
def test_submitted_again(name: str, own: list[Failure], state: str, rounds: int, memory: float) -> None:
    decision = decide([0], own, {0: state} if state else {}, {0: rounds}, settings())
    assert (decision.again, decision.given_up) == ({0: memory}, {})


GIVEN_UP = [
    ("a code error", [failure("error", True)], "FAILED", 1, "it was error"),
    ("a time limit without a unit", [failure("time-out", True)], "FAILED", 1, "it was time-out"),
    ("a damaged record", [failure("unknown", True)], "", 1, "it was unknown"),
    ("cancelled by a person", [], "CANCELLED", 1, "its job was cancelled"),
    ("too often", [failure("killed", False)], "FAILED", 4, "4 submissions without progress; the last: it was killed"),
    ("too often, for no known reason", [], "", 4, "missing after 4 submissions"),
    ("a GPU too small", [failure("gpu-out-of-memory", True, 2.0)], "", 1, "cluster.slurm.constraint"),
    ("given up before", [failure("cancelled", True)], "", 1, "it was cancelled"),
    ("no memory left to give", [failure("out-of-memory", True, 8.0)], "", 2, "raise cluster.slurm.max_memory_gb"),
]


@pytest.mark.parametrize(("name", "own", "state", "rounds", "why"), GIVEN_UP, ids=[name for name, *_ in GIVEN_UP])
def test_given_up(name: str, own: list[Failure], state: str, rounds: int, why: str) -> None:
    decision = decide([0], own, {0: state} if state else {}, {0: rounds}, settings())
    assert decision.again == {}
    assert why in decision.given_up[0]


def test_shards_are_decided_one_by_one() -> None:
    own = [failure("error", True, shard=1), failure("out-of-memory", True, 2.0, shard=2)]
    decision = decide([0, 1, 2], own, {}, dict.fromkeys(range(3), 1), settings(max_memory_gb=3.0))
    assert decision.again == {0: 2.0, 2: 3.0}
    assert list(decision.given_up) == [1]


def test_memory_is_that_of_the_job_where_none_was_asked_for() -> None:
    own = [failure("out-of-memory", True, 1.5)]
    assert decide([0], own, {}, {0: 1}, ClusterConfig()).again == {0: 3.0}
    own += [failure("out-of-memory", True, memory) for memory in (3.0, 6.0)]
    assert "with 6 GiB; raise" in decide([0], own, {}, {0: 1}, ClusterConfig()).given_up[0]  # four times the first
    unknown = decide([0], [failure("out-of-memory", True)], {}, {0: 1}, ClusterConfig())
    assert "set cluster.slurm.attribute.memory_gb" in unknown.given_up[0]


def never(number: int) -> None:
    raise AssertionError("no task runs here")


@pytest.fixture
def lost(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Config, RunFolder, Submission]:
    """A run whose only submission, of an array that has ended, left shards 0 and 1 missing."""
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    run = RunFolder(tmp_path / "run")
    run.create()
    config = Config(run=run.path, cluster={"executor": "slurm", "slurm": {"options": {"hold": True}}})
    submission = new_submission(run, config, [[0], [1]], True)
    job = slurm.sbatch("exit 1", "--array=0-1", "--job-name=hpcguard-attribute-0001-0", f"--comment={run.path}")
    submission.add(Job("attribute", job, 0, 2))
    slurm.wait_for(lambda: not slurm.run(f"squeue -h -j {job}"), what="the array")
    return config, run, submission


MISSING = {0: "missing", 1: "missing"}


def test_settling_submits_again_and_only_once_though_it_is_requeued(
    slurm: Slurm, lost: tuple[Config, RunFolder, Submission]
) -> None:
    """Run again after it has submitted, as a requeued job is, it finds its successor and leaves all to that."""
    config, run, submission = lost
    waiting = slurm.sbatch("true", "--hold", "--job-name=hpcguard-refine-0001", f"--comment={run.path}")
    submission.add(Job("refine", waiting))
    try:
        assert settle(config, run, MISSING, submission, never) == SUBMITTED_AGAIN
        _, second = read_submissions(run)
        assert second.tasks == [[0], [1]]
        caretaker = next(job.job for job in second.jobs if job.kind == "consolidate")
        assert f"afterok:{caretaker}" in slurm.run(f"scontrol show job {waiting}")
        jobs = slurm.run("squeue -h -o %A").split()
        assert settle(config, run, MISSING, submission, never) == SUBMITTED_AGAIN
        assert slurm.run("squeue -h -o %A").split() == jobs
        assert len(read_submissions(run)) == 2
        assert json.loads(submission.settled.read_text())["next"] == 2
    finally:
        slurm.run("scancel --user=$(id -u -n); true")
    slurm.wait_for(lambda: not slurm.run("squeue -h"))


def test_a_refused_submission_is_taken_back_and_tried_for_a_while(
    slurm: Slurm, lost: tuple[Config, RunFolder, Submission], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sbatch takes the arrays and refuses the job behind them: nothing stays in the queue; in the end it gives up."""
    config, run, submission = lost
    settings = {"options": {"hold": True}, "consolidate": {"options": {"constraint": "no-such-feature"}}}
    config = config.model_copy(update={"cluster": ClusterConfig(executor="slurm", slurm=settings)})
    monkeypatch.setattr("hpcguard.cluster.settle.TRIES", 2)
    monkeypatch.setattr("hpcguard.cluster.settle.PAUSE_S", 0.1)
    with pytest.raises(InputError, match="feature"), settling(run, 1) as own:
        settle(config, run, MISSING, own, never)
    slurm.wait_for(lambda: not slurm.run("squeue -h"), what="the arrays to be taken back")
    assert [found.number for found in read_submissions(run)] == [1]
    assert sorted(path.parent.name for path in run.slurm.glob("*/refused.json")) == ["0002", "0003"]
    settled = json.loads(submission.settled.read_text())
    assert settled["state"] == "gave up"
    assert "feature" in settled["why"][0]


def test_what_is_given_up_is_recorded_as_failed(slurm: Slurm, lost: tuple[Config, RunFolder, Submission]) -> None:
    config, run, submission = lost
    record(run, failure("error", True, shard=0))
    config = config.model_copy(update={"cluster": ClusterConfig(executor="slurm", slurm={"rounds": 0})})
    assert settle(config, run, MISSING, submission, never) == 1
    finals = {failure.shard: failure for failure in read_failures(run) if failure.final}
    assert finals[0].message == "it was error"
    assert "without progress" in finals[1].message
    assert not slurm.run("squeue -h")
