"""Text of sbatch scripts, to the letter; and that no setting becomes shell code."""

import os
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Slurm

from hpcguard.array_task import array_task
from hpcguard.cluster import dispatch, sbatch, slurm, submit
from hpcguard.cluster.packing import Chunk
from hpcguard.cluster.submission import (
    Job,
    Submission,
    history,
    job_name,
    last_tasks,
    new_submission,
    parse_name,
    read_submissions,
    shards_in_queue,
)
from hpcguard.config import Config, SlurmConfig, load_config
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder

HOSTILE = "a'b\"c $(touch hacked) `touch hacked` ; touch hacked"


@pytest.fixture
def srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """submitit wants to see an srun, even if only text is made."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")


def make_array(folder: Path, chunk: Chunk, after: str | None = None, **settings: object) -> submit.Array:
    waits = (after,) if after else ()
    return submit.Array(folder, SlurmConfig(**settings), "hpcguard-attribute-0001-6", "/runs/a b", chunk, waits, None)


def test_an_array_to_the_letter(srun: None) -> None:
    array = make_array(
        Path("/runs/a b/slurm/0001"), Chunk(6, 5, 2, 0), "41",
        partition="gpu", account="lab", constraint="a100|h100", modules=["cuda/12"], source="/venv/bin/activate",
        options={"mail-user": "me@lab", "exclusive": True, "nice": 5}, srun=["--container-image=lab/x"],
        python=["apptainer", "exec", "--nv", "my image.sif", "python3"], signal_seconds=120,
        attribute={"gpus_per_node": 4, "cpus_per_task": 16, "memory_gb": 7.5, "minutes": 90},
    )  # fmt: skip
    expected = """#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-4%2
#SBATCH --comment='/runs/a b'
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=16
#SBATCH --dependency=afterany:41
#SBATCH --error='/runs/a b/slurm/0001/%A_%a_0_log.err'
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --job-name=hpcguard-attribute-0001-6
#SBATCH --mail-user=me@lab
#SBATCH --mem=7680M
#SBATCH --nice=5
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/runs/a b/slurm/0001/%A_%a_0_log.out'
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=90

# setup
module load cuda/12 || { echo 'hpcguard: failed: module load cuda/12' >&2; exit 1; }
. /venv/bin/activate || { echo 'hpcguard: failed: . /venv/bin/activate' >&2; exit 1; }

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output '/runs/a b/slurm/0001/%A_%a_%t_log.out' --error '/runs/a b/slurm/0001/%A_%a_%t_log.err' \
--cpus-per-task=16 --container-image=lab/x \
apptainer exec --nv 'my image.sif' python3 -u -m hpcguard.cluster.task '/runs/a b/slurm/0001'
"""
    assert submit.array_text(array) == expected


def test_the_jobs_that_follow_to_the_letter(srun: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    following = tmp_path / "next.yaml"
    following.write_text("cluster: {executor: slurm}\nrun: /runs/y\n")
    monkeypatch.setattr(slurm, "limits", lambda *_: slurm.Limits(5, 100, None, 0))
    settings = {
        "python": ["py"], "then": ["refine", "evaluate", "report"], "next": str(following), "tasks_at_once": 3,
        "refine": {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 8, "minutes": 600},
        "evaluate": {"minutes": 30}, "consolidate": {"minutes": 20},
    }  # fmt: skip
    config = Config(run="/runs/x", cluster={"executor": "slurm", "slurm": settings})
    *arrays, settle, refine, evaluate, last = dispatch.texts(config, RunFolder(config.run), dict.fromkeys(range(8)))
    assert [next(line for line in text.splitlines() if "--array" in line) for text in arrays] == [
        "#SBATCH --array=0-3%2", "#SBATCH --array=0-3%1",
    ]  # fmt: skip
    head = "#!/bin/bash\n#SBATCH --comment=/runs/x\n"
    tail = "#SBATCH --nodes=1\n#SBATCH --ntasks-per-node=1\n#SBATCH --open-mode=append\n"
    assert settle == (
        f"{head}#SBATCH --dependency=afterany:ARRAY1:ARRAY2\n#SBATCH --job-name=hpcguard-consolidate-0001\n"
        f"#SBATCH --kill-on-invalid-dep=yes\n{tail}#SBATCH --output=/runs/x/slurm/0001/consolidate_%j.out\n"
        "#SBATCH --requeue\n#SBATCH --time=20\nset -e\nstatus=0\n"
        "py -m hpcguard.attribute /runs/x/slurm/0001/config.yaml --settle 1 || status=$?\n"
        'if [ "$status" = 3 ]; then exit 0; fi  # another such job looks after what is missing\n'
        'if [ "$status" != 0 ]; then exit "$status"; fi\n'
        "py -m hpcguard.consolidate /runs/x/slurm/0001/config.yaml\n"
    )
    assert refine == (
        "#!/bin/bash\n#SBATCH --comment=/runs/x\n#SBATCH --cpus-per-task=8\n#SBATCH --dependency=afterok:CONSOLIDATE\n"
        "#SBATCH --gpus-per-node=4\n#SBATCH --job-name=hpcguard-refine-0001\n#SBATCH --kill-on-invalid-dep=yes\n"
        "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --open-mode=append\n"
        "#SBATCH --output=/runs/x/slurm/0001/refine_%j.out\n#SBATCH --requeue\n#SBATCH --signal=USR2@90\n"
        "#SBATCH --time=600\nset -e\n"
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 py -m hpcguard.refine /runs/x/slurm/0001/config.yaml\n"
    )
    assert "--dependency=afterok:REFINE\n" in evaluate
    assert evaluate.endswith(
        "set -e\npy -m hpcguard.evaluate /runs/x/slurm/0001/config.yaml\n"
        "py -m hpcguard.report /runs/x/slurm/0001/config.yaml\n"
    )
    assert "--dependency=afterok:EVALUATE\n" in last
    assert last.endswith(f"set -e\npy -m hpcguard.attribute {following}\n")
    for wrong, why in (
        ("run: /runs/y", "set cluster.executor"),
        ("cluster: {executor: slurm}\nrun: /runs/x", "same run"),
    ):
        following.write_text(wrong)
        with pytest.raises(InputError, match=why):
            dispatch.texts(config, RunFolder(config.run), {0: None})


def test_nothing_of_a_configuration_is_run_by_the_shell(tmp_path: Path, srun: None) -> None:
    asked = SlurmConfig(
        partition=HOSTILE, modules=[HOSTILE], source=Path(HOSTILE), python=["echo", HOSTILE], srun=[HOSTILE],
        options={"reservation": HOSTILE},
    )  # fmt: skip
    options = sbatch.options(asked, asked.refine)
    scripts = [
        sbatch.script(options, sbatch.setup(asked), [sbatch.stage(asked, "refine", Path(HOSTILE))]),
        sbatch.script(options, [], [sbatch.stage(asked, "refine", Path(HOSTILE))]),
        submit.array_text(make_array(tmp_path / HOSTILE, Chunk(0, 2, 2, None), python=["echo"], srun=[HOSTILE])),
    ]
    for script in scripts:
        assert all(line.startswith("#SBATCH --") for line in script.splitlines() if "SBATCH" in line)
        subprocess.run(["bash", "-c", f"module() {{ :; }}; srun() {{ echo; }}; {script}"], cwd=tmp_path, check=False)
    assert not list(tmp_path.glob("**/hacked"))
    echoed = subprocess.run(["bash", "-c", scripts[1]], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert echoed == f"{HOSTILE} -m hpcguard.refine {HOSTILE}\n"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [("partition", "a\nb", "printable"), ("options", {"wrap": "x"}, "hpcguard sets it itself"),
     ("options", {"Mem": 1}, "long name"), ("options", {"x\n#SBATCH --y": 1}, "long name"),
     ("export", ["SLURM_CONF"], "Slurm sets it"), ("export", ["A=1"], "name of an environment variable"),
     ("attribute", {"nodes": 2}, "one process on one node"), ("then", ["attribute"], "refine"),
     ("modules", [""], "printable")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path: Path, key: str, value: object, part: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"cluster": {"slurm": {key: value}}}))
    with pytest.raises(InputError, match=part) as info:
        load_config(path)
    assert "cluster.slurm" in str(info.value)


def test_pickles_hold_a_reference_and_a_number_and_files_no_secrets(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("WANDB_API_KEY", "hunter2-a-secret")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")  # of the job that we would be in
    run = RunFolder(tmp_path / "run")
    run.create()
    config = Config(run=run.path, cluster={"executor": "slurm", "slurm": {"options": {"hold": True}}})
    submission = dispatch.submit(config, run, dict.fromkeys(range(3)), array_task)
    job = submission.jobs[0].job
    try:
        environment = slurm.run(f"scontrol show job {job}_1; scontrol write batch_script {job} -")
        assert "hunter2" not in environment
        pickles = sorted(submission.folder.glob("*.pkl"))
        assert [path.name for path in pickles] == [f"{job}_{index}_submitted.pkl" for index in range(3)]
        for number, path in enumerate(pickles):
            operations = [(each.name, value) for each, value, _ in pickletools.genops(path.read_bytes())]
            strings = [value for name, value in operations if name in ("SHORT_BINUNICODE", "BINUNICODE")]
            assert {"hpcguard.array_task", "array_task"} <= set(strings)
            assert not [value for value in strings if "CodeType" in value or "make_function" in value]
            assert ("BININT1", number) in operations
        for path in submission.folder.iterdir():
            assert b"hunter2" not in path.read_bytes(), path
    finally:
        slurm.run(f"scancel {' '.join(each.job for each in submission.jobs)}")


@pytest.mark.parametrize("opened", ["run", "run/slurm", "run/slurm/0001"])
def test_a_task_unpickles_nothing_where_others_may_write(tmp_path: Path, opened: str) -> None:
    """A pickle planted in a folder that is open to others is never read."""
    folder = tmp_path / "run/slurm/0001"
    for each in (folder.parents[1], folder.parent, folder):
        each.mkdir(mode=0o700)
    planted = b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "hacked").encode()
    (folder / "7_submitted.pkl").write_bytes(planted)
    (tmp_path / opened).chmod(0o770)
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "slurm"}
    command = [sys.executable, "-m", "hpcguard.cluster.task", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{tmp_path / opened}: open to others" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "hacked").exists()


def test_submissions_know_their_tasks_and_rounds(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    config = Config(run=tmp_path, data={"root": "relative"})
    new_submission(run, config, [[0, 1], [2]], True)
    new_submission(run, config, [[1]], False, {1: [1, 0]})
    new_submission(run, config, [[1], [2]], False, {1: [2, 0], 2: [1, 40]})
    found = read_submissions(run)
    found[0].add(Job("attribute", "12", 0, 2))
    found[1].add(Job("attribute", "15", 0, 1))
    found[1].add(Job("consolidate", "16"))
    found = read_submissions(run)
    assert [submission.number for submission in found] == [1, 2, 3]
    assert last_tasks(found) == {0: "12_0", 1: "15", 2: "12_1"}
    # Shard 2 has finished nothing since it was submitted again, shard 0 has.
    assert history(found, {0: 70, 2: 40}) == {0: [0, 70], 1: [3, 0], 2: [2, 40]}
    assert history(found, {1: 1, 2: 41}) == {0: [1, 0], 1: [0, 1], 2: [0, 41]}
    new_submission(run, config, [[1]], True)
    assert history(read_submissions(run), {})[1] == [1, 0]
    queue = [
        slurm.QueuedJob(id, id.split("_")[0], index, "RUNNING", "", name, "")
        for id, index, name in (
            ("12_1", 1, "hpcguard-attribute-0001-0"), ("99", None, "hpcguard-attribute-0003-1"),
            ("16", None, "hpcguard-consolidate-0002"), ("17_0", 0, "attribute"),
            ("18_9", 9, "hpcguard-attribute-0001-0"),
        )
    ]  # fmt: skip
    # The id of job 99 was never noted: whoever submitted it was killed before.
    assert {shard: job.id for shard, job in shards_in_queue(found, queue).items()} == {2: "99"}
    assert parse_name(job_name("attribute", 7, 12)) == ("attribute", 7, 12)
    assert parse_name(job_name("refine", 7)) == ("refine", 7, None)
    found[2].take_back()
    assert [submission.number for submission in read_submissions(run)] == [1, 2, 4]
    assert new_submission(run, config, [[1]], True).number == 5
    recorded = load_config(found[0].config)
    assert recorded.data.root == Path("relative").resolve()
    assert recorded.model_copy(update={"data": config.data}) == config
    assert isinstance(found[0], Submission)
