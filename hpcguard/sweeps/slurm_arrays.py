"""Jobs of a sweep to tasks of Slurm arrays; pure.

A task trains the arms of a pack one after the other and then measures them: one wait in the queue, and a cell ends
when its training does. A model that a store or another training waits for is alone in its task, and so is a store:
what needs them starts as soon as they are there. An array holds the tasks that wait for the same jobs, for Slurm knows
one dependency an array, so nothing waits for what it does not need.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from hpcguard.cluster.packing import pack
from hpcguard.sweeps.jobs import Graph, Kind, pack_key


@dataclass(frozen=True)
class TaskArray:
    """Tasks that wait for the same jobs and ask for the same resources."""

    kind: Kind  # of job, whose resources they ask for: the first of each task
    tasks: list[list[str]]  # the jobs of each, in their order
    needs: tuple[str, ...]  # jobs of earlier arrays, or that Slurm has already
    parallel: int  # tasks at once
    after: int | None  # the array, by its place, that must have ended: see lanes


def arrange(
    graph: Graph, todo: Sequence[str], live: Set[str], per_task: int, largest: int, at_once: int
) -> list[TaskArray]:
    """The arrays that do `todo`, each behind those that it needs.

    live: jobs that Slurm has already. largest: tasks of an array at most. at_once: tasks at once, over all arrays.
    """
    groups: dict[tuple[Kind, tuple[str, ...]], list[list[str]]] = {}
    not_done = live | set(todo)
    for jobs in _tasks(graph, todo, not_done, per_task):
        groups.setdefault((graph.jobs[jobs[0]].kind, _waits_for(graph, jobs, not_done)), []).append(jobs)
    parts = [
        (kind, needs, tasks[start : start + largest])
        for (kind, needs), tasks in groups.items()
        for start in range(0, len(tasks), largest)
    ]
    shares = lanes([len(tasks) for _, _, tasks in parts], at_once)
    return [TaskArray(kind, tasks, needs, *share) for (kind, needs, tasks), share in zip(parts, shares, strict=True)]


def _tasks(graph: Graph, todo: Sequence[str], not_done: Set[str], per_task: int) -> list[list[str]]:
    place = {name: number for number, name in enumerate(todo)}
    own = {graph.jobs[name].needs[0]: name for name in todo if graph.jobs[name].kind == "evaluate"}
    waited_for = {need for name in todo for need in graph.jobs[name].needs if own.get(need) != name}
    own = {trained: evaluate for trained, evaluate in own.items() if trained in place and trained not in waited_for}
    alike: dict[tuple[object, ...], list[str]] = {}
    for name in todo:
        job = graph.jobs[name]
        if job.kind == "evaluate" and job.needs[0] in own:
            continue  # it follows its training
        key = ("alone", name) if name in waited_for else pack_key(job, graph.inputs[name])
        both = [name, own[name]] if name in own else [name]
        alike.setdefault((key, _waits_for(graph, both, not_done)), []).append(name)
    packs = [batch for names in alike.values() for batch in _packed(names, per_task)]
    packs.sort(key=lambda batch: place[batch[0]])  # so that groups begin behind those that they need
    return [[*batch, *(own[name] for name in batch if name in own)] for batch in packs]


def _packed(names: list[str], per_task: int) -> list[list[str]]:
    return [[names[place] for place in places] for places in pack(range(len(names)), per_task)]


def _waits_for(graph: Graph, jobs: Sequence[str], not_done: Set[str]) -> tuple[str, ...]:
    """What a task of these jobs waits for: what they need and do not do themselves."""
    needs = (need for name in jobs for need in graph.jobs[name].needs)
    return tuple(dict.fromkeys(need for need in needs if need in not_done and need not in jobs))


def lanes(sizes: Sequence[int], at_once: int) -> list[tuple[int, int | None]]:
    """(tasks at once, the array that must have ended) of arrays of these sizes, in sum at most at_once.

    Slurm caps tasks only within an array. Where there are more arrays than may run at once, they run one task at a time
    and are dealt to lanes, whose arrays follow each other.
    """
    if len(sizes) > at_once:
        return [(1, place - at_once if place >= at_once else None) for place in range(len(sizes))]
    shares = [1] * len(sizes)
    spare = at_once - len(sizes)
    while spare and (open_ := [place for place, size in enumerate(sizes) if shares[place] < size]):
        even = max(1, spare // len(open_))
        for place in open_[:spare]:
            more = min(even, sizes[place] - shares[place])
            shares[place] += more
            spare -= more
    return [(share, None) for share in shares]
