"""Everything that talks to Slurm's commands. Each call ends in bounded time, and gets only job_environment()."""

import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcguard.cluster.environment import job_environment
from hpcguard.errors import InputError

SECONDS, SBATCH_SECONDS = 30.0, 60.0
GIB = {"K": 2.0**20, "M": 2.0**10, "G": 1.0, "T": 2.0**-10}  # units of memory in one GiB
UNIT, RECORD = "\x1f", "\x1e"  # ASCII's own separators; names and comments may hold anything else, even line breaks
FORMAT = UNIT.join(("%i", "%F", "%K", "%T", "%r", "%j", "%k")) + RECORD
SILENT = re.compile(
    r"timed out|unable to contact|zero bytes|unexpected message|connection refused|configuration source", re.I
)
FAULT = re.compile(r"error|fail|fatal|invalid|problem|pending", re.I)
GONE = re.compile(r"invalid job id|already completing or completed", re.I)
ASK_AGAIN = "see whether slurmctld is up (scontrol ping), then try again"
REFUSED = "change cluster.slurm in the configuration, or ask the cluster's staff"
QUEUED = "the job may be queued all the same (squeue --me)"  # slurmctld may have taken what it did not answer


@dataclass(frozen=True)
class QueuedJob:
    """A job or one task of an array, as squeue shows it."""

    id: str  # "12_3", or "12" without array
    array: str  # "12"
    index: int | None
    state: str
    reason: str
    name: str
    comment: str


@dataclass(frozen=True)
class Limits:
    max_array_size: int  # indices of an array must stay below it
    max_jobs: int  # MaxJobCount: of all users together
    max_submit: int | None  # of this user, running and waiting; None: no limit is enforced
    queued: int  # this user's jobs now, every task of an array counted


def queue() -> list[QueuedJob]:
    """This user's jobs that have not ended, arrays expanded; those that are COMPLETING still hold their nodes."""
    return _squeue()


def queue_of(run: Path) -> list[QueuedJob]:
    """The jobs of one run folder: their comment is its absolute path."""
    return [job for job in queue() if job.comment == str(run.resolve())]


def states(jobs: Sequence[str]) -> dict[str, str]:
    """The last known state of jobs by id; those that neither squeue nor accounting knows are absent."""
    known = {job.id: job.state for job in _squeue("--states=all")}
    if forgotten := [job for job in jobs if job not in known]:
        rows = _accounted(sorted({_array_of(job) for job in forgotten}))
        known = {task: state for job, state in rows for task in _expand(job)} | known
    # Tasks that were cancelled before they started may be left as one record, which has the array's id.
    last = {job: known.get(job) or known.get(_array_of(job)) for job in jobs}
    return {job: state for job, state in last.items() if state}


def was_node_failure(job: str) -> bool:
    """Whether any run of this job was ended by its node's failure; False without accounting."""
    return (job, "NODE_FAIL") in _accounted([job], "--duplicates")


def limits(account: str = "", partition: str = "", qos: str = "") -> Limits:
    """What the cluster accepts of this user, for jobs that name this account, partition and QOS or leave them out."""
    lines = _ask("scontrol", "show", "config").stdout.splitlines()
    config = {key.strip(): value.strip() for key, found, value in (line.partition("=") for line in lines) if found}
    # Without "limits" here Slurm knows limits of users but lets every job pass.
    enforced = "limits" in config.get("AccountingStorageEnforce", "")
    return Limits(
        max_array_size=int(config["MaxArraySize"]),
        max_jobs=int(config["MaxJobCount"]),
        max_submit=_max_submit(config["ClusterName"], account, partition, qos) if enforced else None,
        queued=len(queue()),
    )


def submit(script: Path, extra: Sequence[str] = ()) -> str:
    """Submit a batch script; the job's id. `extra`: as in job_environment."""
    command = ("sbatch", "--parsable", str(script))
    silent = f"{QUEUED}; {ASK_AGAIN}"
    done = _ask(*command, seconds=SBATCH_SECONDS, remedy=REFUSED, silent=silent, extra=extra)
    return done.stdout.split()[-1].partition(";")[0]  # a federated cluster's is "id;cluster"


def check(text: str) -> str:
    """Ask whether this batch script would be accepted, without submitting it; Slurm's answer."""
    done = _ask("sbatch", "--test-only", seconds=SBATCH_SECONDS, remedy=REFUSED, given=text)
    return (done.stdout + done.stderr).strip().rpartition("\n")[2].removeprefix("sbatch: ")


def cancel(jobs: Sequence[str], pending_only: bool = False) -> None:
    """Cancel jobs, tasks ("12_3") and whole arrays ("12"); those that are gone already are no error."""
    if jobs:
        _ask("scancel", *(["--state=PENDING"] if pending_only else []), *jobs, harmless=GONE)


def redirect(job: str, dependency: str) -> None:
    """Let a waiting job wait for something else, such as afterany:12:13."""
    remedy = "look whether it still waits (squeue --me)"
    _ask("scontrol", "update", f"JobId={job}", f"Dependency={dependency}", remedy=remedy)


def requeue_self() -> bool:
    """Ask Slurm to end this job and run it again; False outside Slurm or if it was refused."""
    job = own_job()
    if job is None:
        return False
    try:
        _ask("scontrol", "requeue", job)
    except InputError:
        return False
    return True


def own_job() -> str | None:
    """The job that this process runs in, or None. SLURM_JOB_ID of an array's task may be the id of the whole array."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID") or None


def restarts() -> int:
    """How often Slurm has started this job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def was_preempted(job: str) -> bool:
    """Whether another job is taking this one's nodes."""
    return _detail(job, r"\bPreemptTime=(\d\S*)") is not None


def memory_gb(job: str) -> float | None:
    """Memory in GiB that a job has on each node, as long as Slurm remembers it."""
    found = _detail(job, r"\bTRES=\S*\bmem=([\d.]+[KMGT])")
    return None if found is None else float(found[:-1]) / GIB[found[-1]]


def own_memory_gb() -> float | None:
    """Memory in GiB that this job has on each node, where it has a limit."""
    given = os.environ.get("SLURM_MEM_PER_NODE", "")
    return int(given) / 1024 if given.isdigit() and int(given) else None


def node_is_down(host: str) -> bool:
    """Whether Slurm takes a node for lost; False for one that it does not know."""
    try:
        state = _ask("sinfo", "--noheader", "--nodes", host, "-o", "%T").stdout
    except InputError:
        return False
    return state.startswith(("down", "fail", "unknown"))


def _detail(job: str, pattern: str) -> str | None:
    try:
        found = re.search(pattern, _ask("scontrol", "show", "job", job).stdout)
    except InputError:
        return None
    return found[1] if found else None


def _squeue(*options: str) -> list[QueuedJob]:
    answer = _ask("squeue", "--me", "--array", "--noheader", *options, "-o", FORMAT).stdout
    jobs = []
    for record in answer.split(RECORD)[:-1]:
        job, array, index, state, reason, name, comment = record.removeprefix("\n").split(UNIT)
        number = int(index) if index.isdigit() else None  # "N/A" without array
        jobs.append(QueuedJob(job, array, number, state, reason, name, "" if comment == "(null)" else comment))
    return jobs


def _accounted(jobs: Iterable[str], *options: str) -> list[tuple[str, str]]:
    """(id, state) from accounting, a requeued job's newest last; nothing where there is none."""
    try:
        answer = _ask("sacct", "-X", "-n", "-P", *options, "-o", "JobID,State", "-j", ",".join(jobs)).stdout
    except InputError:
        return []
    rows = [line.split("|") for line in answer.splitlines()]
    return [(job, state.split()[0]) for job, state in rows if state]  # "CANCELLED by 1000" too


def _array_of(job: str) -> str:
    return job.partition("_")[0]


def _expand(job: str) -> list[str]:
    """The tasks in an id such as 12_[3-5,8%2], which tasks that never started share."""
    array, _, indices = job.partition("_[")
    if not indices:
        return [job]
    ranges = re.findall(r"(\d+)(?:-(\d+))?(?::(\d+))?", indices.partition("%")[0])
    return [f"{array}_{k}" for a, b, step in ranges for k in range(int(a), int(b or a) + 1, int(step or 1))]


def _max_submit(cluster: str, account: str, partition: str, qos: str) -> int | None:
    """The smallest limit that such a job meets: the user's associations', its QOS's, its partition's QOS's.

    None where nobody may ask: sbatch will tell.
    """
    show = ("sacctmgr", "-n", "-P", "show")
    where = [f"cluster={cluster}", f"user={pwd.getpwuid(os.getuid()).pw_name}"] + [f"account={account}"] * bool(account)
    try:
        answer = _ask(*show, "assoc", *where, "format=DefaultQOS,MaxSubmitJobs,GrpSubmitJobs").stdout
        own = [line.split("|") for line in answer.splitlines()]
        names = {qos} if qos else {row[0] or "normal" for row in own}
        for line in _ask("scontrol", "-o", "show", "partition").stdout.splitlines():
            values = dict(word.split("=", 1) for word in line.split() if "=" in word)
            if values["PartitionName"] in partition.split(",") or (not partition and values["Default"] == "YES"):
                names |= {values["QoS"]} - {"N/A"}
        form = "format=MaxSubmitJobsPerUser,GrpSubmitJobs"
        answer = _ask(*show, "qos", f"name={','.join(sorted(names))}", form).stdout
    except InputError:
        return None
    found = [value for row in own for value in row[1:]] + re.split(r"[|\n]", answer)
    return min((int(value) for value in found if value.isdigit()), default=None)


def _ask(
    *command: str, seconds: float | None = None, remedy: str = ASK_AGAIN, silent: str = ASK_AGAIN, given: str = "",
    harmless: re.Pattern[str] | None = None, extra: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run one of Slurm's commands. Raises InputError with a remedy if it fails and says more than what is harmless."""
    seconds = seconds or SECONDS
    shown = shlex.join(command[:-2] if command[-1] == FORMAT else command)
    shown = shown if len(shown) < 200 else f"{shown[:200]} ..."
    try:
        done = subprocess.run(
            command, timeout=seconds, input=given, capture_output=True, check=False,
            encoding="utf-8", errors="surrogateescape",
            env=job_environment(extra) | {"SLURM_BITSTR_LEN": "0"},  # ids such as 12_[0-99999] in full
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(f"{command[0]}: not found in PATH; run this where Slurm's commands are installed") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{shown}: no answer in {seconds:g} s; {silent}") from error
    said = (done.stderr or done.stdout).splitlines() or [f"exit status {done.returncode}"]
    faults = [line for line in said if FAULT.search(line)] or said  # some sites greet first
    if done.returncode == 0 or (harmless and all(harmless.search(line) for line in faults)):
        return done
    line = faults[0].removeprefix(f"{command[0]}: ")
    raise InputError(f"{shown}: {line}; {silent if SILENT.search(' '.join(faults)) else remedy}")
