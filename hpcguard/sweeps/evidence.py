"""What is done of a sweep, by the stages' own files."""

import json
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hpcguard.cluster.plan import read_plan
from hpcguard.errors import InputError
from hpcguard.runs import RunFolder, digest_file, is_claimed, read_json
from hpcguard.sweeps.folder import SweepFolder
from hpcguard.sweeps.jobs import Graph, Job
from hpcguard.sweeps.slurm_state import Seen, look

REMEDY = "start the sweep again"
IDENTITY = '"identity": '


def training_of(run: RunFolder, arm: str) -> dict[str, Any] | None:
    """training.json of a trained arm; None where there is none, or it cannot be read."""
    if not run.weights(arm).is_file():
        return None
    try:
        return read_json(run.training(arm), REMEDY, weights_sha256=str)
    except InputError:
        return None


def result_of(
    folder: SweepFolder, job: Job, training: Mapping[str, Any], alike: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The result of an evaluation, if it is of these weights, held against those and measured as the sweep says."""
    try:
        result = read_json(folder.run(job).result(job.arm), REMEDY, attacks=dict, identity=dict)
    except InputError:
        return None
    return result if _fits(folder, job, training, alike, result["identity"]) else None


def _fits(
    folder: SweepFolder, job: Job, training: Mapping[str, Any], alike: Mapping[str, Any], identity: Mapping[str, Any]
) -> bool:
    wanted = {**alike, "weights_sha256": training["weights_sha256"]}
    if against := _against(folder, job):
        wanted["baseline_sha256"] = against
    explained = not alike["evaluation"]["explained"] or folder.run(job).explanations(job.arm).is_file()
    return explained and all(identity.get(key) == value for key, value in wanted.items())


def _first_identity(path: Path) -> dict[str, Any]:
    """What a result says first of its identity, the rest unread: of thousands, parsing all takes most of the time."""
    try:
        text = path.read_text(encoding="utf-8")
        found, _ = json.JSONDecoder().raw_decode(text, text.index(IDENTITY) + len(IDENTITY))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and text.endswith("}\n") else {}


def _against(folder: SweepFolder, job: Job) -> str | None:
    """The digest of what an evaluation holds its arm against; None where that is nothing, or is gone."""
    if not job.explained:
        return None
    recorded = _recorded(folder.path, job.explained)
    try:
        return _weights_digest(recorded, recorded.stat().st_mtime_ns)
    except (OSError, InputError):
        return None


@lru_cache(maxsize=4096)  # thousands of evaluations ask for the same
def _recorded(folder: Path, explained: str) -> Path:
    """The file that tells the digest of such weights: a training.json, or given weights themselves."""
    weights = folder / explained
    own = not Path(explained).is_absolute()
    return RunFolder(weights.parents[2]).training(weights.parent.name) if own else weights


@lru_cache(maxsize=4096)
def _weights_digest(path: Path, changed: int) -> str:
    if path.suffix == ".json":
        return str(read_json(path, REMEDY, weights_sha256=str)["weights_sha256"])
    return digest_file(path)


def is_stored(run: RunFolder) -> bool:
    """Whether a store is there that fits its plan, by its manifest; its bytes are not read."""
    if not run.store.is_file():
        return False
    try:
        recorded = read_json(run.store_manifest, REMEDY, fingerprint=str)
        return bool(recorded["fingerprint"] == read_plan(run.plan).fingerprint)
    except InputError:
        return False


def is_done(
    folder: SweepFolder, job: Job, alike: Mapping[str, Any],
    read: Callable[[RunFolder, str], dict[str, Any] | None] = training_of,
) -> bool:  # fmt: skip
    run = folder.run(job)
    if job.kind == "attribute":
        return is_stored(run)
    training = read(run, job.arm)
    if job.kind == "refine" or training is None:
        return training is not None
    quick = _fits(folder, job, training, alike, _first_identity(run.result(job.arm)))
    return quick or result_of(folder, job, training, alike) is not None


def done_jobs(folder: SweepFolder, graph: Graph, alike: Mapping[str, Any]) -> set[str]:
    """Jobs whose files are there and fit each other."""
    if not folder.path.is_dir():
        return set()
    read = cache(training_of)  # once for an arm's training and its evaluation
    return {job.name for job in graph.jobs.values() if is_done(folder, job, alike, read)}


def jobs_to_do(graph: Graph, done: set[str]) -> list[str]:
    """What the cells still need, in the order of the plan: nothing that only done jobs have needed."""
    needed: set[str] = set()
    open_ = [cell.evaluate for cell in graph.cells]
    while open_:
        name = open_.pop()
        if name not in done and name not in needed:
            needed.add(name)
            open_ += graph.jobs[name].needs
    return [name for name in graph.jobs if name in needed]


def damaged(folder: SweepFolder, graph: Graph, done: set[str]) -> dict[str, str]:
    """Of what jobs to do build on, the jobs whose published bytes are not those that were verified, and why.

    To do are these then too, so what they were made from is compared as well.
    """
    found: dict[str, str] = {}
    sound: set[str] = set()  # is read once
    while True:
        todo = set(jobs_to_do(graph, done - found.keys()))
        unread = {need for each in todo for need in graph.jobs[each].needs} - todo - sound
        if not unread:
            return found
        for name in sorted(unread):
            if problem := _problem(folder, graph.jobs[name]):
                found[name] = problem
            else:
                sound.add(name)


def _problem(folder: SweepFolder, job: Job) -> str | None:
    """Why what a job has published cannot be built on, or None."""
    run = folder.run(job)
    if job.kind == "attribute":
        from hpcguard.store import view_problem  # torch: who only looks does without

        return view_problem(run.store, run.store_manifest, read_plan(run.plan).fingerprint)
    return None if has_its_bytes(run, job.arm) else f"{run.weights(job.arm)}: differs from what was trained"


def has_its_bytes(run: RunFolder, arm: str) -> bool:
    """Whether an arm's weights are those that its training published."""
    training = training_of(run, arm)
    return training is not None and digest_file(run.weights(arm)) == training["weights_sha256"]


def running_jobs(folder: SweepFolder) -> set[str]:
    """Jobs that some process is having done now."""
    return {path.stem for path in folder.running.glob("*.lock") if is_claimed(path)}


def record_of(folder: SweepFolder, job: str) -> dict[str, Any]:
    """How a job's last attempt ended; empty where there was none."""
    try:
        return read_json(folder.record(job), REMEDY, status=int, seconds=float)
    except InputError:
        return {}


def job_states(folder: SweepFolder, graph: Graph, alike: Mapping[str, Any]) -> dict[str, str]:
    """done, running, queued, failed, held up or waiting, of every job."""
    done = done_jobs(folder, graph, alike)
    return states_with(folder, graph, done, look(folder, graph.jobs.keys() - done))


def states_with(folder: SweepFolder, graph: Graph, done: set[str], seen: Seen) -> dict[str, str]:
    """The same, of what is known to be done and what Slurm says of the others."""
    running = running_jobs(folder)
    # Files may be there and damaged, which the stage has found and nothing here looks for.
    built_on = {need for name in graph.jobs.keys() - done for need in graph.jobs[name].needs}
    states: dict[str, str] = {}
    for name, job in graph.jobs.items():  # each behind those that it needs
        if name in running:
            states[name] = "running"
        elif name in seen.live and name not in done:
            states[name] = "queued"
        elif name not in done and _held_up(folder, job, states, seen):
            states[name] = "held up"  # also where its task ended badly, which it did by what has failed
        elif name in seen.ended or ((name not in done or name in built_on) and record_of(folder, name).get("status")):
            states[name] = "failed"
        elif name in done:
            states[name] = "done"
        else:
            states[name] = "waiting"
    return states


def _held_up(folder: SweepFolder, job: Job, states: Mapping[str, str], seen: Seen) -> bool:
    """Whether what a job needs has failed or is held up; not by a failure that it was tried after all the same."""
    stuck = [need for need in job.needs if states[need] in ("failed", "held up")]
    if not stuck:
        return False
    tried = record_of(folder, job.name).get("time", 0.0)
    return any(
        states[need] == "held up" or need in seen.ended or record_of(folder, need).get("time", tried) >= tried
        for need in stuck
    )


def cell_states(graph: Graph, states: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each cell's state, and the job that it is the state of."""
    found = []
    for cell in graph.cells:
        last, trained = states[cell.evaluate], states[cell.refine]
        if last in ("done", "failed"):
            found.append((last, cell.evaluate))
        elif trained == "failed":
            found.append((trained, cell.refine))
        else:
            chain = sorted(graph.before([cell.evaluate]))
            first = {state: name for name in reversed(chain) if (state := states[name])}
            if last == "held up":
                found.append((last, first["failed"]))
            else:
                state = next((state for state in ("running", "queued") if state in first), "waiting")
                found.append((state, first.get(state, cell.evaluate)))
    return found
