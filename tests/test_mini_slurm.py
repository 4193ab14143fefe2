"""tools/mini_slurm, by what a real Slurm then does and what is left of it afterwards."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import TOOL, Slurm, clean_environment, need_accounting, need_slurm, tool

IGNORES_SIGNALS = "trap '' TERM USR2 CONT; for i in {1..600}; do sleep 0.1; done"


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Unlike tmp_path, short enough for sockets whoever runs the tests."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        yield Path(folder).resolve()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def traces(folder: Path) -> list[str]:
    """Living processes that have the folder in their command line, environment, or as their working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if str(folder).encode() in known or (process / "cwd").readlink().is_relative_to(folder):
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        except OSError:
            continue
    return [entry for entry in found if alive(int(entry.split()[0]))]


def nothing_is_left(folder: Path) -> bool:
    mounted = str(folder) in Path("/proc/self/mountinfo").read_text()
    return not (folder.exists() or mounted or traces(folder))


def pid_in(path: Path) -> int:
    return int(path.read_text())


def listening(pids: set[int]) -> set[str]:
    """Addresses (hexadecimal, as in /proc/net/tcp) on which these processes listen."""
    inodes = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            inodes |= set(re.findall(r"socket:\[(\d+)]", str(entry.readlink())))
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_nodes_are_up_and_have_names_of_their_own(slurm: Slurm) -> None:
    took = re.search(r"up in ([\d.]+) s", slurm.started)
    assert took and float(took[1]) < 15
    assert slurm.folder.stat().st_mode & 0o777 == 0o700
    assert slurm.run("sinfo -h -N -p normal -o '%N %T'").splitlines() == ["n0 idle", "n1 idle"]
    names = sorted(slurm.run("srun --nodes 2 hostname").splitlines())
    separate = json.loads((slurm.folder / "cluster.json").read_text())["namespaces"]
    assert names == (["n0", "n1"] if separate else 2 * [os.uname().nodename])
    assert slurm.tool("status").returncode == 0


def test_only_loopback_is_listened_on(slurm: Slurm) -> None:
    pids = {pid_in(path) for path in (slurm.folder / "run").glob("*.pid")}
    assert len(pids) == 4
    assert listening(pids) == {"0100007F"}


def test_the_machines_name_may_mean_another_address(slurm: Slurm, short_path: Path) -> None:
    """127.0.1.1 on Debian, or a network's: the daemons stay on 127.0.0.1, and srun hears its steps."""
    if not json.loads((slurm.folder / "cluster.json").read_text())["namespaces"]:
        pytest.skip("mount namespaces are not allowed here")
    hosts, folder = short_path / "hosts", short_path / "c"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename}\n")
    script = f"""mount --bind {hosts} /etc/hosts && '{TOOL}' start --folder {folder} >&2 &&
        eval "$('{TOOL}' env --folder {folder})" && timeout 10 srun --nodes 2 hostname && cat {folder}/run/*.pid"""
    user = [] if os.geteuid() == 0 else ["--map-current-user", "--keep-caps"]
    command = ["unshare", *user, "--mount", "--propagation", "private", "bash", "-c", script]
    try:
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split()[:2]) == ["n0", "n1"]
        assert listening({int(pid) for pid in done.stdout.split()[2:]}) == {"0100007F"}
    finally:
        assert tool("stop", "--folder", folder).returncode == 0
    assert nothing_is_left(folder)


def test_env_is_what_a_shell_needs(slurm: Slurm) -> None:
    command = f"""eval "$('{TOOL}' env --folder {slurm.folder})" && sinfo -h -o %D -p urgent"""
    done = subprocess.run(["sh", "-c", command], env=clean_environment(), capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == "2", done.stderr


def test_an_array_runs_and_its_limit_holds(slurm: Slurm) -> None:
    job = slurm.sbatch("echo task $SLURM_ARRAY_TASK_ID", "--array=0-5")
    outputs = [slurm.work / f"{job}_{task}.out" for task in range(6)]
    slurm.wait_for(lambda: all(path.exists() and path.read_text() for path in outputs), what="six outputs")
    assert [path.read_text() for path in outputs] == [f"task {task}\n" for task in range(6)]
    with pytest.raises(AssertionError, match="Invalid job array"):
        slurm.sbatch("true", "--array=6-6")


def test_gpus_are_handed_out(slurm: Slurm) -> None:
    assert slurm.run("srun --gpus 2 --nodes 1 printenv CUDA_VISIBLE_DEVICES") == "0,1"
    step = "srun --exact -n 1 --gpus 1 sh -c 'printenv CUDA_VISIBLE_DEVICES; sleep 1'"
    job = slurm.sbatch(f"{step} & {step}; wait; echo done", "--nodes=1", "--ntasks=2", "--gpus=2")
    output = slurm.work / f"{job}.out"
    slurm.wait_for(lambda: output.exists() and "done" in output.read_text(), what="two steps")
    assert sorted(output.read_text().split()) == ["0", "1", "done"]
    assert slurm.run("srun sh -c 'echo none: $CUDA_VISIBLE_DEVICES'") == "none:"


def test_an_urgent_job_requeues_a_normal_one_after_its_signal(slurm: Slurm) -> None:
    script = "trap 'echo signalled' USR2; echo run $SLURM_RESTART_COUNT; for i in {1..600}; do sleep 0.1; done"
    job = slurm.sbatch(script, "--nodelist=n0", "--exclusive", "--signal=B:USR2@5")
    output = slurm.work / f"{job}.out"
    slurm.wait_for(lambda: output.exists() and output.read_text() == "run\n", what="first run")
    slurm.run("srun -p urgent --nodelist=n0 --exclusive true")
    slurm.wait_for(lambda: "run 1" in output.read_text(), what="second run")
    assert output.read_text().splitlines()[:2] == ["run", "signalled"]
    slurm.run(f"scancel {job}")
    slurm.wait_for(lambda: slurm.node_state("n0") == "idle", what="n0 idle")


def test_a_node_dies_at_once_and_comes_back(slurm: Slurm) -> None:
    job = slurm.sbatch(f"echo $$ $SLURM_RESTART_COUNT; {IGNORES_SIGNALS}", "--nodelist=n1")
    output = slurm.work / f"{job}.out"
    slurm.wait_for(lambda: output.exists() and output.read_text().endswith("\n"), what="first run")
    task, slurmd = int(output.read_text()), pid_in(slurm.folder / "run" / "slurmd.n1.pid")
    assert alive(task)
    assert alive(slurmd)
    assert slurm.tool("kill-node", "n1").returncode == 0
    assert not alive(task)
    assert not alive(slurmd)
    assert slurm.node_state("n1") == "down"
    assert slurm.node_state("n0") == "idle"
    status = slurm.tool("status")
    assert status.returncode == 1
    assert re.search(r"^slurmd n1 +down +down$", status.stdout, re.M)

    assert slurm.tool("start-node", "n1").returncode == 0
    assert slurm.tool("status").returncode == 0
    slurm.wait_for(lambda: output.read_text().endswith(" 1\n"), what="the job again")
    slurm.run(f"scancel --signal=KILL --full {job}; scancel {job}")
    slurm.wait_for(lambda: slurm.node_state("n1") == "idle", what="n1 idle")
    assert slurm.tool("kill-node", "n7").stderr == "mini_slurm: no node n7; there are n0, n1\n"


def test_stop_beside_another_cluster_leaves_nothing_behind(slurm: Slurm) -> None:
    other = Slurm("--nodes", 3, "--cpus", 1, "--set", "kILLwAIT=1")
    separate = json.loads((other.folder / "cluster.json").read_text())["namespaces"]
    assert other.run("sinfo -h -p normal -o %D") == "3"
    assert slurm.run("sinfo -h -p normal -o %D") == "2"
    assert "KillWait                = 1 sec" in other.run("scontrol show config")
    # a task that ignores signals, and one that left its session and forgot its environment
    scrub = "env -i" if separate else "env"
    job = other.sbatch(f"setsid {scrub} sleep 600 & echo $!; {IGNORES_SIGNALS}")
    output = other.work / f"{job}.out"
    other.wait_for(lambda: output.exists() and output.read_text().endswith("\n"), what="the job")
    strayed = int(output.read_text())
    assert alive(strayed)
    other.stop()
    assert not alive(strayed)
    assert nothing_is_left(other.folder), traces(other.folder)
    assert slurm.tool("status").returncode == 0
    again = other.tool("stop")
    assert (again.returncode, again.stdout) == (0, f"mini_slurm: nothing to stop in {other.folder}\n")


def test_stop_after_a_bad_night_spares_a_process_that_has_a_stale_pid() -> None:
    need_slurm()
    cluster = Slurm("--nodes", 2, "--cpus", 1)
    run = cluster.folder / "run"
    job = cluster.sbatch(f"echo $$; {IGNORES_SIGNALS}", "--nodelist=n0")
    output = cluster.work / f"{job}.out"
    cluster.wait_for(lambda: output.exists() and output.read_text().endswith("\n"), what="the job")
    for name in ("slurmctld", "slurmd.n0", "slurmd.n1"):
        os.kill(pid_in(run / f"{name}.pid"), signal.SIGKILL)
    assert alive(int(output.read_text()))  # steps outlive slurmd
    assert cluster.tool("status").returncode == 1
    assert cluster.tool("env").stdout == ""
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        (run / "slurmctld.pid").write_text(f"{bystander.pid}\n")
        task = int(output.read_text())
        cluster.stop()
        assert bystander.poll() is None
        assert not alive(task)
        assert nothing_is_left(cluster.folder), traces(cluster.folder)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_dead_clusters_folder_is_used_again_and_a_living_ones_is_not(short_path: Path) -> None:
    need_slurm()
    folder = short_path / "c"
    try:
        assert tool("start", "--nodes", 1, "--folder", folder).returncode == 0
        second = tool("start", "--folder", folder)
        assert second.returncode == 2
        assert second.stderr.startswith(f"mini_slurm: a cluster runs in {folder}; stop it first: ")
        for path in (folder / "run").glob("*.pid"):  # a reboot
            os.kill(pid_in(path), signal.SIGKILL)
        assert tool("start", "--nodes", 1, "--folder", folder).returncode == 0
        kept = tool("stop", "--keep", "--folder", folder)
        assert kept.stdout == f"mini_slurm: stopped; logs in {folder}/log\n"
        assert sorted(path.name for path in folder.iterdir()) == ["cluster.json", "log"]
        assert "Terminate signal" in (folder / "log" / "slurmctld.log").read_text()
    finally:
        tool("stop", "--folder", folder)
    assert nothing_is_left(folder)


def test_a_start_that_fails_says_why_and_leaves_nothing(short_path: Path) -> None:
    need_slurm()
    done = tool("start", "--set", "SelectType=select/nonsense", "--folder", short_path / "c")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mini_slurm: slurm")
    assert "select/nonsense" in done.stderr
    assert nothing_is_left(short_path / "c")


def test_an_interrupted_start_leaves_nothing(short_path: Path) -> None:
    need_slurm()
    folder = short_path / "c"
    # a node that can never be up keeps the start waiting
    command = [str(TOOL), "start", "--set", "SlurmdParameters=none", "--cpus", "1000", "--folder", str(folder)]
    starting = subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    Slurm.wait_for(lambda: (folder / "run" / "slurmctld.pid").exists(), 10, "slurmctld")
    starting.send_signal(signal.SIGTERM)
    assert starting.communicate(timeout=20)[1] == "mini_slurm: interrupted\n"
    assert starting.returncode == 130
    assert nothing_is_left(folder)


def test_missing_programs_are_one_line_with_their_packages(short_path: Path) -> None:
    environment = {**clean_environment(), "PATH": str(short_path)}
    done = tool("start", "--folder", short_path / "c", env=environment)
    assert done.returncode == 2
    assert re.fullmatch(r"mini_slurm: not installed: .*sinfo.*; on Debian: apt-get install .*slurm-wlm\n", done.stderr)
    assert not (short_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "0"), "argument --nodes: 0: a whole number from 1 to 64"),
        (("--set", "KillWait"), "argument --set: KillWait: KEY=VALUE, as in slurm.conf"),
        (("--gpus", "two"), "argument --gpus: two: a whole number from 0 to 6"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = tool("start", *arguments)
    assert (done.returncode, done.stderr) == (2, f"mini_slurm start: {message}; see mini_slurm start --help\n")


@pytest.mark.parametrize("verb", ["start", "stop"])
def test_somebody_elses_folder_is_not_touched(short_path: Path, verb: str) -> None:
    need_slurm()
    (short_path / "thesis.tex").write_text("x")
    done = tool(verb, "--folder", short_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in short_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_slurm_cannot_have_is_refused(short_path: Path) -> None:
    need_slurm()
    for name in ("with space", 70 * "x"):
        done = tool("start", "--folder", short_path / name)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert not (short_path / name).exists()


def test_without_namespaces_nodes_share_the_host_name(short_path: Path) -> None:
    need_slurm()
    if socket.gethostbyname(socket.gethostname()) != "127.0.0.1":
        refused = tool("start", "--plain", "--folder", short_path / "c")
        assert refused.returncode == 2
        assert "Slurm would listen there" in refused.stderr
        return
    cluster = Slurm("--plain", "--cpus", 1, "--set", "KillWait=1")
    assert cluster.run("srun --nodes 2 hostname").splitlines() == 2 * [os.uname().nodename]
    assert "OMPI_MCA_btl" in cluster.tool("env").stdout
    job = cluster.sbatch(f"echo $$; {IGNORES_SIGNALS}", "--nodelist=n0")
    output = cluster.work / f"{job}.out"
    cluster.wait_for(lambda: output.exists() and output.read_text().endswith("\n"), what="the job")
    assert cluster.tool("kill-node", "n0").returncode == 0
    assert not alive(int(output.read_text()))
    assert cluster.node_state("n1") == "idle"
    cluster.stop()
    assert nothing_is_left(cluster.folder), traces(cluster.folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user; all other tests ran as one")
def test_an_ordinary_user_has_a_cluster_too() -> None:
    need_slurm()
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # this one may lie in root's home
    if not python:
        pytest.skip("no Python that other users can reach")
    nobody = 65534
    home = Path("/tmp") / f"mini-slurm-{os.getpid()}"  # pytest's own folders are closed to others
    home.mkdir()
    os.chown(home, nobody, nobody)
    copy = home / "mini_slurm"
    copy.write_bytes(TOOL.read_bytes())
    environment = {**clean_environment(), "HOME": str(home), "PATH": "/usr/bin:/bin"}
    as_nobody = {"user": nobody, "group": nobody, "extra_groups": [], "env": environment, "cwd": "/"}

    def run(*arguments: str) -> str:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, **as_nobody)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = home / "c"
    try:
        run(python, str(copy), "start", "--folder", str(folder))
        environment["SLURM_CONF"] = str(folder / "clients.conf")
        separate = json.loads((folder / "cluster.json").read_text())["namespaces"]
        shown = sorted(run("srun", "--nodes", "2", "sh", "-c", "echo $(hostname) $(id -u)").splitlines())
        assert shown == [f"{name} {nobody}" for name in (("n0", "n1") if separate else 2 * [os.uname().nodename])]
    finally:
        run(python, str(copy), "stop", "--folder", str(folder))
        assert nothing_is_left(folder), traces(folder)
        copy.unlink()
        home.rmdir()


def test_accounting_remembers_what_became_of_jobs() -> None:
    need_accounting()
    cluster = Slurm("--accounting", "--cpus", 1)
    pids = {pid_in(path) for path in (cluster.folder / "run").glob("*.pid")}
    assert len(pids) == 6
    assert listening(pids) == {"0100007F"}
    job = cluster.sbatch("exit $SLURM_ARRAY_TASK_ID", "--array=0-1")
    expected = [f"{job}_0|COMPLETED|0:0", f"{job}_1|FAILED|1:0"]
    ask = f"sacct -n -X -P -j {job} -o JobID,State,ExitCode"
    cluster.wait_for(lambda: sorted(cluster.run(ask).splitlines()) == expected, what="sacct")
    cluster.stop()
    assert nothing_is_left(cluster.folder), traces(cluster.folder)
