"""Slurm's commands, by a real Slurm."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Slurm, need_accounting

import hpcguard
from hpcguard.cluster import slurm as commands
from hpcguard.cluster.slurm import Limits, QueuedJob
from hpcguard.errors import InputError

ROOT = Path(hpcguard.__file__).parents[1]
SLEEP = "exec sleep 300"


@pytest.fixture
def cluster(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The shared cluster, which hpcguard's calls in this process reach; given back without jobs."""
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    yield slurm
    slurm.run("squeue --me -h -o %A | sort -u | xargs -r scancel")
    slurm.wait_for(lambda: not slurm.run("squeue --me -h"), what="no jobs")


def python(line: str) -> str:
    """A shell command that runs this line with `slurm` imported."""
    code = f"from pathlib import Path; from hpcguard.cluster import slurm; {line}"
    return f"PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)} -u -c {shlex.quote(code)}"


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program before all others."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_an_array_from_queue_to_end(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "a run|of ü"
    monkeypatch.setenv("SQUEUE_FORMAT", "%T")  # a user's own taste
    monkeypatch.setenv("SQUEUE_STATES", "SUSPENDED")
    array = cluster.sbatch(SLEEP, "--array=0-3%1", f"--comment={run}", "--job-name=hpcguard-attribute-0001-0")
    other = cluster.sbatch(SLEEP, "--hold", "--comment=two\nlines", "--job-name=a name")
    cluster.wait_for(lambda: cluster.state(f"{array}_0") == "RUNNING", what="the first task")

    tasks = {job.id: job for job in commands.queue_of(run)}
    name, comment = "hpcguard-attribute-0001-0", str(run)
    assert tasks.pop(f"{array}_0") == QueuedJob(f"{array}_0", array, 0, "RUNNING", "None", name, comment)
    assert tasks == {
        f"{array}_{k}": QueuedJob(f"{array}_{k}", array, k, "PENDING", "JobArrayTaskLimit", name, comment)
        for k in (1, 2, 3)
    }
    rest = [job for job in commands.queue() if job.comment != comment]
    assert rest == [QueuedJob(other, other, None, "PENDING", "JobHeldUser", "a name", "two\nlines")]
    assert commands.limits() == Limits(max_array_size=6, max_jobs=10000, max_submit=None, queued=5)

    commands.cancel([array, "99999"], pending_only=True)
    assert [job.id for job in commands.queue_of(run)] == [f"{array}_0"]
    asked = [f"{array}_0", f"{array}_2", other, "99999", "99999_1"]
    assert commands.states(asked) == {f"{array}_0": "RUNNING", f"{array}_2": "CANCELLED", other: "PENDING"}
    commands.cancel([f"{array}_0", "99999_1"])
    cluster.wait_for(lambda: commands.states(asked)[f"{array}_0"] == "CANCELLED", what="the end")
    commands.cancel([])
    commands.cancel([other, array])
    assert commands.queue() == []
    assert not commands.was_node_failure(other)  # nobody knows here


def test_a_waiting_job_waits_for_another(cluster: Slurm) -> None:
    first, second = cluster.sbatch(SLEEP, "--hold"), cluster.sbatch(SLEEP, "--hold")
    waiting = cluster.sbatch("true", f"--dependency=afterok:{first}")
    commands.redirect(waiting, f"afterany:{second}")
    assert cluster.run(f"squeue -h -j {waiting} -o %E") == f"afterany:{second}(unfulfilled)"
    with pytest.raises(InputError, match=r"^scontrol update JobId=99999 .*: Invalid job id specified.*; look whether"):
        commands.redirect("99999", f"afterany:{first}")


def test_scripts_are_checked_and_submitted(cluster: Slurm) -> None:
    good = cluster.work / "good.sh"
    good.write_text("#!/bin/bash\n#SBATCH --hold --array=0-5\ntrue\n")
    assert re.fullmatch(r"Job \d+ to start at .* in partition normal", commands.check(good.read_text()))
    assert commands.queue() == []
    job = commands.submit(good)
    assert [queued.id for queued in commands.queue()] == [f"{job}_{k}" for k in range(6)]

    bad = cluster.work / "bad.sh"
    bad.write_text("#!/bin/bash\n#SBATCH --partition=typo\ntrue\n")
    said = "error: invalid partition specified: typo; change cluster.slurm in the configuration, .*"
    with pytest.raises(InputError, match=f"^sbatch --test-only: {said}$"):
        commands.check(bad.read_text())
    with pytest.raises(InputError, match=f"^sbatch --parsable {bad}: {said}$"):
        commands.submit(bad)
    with pytest.raises(InputError, match="Invalid job array specification"):
        commands.check("#!/bin/bash\n#SBATCH --array=0-6\n")


def test_a_task_requeues_itself_alone(cluster: Slurm) -> None:
    """The last one: its SLURM_JOB_ID is the array's."""
    again = python("print(slurm.own_job(), slurm.restarts(), slurm.requeue_self())")
    tell = python("print(slurm.own_job(), slurm.restarts())")
    script = f'if [ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" = 2 ]; then {again}; else {tell}; fi; {SLEEP}'
    array = cluster.sbatch(script, "--array=0-2")
    outputs = [cluster.work / f"{array}_{k}.out" for k in range(3)]

    def lines(k: int) -> list[str]:
        said = outputs[k].read_text() if outputs[k].exists() else ""
        return [line for line in said.splitlines() if line.startswith(array)]

    cluster.wait_for(lambda: lines(2)[-1:] == [f"{array}_2 1"], 60, "the second run")
    assert lines(0) == [f"{array}_0 0"]
    assert lines(1) == [f"{array}_1 0"]


def test_there_is_nothing_to_requeue_outside_slurm(cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert (commands.own_job(), commands.restarts(), commands.requeue_self()) == (None, 0, False)
    monkeypatch.setenv("SLURM_JOB_ID", "99999")
    assert (commands.own_job(), commands.requeue_self()) == ("99999", False)


def test_a_job_of_a_job_takes_nothing_from_it(cluster: Slurm) -> None:
    child = cluster.work / "child.sh"
    child.write_text(
        f"#!/bin/bash\n#SBATCH --output={cluster.work}/child-%j.out\n"
        "env | grep -E '^(SLURM_ARRAY|MASTER_|SECRET|WANTED)' | sort; echo end\n"
    )
    ours = python(f"print('ours', slurm.submit(Path({str(child)!r}), ['WANTED']))")
    export = "export SECRET=1 WANTED=2 MASTER_ADDR=n0"
    parent = cluster.sbatch(f"{export}; {ours}; echo plain $(sbatch --parsable child.sh)", "--array=4-5%1")
    output = cluster.work / f"{parent}_4.out"
    cluster.wait_for(lambda: output.exists() and "plain" in output.read_text(), what="the parent")
    jobs = dict(line.split() for line in output.read_text().splitlines())

    def said(job: str) -> list[str]:
        path = cluster.work / f"child-{job}.out"
        cluster.wait_for(lambda: path.exists() and "end" in path.read_text(), what=f"child {job}")
        return path.read_text().splitlines()

    assert said(jobs["ours"]) == ["WANTED=2", "end"]
    leaked = said(jobs["plain"])  # why it matters
    assert {"SLURM_ARRAY_TASK_ID=4", f"SLURM_ARRAY_JOB_ID={parent}", "SECRET=1"} <= set(leaked)


@pytest.mark.parametrize(
    ("shown", "tasks"),
    [
        ("12", ["12"]),
        ("12_7", ["12_7"]),
        ("12_[3]", ["12_3"]),
        ("1_[3-5%3]", ["1_3", "1_4", "1_5"]),
        ("12_[0,4-5,9]", ["12_0", "12_4", "12_5", "12_9"]),
        ("12_[0-8:4,11%2]", ["12_0", "12_4", "12_8", "12_11"]),
    ],
)
def test_tasks_that_share_a_record(shown: str, tasks: list[str]) -> None:
    assert commands._expand(shown) == tasks


def test_answers_of_other_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A federation, and a site that greets; as Slurm's manual and submit plugins have them."""
    program(tmp_path, "sbatch", "echo '812345;north'", monkeypatch)
    assert commands.submit(Path("x.sh")) == "812345"
    greeting = "sbatch: Welcome to North\nsbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job ..."
    program(tmp_path, "sbatch", f"echo {shlex.quote(greeting)} >&2; exit 1", monkeypatch)
    with pytest.raises(InputError, match=r"^sbatch --parsable x\.sh: error: QOSMaxSubmitJobPerUserLimit; change"):
        commands.submit(Path("x.sh"))
    timed_out = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
    program(tmp_path, "sbatch", f"echo {shlex.quote(timed_out)} >&2; exit 1", monkeypatch)
    with pytest.raises(InputError, match=r"Socket timed out.*; the job may be queued all the same"):
        commands.submit(Path("x.sh"))


def test_a_slurm_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("squeue", "sacct", "sbatch", "scontrol"):
        program(tmp_path, name, "exec sleep 60", monkeypatch)
    monkeypatch.setattr(commands, "SECONDS", 0.2)
    monkeypatch.setattr(commands, "SBATCH_SECONDS", 0.3)
    with pytest.raises(InputError, match=r"^squeue --me .*: no answer in 0\.2 s; see whether slurmctld is up"):
        commands.queue()
    with pytest.raises(InputError, match=r"^sbatch .*: no answer in 0\.3 s; the job may be queued all the same"):
        commands.submit(Path("x.sh"))
    assert not commands.was_node_failure("12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert not commands.requeue_self()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"^scancel: not found in PATH"):
        commands.cancel(["12"])


def test_accounting_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_accounting()
    limit = ("--set", "AccountingStorageEnforce=limits", "--set", "KillWait=1")
    cluster = Slurm("--accounting", "--cpus", 2, "--max-array-size", 200, *limit)
    monkeypatch.setenv("SLURM_CONF", cluster.env["SLURM_CONF"])
    monkeypatch.setenv("SLURM_BITSTR_LEN", "4")  # shortens lists of tasks
    try:
        assert commands.limits().max_submit is None
        more = ",".join(str(k) for k in range(4, 190) if k % 7 in (0, 1, 3))  # a long text, unlike 4-190:3
        array = cluster.sbatch("exit $SLURM_ARRAY_TASK_ID", f"--array=0-1,{more}%2", "--nodelist=n1")
        ended = [f"{array}_0", f"{array}_1"]
        cluster.wait_for(lambda: commands.states(ended) == dict(zip(ended, ("COMPLETED", "FAILED"), strict=True)))
        commands.cancel([array])
        lost = cluster.sbatch(SLEEP, "--nodelist=n0", "--array=0-1")
        cluster.wait_for(lambda: cluster.state(f"{lost}_1") == "RUNNING", what="the job on n0")
        assert not commands.was_node_failure(f"{lost}_1")
        cluster.tool("kill-node", "n0")
        cluster.wait_for(lambda: commands.was_node_failure(f"{lost}_1"), what="the node failure")
        assert not commands.was_node_failure(f"{array}_1")

        assert_limits_are_enforced(cluster)
        lax = f"{shutil.which('scontrol')} \"$@\" | sed 's/= associations,limits$/= none/'"
        program(tmp_path, "scontrol", lax, monkeypatch)
        assert commands.limits().max_submit is None  # a limit that Slurm does not enforce is none
        program(tmp_path, "squeue", "", monkeypatch)  # forgotten by slurmctld, as some minutes after the end
        asked = [*ended, f"{array}_189", f"{lost}_1", "99999"]
        expected = {ended[0]: "COMPLETED", ended[1]: "FAILED", f"{array}_189": "CANCELLED", f"{lost}_1": "PENDING"}
        cluster.wait_for(lambda: commands.states(asked) == expected, what=f"{expected}")
        assert commands.was_node_failure(f"{lost}_1")  # although its newest record says that it waits
    finally:
        cluster.stop()


def assert_limits_are_enforced(cluster: Slurm) -> None:
    """Two jobs are queued: the limits that hpcguard reads are those that Slurm enforces."""
    assert commands.limits().queued == 2
    cluster.run("sacctmgr -i modify user $(id -un) set MaxSubmitJobs=5")
    cluster.wait_for(lambda: commands.limits().max_submit == 5)
    cluster.run("sacctmgr -i modify qos normal set MaxSubmitJobsPerUser=2")
    cluster.wait_for(lambda: commands.limits().max_submit == 2)
    assert commands.limits(partition="urgent").max_submit == 2
    assert commands.limits(qos="another").max_submit == 5
    with pytest.raises(InputError, match=r"^sbatch --test-only: error: QOSMaxSubmitJobPerUserLimit; "):
        commands.check("#!/bin/bash\ntrue\n")
