"""States of jobs by their records and what Slurm says; damage, however deep, in folders that real stages have made."""

import shutil
from collections import Counter
from pathlib import Path

import pytest

from hpcguard.runs import write_json
from hpcguard.sweep import _todo
from hpcguard.sweeps.evidence import cell_states, damaged, done_jobs, jobs_to_do, states_with
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Job, Planned
from hpcguard.sweeps.slurm_state import Seen

ALIKE = {"evaluation": {"explained": 0}, "attribution": {}}


def job(name: str, folder: str, *needs: str) -> Job:
    kind, _, arm = name.partition("-")
    return Job(name, kind, folder, "" if kind == "attribute" else arm, needs)  # type: ignore[arg-type]


def graph_of(*jobs: Job) -> Graph:
    """With a cell for every evaluation."""
    cells = [Planned({"arm": one.arm}, 0, one.needs[0], one.name) for one in jobs if one.kind == "evaluate"]
    return Graph(cells, {one.name: one for one in jobs}, {})


@pytest.fixture
def folder(tmp_path: Path) -> SweepFolder:
    folder = SweepFolder(tmp_path / "sweep")
    folder.create()
    return folder


def record(folder: SweepFolder, name: str, status: int, time: float) -> None:
    write_json(folder.record(name), {"status": status, "seconds": 1.0, "why": "", "log": "x.log", "time": time})


PAIR = graph_of(
    *(job(f"refine-{arm}", "models/m") for arm in "ab"),
    *(job(f"evaluate-{arm}", "models/m", f"refine-{arm}") for arm in "ab"),
)


def states_of(folder: SweepFolder, *done: str, as_: str = "") -> dict[str, str]:
    """Where all that is not done was in one task, which has ended so."""
    last = {name: f"its task 7_0 ended as {as_}" for name in PAIR.jobs if as_ and name not in done}
    return states_with(folder, PAIR, set(done), Seen(ended=last))


def test_an_evaluation_is_held_up_where_its_training_has_failed_in_the_same_task(folder: SweepFolder) -> None:
    record(folder, "refine-a", 1, 10.0)
    states = states_of(folder, "refine-b", "evaluate-b", as_="FAILED")
    assert states == {"refine-a": "failed", "refine-b": "done", "evaluate-a": "held up", "evaluate-b": "done"}
    assert cell_states(PAIR, states) == [("failed", "refine-a"), ("done", "evaluate-b")]
    assert states == states_of(folder, "refine-b", "evaluate-b")  # as where it runs locally


def test_an_older_failure_of_its_own_hides_nothing(folder: SweepFolder) -> None:
    record(folder, "evaluate-a", 1, 5.0)
    record(folder, "refine-a", 1, 10.0)
    assert states_of(folder)["evaluate-a"] == "held up"


def test_what_was_tried_after_a_failure_was_not_held_up_by_it(folder: SweepFolder) -> None:
    """The training's command ended badly when its files were there already, so the next call measured them."""
    record(folder, "refine-a", 1, 5.0)
    record(folder, "evaluate-a", 1, 10.0)
    states = states_of(folder, "refine-a")
    assert states["evaluate-a"] == "failed"
    assert cell_states(PAIR, states)[0] == ("failed", "evaluate-a")
    assert states_of(folder, as_="OUT_OF_MEMORY")["evaluate-a"] == "held up"  # trained again, and killed in that


def test_a_task_that_was_killed_has_failed_in_the_job_that_it_was_at(folder: SweepFolder) -> None:
    both = states_of(folder, as_="OUT_OF_MEMORY")  # one process trains both
    assert both == {"refine-a": "failed", "refine-b": "failed", "evaluate-a": "held up", "evaluate-b": "held up"}
    assert cell_states(PAIR, both) == [("failed", "refine-a"), ("failed", "refine-b")]
    measured = states_of(folder, "refine-a", "refine-b", as_="TIMEOUT")
    assert Counter(measured.values()) == {"done": 2, "failed": 2}
    assert cell_states(PAIR, measured) == [("failed", "evaluate-a"), ("failed", "evaluate-b")]


def test_what_is_done_is_not_held_up(folder: SweepFolder) -> None:
    record(folder, "refine-a", 1, 10.0)
    assert states_of(folder, "evaluate-a")["evaluate-a"] == "done"


STORED = graph_of(
    job("refine-baseline", "models/m"),
    job("attribute-s", "stores/s", "refine-baseline"),
    job("refine-new", "stores/s", "attribute-s"),
    job("evaluate-new", "stores/s", "refine-new"),
)


@pytest.fixture
def made(folder: SweepFolder, attributed: Path) -> SweepFolder:
    """A baseline and its store; an arm is to be trained from it."""
    shutil.copytree(attributed, folder.path / "stores/s")
    (folder.path / "models/m").mkdir(parents=True)
    (folder.path / "stores/s/checkpoints").rename(folder.path / "models/m/checkpoints")
    return folder


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def shard_of(folder: SweepFolder) -> Path:
    return sorted(folder.path.glob("stores/s/shards/*.h5"))[0]


def weights_of(folder: SweepFolder) -> Path:
    return folder.path / "models/m/checkpoints/baseline/model.safetensors"


NEW = ["refine-new", "evaluate-new"]


def test_what_is_sound_is_built_on(made: SweepFolder) -> None:
    assert _todo(made, STORED, ALIKE) == NEW


def test_a_damaged_store_is_made_again_with_the_baseline_that_it_lacks(
    made: SweepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    weights_of(made).unlink()
    assert _todo(made, STORED, ALIKE) == NEW  # nothing needs it
    spoil(shard_of(made))
    assert _todo(made, STORED, ALIKE) == ["refine-baseline", "attribute-s", *NEW]
    said = capsys.readouterr().out
    assert "sweep: attribute-s: " in said and "has changed since it was verified" in said


def test_a_damaged_store_is_not_made_again_from_a_damaged_baseline(made: SweepFolder) -> None:
    spoil(weights_of(made))
    done = done_jobs(made, STORED, ALIKE)
    assert damaged(made, STORED, done) == {}  # the store is sound, and nothing else to do needs it
    spoil(shard_of(made))
    broken = damaged(made, STORED, done)
    assert broken.keys() == {"refine-baseline", "attribute-s"}
    assert "differs from what was trained" in broken["refine-baseline"]
    assert jobs_to_do(STORED, done - broken.keys()) == list(STORED.jobs)


def test_all_done_compares_nothing(made: SweepFolder) -> None:
    spoil(shard_of(made))
    assert damaged(made, STORED, set(STORED.jobs)) == {}
