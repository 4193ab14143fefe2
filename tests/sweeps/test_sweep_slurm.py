"""One sweep of 8 cells with 3 seeds on a real Slurm, disturbed, and here: the same table, everything done once."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from night import cluster_of, environment
from slurm_cluster import Slurm, need_slurm

from hpcguard.runs import digest_file

PATIENCE_S = 600.0
ON_OFF = {
    "masking": {"on": {}, "off": {"refinement.masking.weight": 0}},
    "sensitivity": {"on": {}, "off": {"refinement.sensitivity.weight": 0}},
    "adversarial": {"on": {}, "off": {"refinement.adversarial_weight": 0, "refinement.clean_weight": 1}},
}
SMALL = {
    "cluster": {"workers": 1, "shards": 1},
    "baseline": {"epochs": 4, "learning_rate": 0.1},
    "refinement": {"epochs": 1, "attack": {"steps": 1}},
    "evaluation": {"images": 48, "eps": 0.03, "pgd_steps": 2, "explained": 0, "alarms": {"images": 1, "queries": 1}},
}
# The second call of sbatch waits for ever, where a file called hold lies beside this.
SBATCH = """#!/bin/sh
here=$(dirname "$0")
echo >> "$here/calls"
if [ -e "$here/hold" ] && [ "$(wc -l < "$here/calls")" -ge 2 ]; then echo $$ > "$here/pid"; exec sleep 600; fi
PATH=${PATH#*:} exec sbatch "$@"
"""


class Bench:
    """The sweep on a cluster, driven by the command line as a user does."""

    def __init__(self, folder: Path, cluster: Slurm) -> None:
        self.folder, self.cluster = folder, cluster
        self.sweep = folder / "slurm"

    def environment(self) -> dict[str, str]:
        known = environment(self.folder)
        path = f"{self.folder / 'bin'}{os.pathsep}{known['PATH']}"
        return known | {"SLURM_CONF": self.cluster.env["SLURM_CONF"], "PATH": path}

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "hpcguard", *words], env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def hpcguard(self, *words: str, status: int = 0) -> str:
        process = self.start(*words)
        said, _ = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == status, said + self.logs()
        return said

    def submit(self, *more: str, status: int = 0) -> str:
        run = (f"run={self.sweep}", "cluster.executor=slurm")
        return self.hpcguard("sweep", str(self.folder / "sweep.yaml"), *more, *run, status=status)

    def status(self) -> Any:
        return json.loads(self.hpcguard("status", str(self.sweep), "--json"))

    def submitted(self) -> list[list[list[str]]]:
        """The jobs of every task that sbatch has taken, submission by submission."""
        found = []
        for path in sorted(self.sweep.glob("slurm/*/submission.json")):
            arrays = json.loads(path.with_name("jobs.json").read_text())["jobs"]
            found.append(json.loads(path.read_text())["tasks"][: sum(array["tasks"] for array in arrays)])
        return found

    def last_job(self) -> str:
        """Id of the newest submission's last job."""
        last = json.loads(sorted(self.sweep.glob("slurm/*/jobs.json"))[-1].read_text())["jobs"][-1]
        assert last["kind"] == "report"
        return last["job"]

    def queue(self) -> list[str]:
        lines = self.cluster.run("squeue -h -r -o '%i %T %k'").splitlines()
        return [line for line in lines if str(self.sweep) in line]

    def wait(self, true: Callable[[], Any], what: str) -> None:
        end = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < end, f"{what}: {self.queue()}\n{self.logs()}"
            time.sleep(0.1)

    def kill_task(self, of: Path) -> None:
        """kill -9 of the array task that holds a file's lock, and nothing else."""
        inode = of.stat().st_ino
        holders = {int(line.split()[4]) for line in Path("/proc/locks").read_text().splitlines()
                   if line.split()[5].endswith(f":{inode}")}  # fmt: skip
        (holder,) = holders
        os.kill(holder, signal.SIGKILL)

    def logs(self) -> str:
        paths = sorted(self.sweep.glob("slurm/*/*_log.*"))
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in paths)

    def files(self) -> dict[str, int]:
        """Published weights, shards and results with the time of their making."""
        kinds = ("*/*/checkpoints/*/model.safetensors", "*/*/shards/*.h5", "*/*/results/*.json")
        return {str(path): path.stat().st_mtime_ns for kind in kinds for path in self.sweep.glob(kind)}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, make_config: Callable[..., Path]) -> Iterator[Bench]:
    need_slurm()
    folder = tmp_path_factory.mktemp("sweep")
    base = make_config(folder, **SMALL)
    sweep = {"base": str(base), "axes": ON_OFF, "seeds": [0, 1, 2], "pack": 9, "max_jobs": 2}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))
    (folder / "bin").mkdir()
    (folder / "bin/sbatch").write_text(SBATCH)
    (folder / "bin/sbatch").chmod(0o755)
    with cluster_of("--nodes", 2, "--cpus", 2, "--memory", 4000, "--max-array-size", 3) as cluster:
        yield Bench(folder, cluster)


@pytest.fixture(scope="module")
def swept(bench: Bench) -> Bench:
    """Submitted in two parts, for the first time was cut short; disturbed; then completed by the same command."""
    _submitted_in_two_parts(bench)
    _two_tasks_are_lost(bench)
    before = bench.files()
    said = bench.submit("--wait")
    assert "3 arrays, 4 tasks" in said and "24 cells: 24 done" in said
    assert before.items() <= bench.files().items()  # nothing was done again
    return bench


def _submitted_in_two_parts(bench: Bench) -> None:
    planned = bench.submit("--dry-run")
    assert "slurm        4 arrays, 5 tasks" in planned and "report     1 task" in planned
    assert not bench.sweep.exists()
    (bench.folder / "bin/hold").touch()
    process = bench.start("sweep", str(bench.folder / "sweep.yaml"), f"run={bench.sweep}", "cluster.executor=slurm")
    bench.wait((bench.folder / "bin/pid").exists, "a second sbatch")
    process.kill()
    process.wait()
    os.kill(int((bench.folder / "bin/pid").read_text()), signal.SIGKILL)
    (bench.folder / "bin/hold").unlink()
    assert "3 arrays, 4 tasks" in bench.submit()
    again = bench.submit()
    assert len(bench.submitted()) == 2, again  # all is in the queue, or done
    (first,), second = bench.submitted()
    assert not {*first} & {name for task in second for name in task}


def _two_tasks_are_lost(bench: Bench) -> None:
    """The store's, while attribution runs; and the one of the arms without a store, when it has trained them."""
    locks = bench.sweep / "running"
    bench.wait(lambda: list(bench.sweep.glob("stores/*/plan.json")), "attribution")
    (store,) = locks.glob("attribute-*.lock")
    assert Counter(cell["state"] for cell in bench.status()["cells"])["running"] >= 18  # all that wait for it
    bench.kill_task(store)
    bench.wait(lambda: list(locks.glob("evaluate-*.lock")), "an evaluation: a neighbour's failure is none of its own")
    bench.kill_task(next(locks.glob("evaluate-*.lock")))
    bench.wait(lambda: not bench.queue(), "an empty queue")  # what waits for the store does not stay there
    # The last job ran although arrays were cancelled, and says by its end that cells have failed.
    assert Counter(row["state"] for row in rows(bench.sweep)) == {"held up": 18, "failed": 6}
    assert bench.cluster.state(bench.last_job()) == "FAILED"
    state = bench.status()
    assert Counter(cell["state"] for cell in state["cells"]) == {"held up": 18, "failed": 6}
    assert {name.split("-")[0] for name in state["failed"]} == {"attribute", "evaluate"}
    assert "ended as FAILED" in state["failed"][store.stem]["why"]
    assert state["jobs"]["refine"] == {"done": 7, "held up": 18}
    shown = bench.hpcguard("status", str(bench.sweep))
    assert "held up" in shown and "FAILED" in shown


def rows(folder: Path) -> list[dict[str, str]]:
    table = csv.DictReader((folder / "table.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in table]


def test_stores_are_shared(swept: Bench) -> None:
    jobs = json.loads((swept.sweep / "cells.json").read_text())["jobs"]
    assert Counter(job["kind"] for job in jobs) == {"refine": 25, "attribute": 1, "evaluate": 24}
    assert len(list(swept.sweep.glob("stores/*"))) == len(list(swept.sweep.glob("models/*"))) == 1
    times = Counter(name for tasks in swept.submitted() for task in tasks for name in task)
    (base,) = [job["needs"][0] for job in jobs if job["kind"] == "attribute"]
    free = {job["name"] for job in jobs if job["needs"] == [base] and job["kind"] == "refine"}
    # 6 arms need no store: they were trained at once, and measured at the second try. The others were held up.
    assert len(free) == 6
    assert times == {job["name"]: 1 if job["name"] in {base, *free} else 2 for job in jobs}
    begun = Counter(
        line.split()[2]
        for log in swept.sweep.glob("logs/*")
        for line in log.read_text().splitlines()
        if line[0:1] == "$"
    )
    assert begun["refine"] == 4  # 25 trainings in packs of at most 9
    assert begun["attribute"] == 2 and begun["evaluate"] == 4  # one of each was killed


def test_the_table_is_that_of_a_local_sweep(swept: Bench) -> None:
    local = swept.folder / "local"
    swept.hpcguard("sweep", str(swept.folder / "sweep.yaml"), f"run={local}", "pack=24")
    here, there = rows(local), rows(swept.sweep)
    assert len(here) == 24 and {row["state"] for row in here} == {"done"}
    assert here == there
    for row in here:
        assert digest_file(local / row["weights"]) == digest_file(swept.sweep / row["weights"])
    assert len({digest_file(local / row["weights"]) for row in here}) == 24
    assert len({row["clean"] for row in here}) > 3 and len({row["pgd-2"] for row in here}) > 3


def test_a_finished_sweep_submits_nothing(swept: Bench) -> None:
    before = swept.submitted()
    assert "24 cells: 24 done" in swept.submit()
    assert swept.submitted() == before


def test_what_slurm_has_is_not_done_here_and_can_be_cancelled(swept: Bench) -> None:
    """An added cell, whose training is held back."""
    swept.wait(lambda: not swept.queue(), "an empty queue")
    assert swept.cluster.state(swept.last_job()) == "COMPLETED"  # of the submission that did the rest
    swept.cluster.run("scontrol update NodeName=n0,n1 State=DRAIN Reason=test")
    others = swept.cluster.sbatch("true", "--job-name=hpcguard-refine-0004-0", f"--comment={swept.folder}/other")
    swept.submit("seeds=[0,1,2,3]")
    assert {name.split("-")[0] for task in swept.submitted()[-1] for name in task} == {"refine", "evaluate"}
    assert Counter(cell["state"] for cell in swept.status()["cells"]) == {"done": 24, "queued": 8}
    refused = swept.hpcguard("sweep", str(swept.sweep), "cluster.executor=local", status=2)
    assert "in Slurm's queue" in refused and f"`hpcguard cancel {swept.sweep}`" in refused

    queued = swept.queue()
    listed = swept.hpcguard("cancel", str(swept.sweep), "--dry-run")
    assert f"{swept.last_job():<9} report       submission 0004  1 PENDING" in listed
    assert f"would be cancelled; `hpcguard sweep {swept.sweep}` would go on from there" in listed
    assert swept.queue() == queued
    swept.hpcguard("cancel", str(swept.sweep))
    swept.wait(lambda: not swept.queue(), "an empty queue")
    assert swept.cluster.run("squeue -h -o %i") == others
    assert Counter(cell["state"] for cell in swept.status()["cells"]) == {"done": 24, "waiting": 8}

    before = swept.submitted()
    swept.hpcguard("sweep", str(swept.sweep))
    assert swept.submitted() == [*before, before[-1]]
    swept.hpcguard("cancel", str(swept.sweep))
    swept.cluster.run(f"scancel {others}; scontrol update NodeName=n0,n1 State=RESUME")
