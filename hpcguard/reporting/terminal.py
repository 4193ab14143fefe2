"""A run's state for a terminal: lines of text and a small table."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from hpcguard.progress import duration

State = Mapping[str, Any]
MOST_MISSING = 20
MOST_NAMED = 3
MOST_WHY = 8


def draw(state: State) -> Group:
    """Everything of one look at a run."""
    store = state["store"]
    lines = [("run", str(state["run"])), *_shard_lines(state)]
    if "progress" in state:
        lines += [*_work_lines(state), *_slurm_lines(state["slurm"]), *_failing_lines(state["failing"])]
    lines.append(("store", f"{store['state']}{_why(store)}"))
    report = ("report", str(state["report"] or "not written"))
    return Group(*map(_line, lines), _arms(state["arms"]), _line(report))


def one_line(state: State) -> str:
    """The same in one line, for a log."""
    shards, progress = state["shards"], state.get("progress")
    if progress is None:
        return f"shards {shards['state']}{_why(shards)}"
    counts = ", ".join(f"{name} {progress[name]}" for name in ("running", "pending", "waiting"))
    queue = f"failed {sum(progress['failed'].values())}, jobs in the queue {state['slurm']['jobs_in_queue']}"
    return f"{shards['done']} of {shards['planned']} shards, {counts}, {queue}{_time_left(state['speed'])}"


def _line(line: tuple[str, str]) -> Text:
    """A label and a text, of which only printable characters are kept: it may hold anybody's bytes."""
    label, text = line
    return Text(f"{label:<8}" + "".join(mark if mark.isprintable() else " " for mark in text))


def _shard_lines(state: State) -> Iterator[tuple[str, str]]:
    shards = state["shards"]
    counts = f", {shards['done']} of {shards['planned']} ({shards['images']} images)" if "planned" in shards else ""
    yield "shards", f"{shards['state']}{counts}{_why(shards)}"
    if missing := shards.get("missing"):
        more = ", ..." if len(missing) > MOST_MISSING else ""
        yield "", f"missing: {', '.join(map(str, missing[:MOST_MISSING]))}{more}"


def _work_lines(state: State) -> Iterator[tuple[str, str]]:
    progress, speed, quarantined = state["progress"], state["speed"], state["quarantined"]
    waiting = "waiting" if state["slurm"]["state"] == "not used" else "waiting to be submitted"
    if state["shards"]["missing"]:
        failed = sum(progress["failed"].values())
        yield (
            "",
            (
                f"running {progress['running']}, pending {progress['pending']}, {waiting} {progress['waiting']}, "
                f"failed {failed}{_counts(progress['failed'], ' (', ')')}, unknown {progress['unknown']}"
            ),
        )
    if state["interrupted"]:
        yield "", f"interrupted {sum(state['interrupted'].values())} times: {_counts(state['interrupted'])}"
    if progress["unusable"]["count"]:
        named = ", ".join(f"{row['shard']:05d} ({row['why']})" for row in progress["unusable"]["first"][:MOST_NAMED])
        yield "", f"{progress['unusable']['count']} cannot be used: {named}"
    if progress["unreadable_records"]:
        yield "", f"records of failures that cannot be read: {', '.join(progress['unreadable_records'][:MOST_NAMED])}"
    if speed["images_per_second"] is not None:
        over = f"{speed['over_shards']} shards, {duration(speed['over_seconds'])} of computing"
        yield "rate", f"{speed['images_per_second']:.1f} images a second (last {over}){_time_left(speed)}"
    if state["slowest"]:
        rows = (f"{row['shard']:05d} {row['seconds']:.1f} s on {row['host']}" for row in state["slowest"])
        yield "slowest", ", ".join(rows)
    if quarantined["count"]:
        yield "images", f"{quarantined['count']} quarantined"
        for row in quarantined["first"]:
            yield "", f"{row['image']} (shard {row['shard']:05d}): {row['why']}"


def _slurm_lines(slurm: State) -> Iterator[tuple[str, str]]:
    if slurm["state"] == "not used":
        return
    if slurm["state"] == "unknown":
        yield "slurm", f"unknown: {slurm['why']}"
    for submission in slurm["submissions"]:
        then = submission["settled"] or ""
        if submission["next"] is not None:
            then += f" as {submission['next']:04d}"
        yield "jobs", f"submission {submission['number']:04d}{': ' if then else ''}{then}"
        for line in (*submission["why"][:MOST_WHY], *submission["problems"]):
            yield "", f"  {line}"
        if (more := len(submission["why"]) - MOST_WHY) > 0:
            yield "", f"  ... and {more} more"
        for job in submission["jobs"]:
            yield "", f"  {_job(job, submission['why'])}"


def _job(job: State, why: list[str]) -> str:
    tasks = f" ({job['tasks']} tasks)" if job["tasks"] > 1 else ""
    name = f"{job['kind']} {job['job']}{tasks}: "
    if job["states"] == "unknown":
        return f"{name}unknown"
    text = _counts(job["states"], number_first=True) or "not in the queue any more"
    text += _counts(job["reasons"], "; waits for ")
    if any(state.startswith("CANCELLED") for state in job["states"]):
        text += f": {why[0]}" if why else ": not by hpcguard; its log may say more"
    return f"{name}{text}"


def _failing_lines(failing: list[Any]) -> Iterator[tuple[str, str]]:
    for row in failing:
        shards = f"{row['shards']} shard{'s' if row['shards'] > 1 else ''}"
        yield "failed", f"{row['kind']}, {shards}, such as {row['shard']:05d} on {row['host']}: {row['message']}"
        for line in str(row["tail"] or "").splitlines():
            yield "", f"  {line}"
        if row["log"]:
            yield "", f"  log: {row['log']}"


def _arms(arms: State) -> Table:
    table = Table("arm", "trained", "epochs", "accuracy", box=box.SIMPLE)
    for arm, row in arms.items():
        accuracy = row["accuracy"]
        if isinstance(accuracy, dict):
            accuracy = ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
        table.add_row(arm, "yes" if row["trained"] else "no", str(row["epochs_done"]), Text(accuracy or "not measured"))
    return table


def _counts(counts: Mapping[str, int], before: str = "", after: str = "", number_first: bool = False) -> str:
    pairs = (f"{n} {name}" if number_first else f"{name} {n}" for name, n in counts.items())
    return f"{before}{', '.join(pairs)}{after}" if counts else ""


def _time_left(speed: State) -> str:
    left = speed["seconds_left"]
    if left is None:
        return ""
    return ", time left unknown" if left == "unknown" else f", about {duration(left)} left"


def _why(part: State) -> str:
    return f": {part['why']}" if "why" in part else ""
