"""Which jobs may start: what each waits for, what a failure holds up, what goes into one process."""

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from hpcguard.sweeps.jobs import Graph, Inputs, Job, pack_key

ORDER = {"evaluate": 0, "attribute": 1, "refine": 2}  # cells end early, and stores that others wait for begin early


class Ready:
    """The jobs to do, handed out when nothing to do is left that they need; up to `pack` to each of `slots` at once."""

    def __init__(self, graph: Graph, todo: Sequence[str], pack: int, slots: int = 1) -> None:
        self._graph, self._pack, self._slots = graph, pack, slots
        self._place = {name: place for place, name in enumerate(todo)}
        self._left = set(todo)
        self._waits = {name: set(graph.jobs[name].needs) & self._left for name in todo}
        self._held_up_by: dict[str, list[str]] = defaultdict(list)
        for name, needs in self._waits.items():
            for need in needs:
                self._held_up_by[need].append(name)
        self._heap: list[tuple[int, int, str]] = []
        self._alike: dict[tuple[str, ...], list[str]] = defaultdict(list)  # that could go into one process
        # A store begins as soon as it can, whatever else could be trained together with its model.
        stores = [graph.jobs[name] for name in todo if graph.jobs[name].kind == "attribute"]
        self._first = {need for store in stores for need in store.needs}
        self._alone = set(self._first)
        for name in [name for name, needs in self._waits.items() if not needs]:
            self._open(name)

    def take(self) -> list[Job]:
        """The next jobs for one process; none if none may start now."""
        while self._heap:
            _, _, name = heapq.heappop(self._heap)
            if name not in self._left:
                continue  # it went with an earlier one
            alike = self._alike[self._key(name)]
            most = min(self._pack, math.ceil(len(alike) / self._slots))  # the last few are shared out: no slot is idle
            batch = [name] if name in self._alone else [name, *(each for each in alike if each != name)][:most]
            for each in batch:
                self._left.discard(each)
                alike.remove(each)
            return [self._graph.jobs[each] for each in batch]
        return []

    def done(self, name: str) -> None:
        for other in self._held_up_by.pop(name, []):
            self._waits[other].discard(name)
            if not self._waits[other]:
                self._open(other)

    def again_alone(self, job: Job) -> None:
        """One of several that did not get done together."""
        self._alone.add(job.name)
        self._left.add(job.name)
        self._open(job.name)

    def held_up_by(self, name: str) -> set[str]:
        """All jobs to do that need one, nearer or further."""
        found: set[str] = set()
        open_ = [name]
        while open_:
            for other in self._held_up_by.get(open_.pop(), []):
                if other not in found:
                    found.add(other)
                    open_.append(other)
        return found

    def _open(self, name: str) -> None:
        order = ORDER["attribute" if name in self._first else self._graph.jobs[name].kind]
        heapq.heappush(self._heap, (order, self._place[name], name))
        self._alike[self._key(name)].append(name)

    def _key(self, name: str) -> tuple[str, ...]:
        inputs: Mapping[str, Inputs] = self._graph.inputs
        return ("alone", name) if name in self._alone else pack_key(self._graph.jobs[name], inputs[name])
