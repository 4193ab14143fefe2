"""What becomes of missing shards, class by class."""

import pytest

from hpcguard.cluster.failures import Failure
from hpcguard.cluster.settle import decide
from hpcguard.config import ClusterConfig


def failure(kind: str, final: bool, memory: float | None = None, shard: int = 0) -> Failure:
    return Failure(shard, "1_0.r0.n0", kind, final, f"it was {kind}", memory_gb=memory)  # type: ignore[arg-type]


def settings(**changes: object) -> ClusterConfig:
    return ClusterConfig(slurm={"attribute": {"memory_gb": 2.0}, "rounds": 3, **changes})


AGAIN = [
    ("nothing is known", [], "", 1, 2.0),
    ("killed", [failure("killed", False)], "FAILED", 1, 2.0),
    ("killed for good in the pool", [failure("killed", True)], "FAILED", 1, 2.0),
    ("pre-empted", [failure("pre-empted", False)], "", 3, 2.0),
    ("time-out with progress", [failure("time-out", False)], "TIMEOUT", 1, 2.0),
    ("node failure", [failure("node-failure", False)], "NODE_FAIL", 2, 2.0),
    ("out of memory, smaller batches first", [failure("out-of-memory", False, 2.0)], "OUT_OF_MEMORY", 1, 2.0),
    ("then more memory", [failure("out-of-memory", False, 2.0), failure("out-of-memory", True, 2.0)], "", 2, 4.0),
    ("and more", [failure("out-of-memory", True, 2.0), failure("out-of-memory", True, 4.0)], "", 3, 8.0),
]


@pytest.mark.parametrize(("name", "own", "state", "rounds", "memory"), AGAIN, ids=[name for name, *_ in AGAIN])
def test_submitted_again(name: str, own: list[Failure], state: str, rounds: int, memory: float) -> None:
    decision = decide([0], own, {0: state} if state else {}, {0: rounds}, settings())
    assert (decision.again, decision.given_up) == ({0: memory}, {})


GIVEN_UP = [
    ("a code error", [failure("error", True)], "FAILED", 1, "it was error"),
    ("a time limit without a unit", [failure("time-out", True)], "FAILED", 1, "it was time-out"),
    ("a damaged record", [failure("unknown", True)], "", 1, "it was unknown"),
    ("cancelled by a person", [], "CANCELLED", 1, "its job was cancelled"),
    ("too often", [failure("killed", False)], "FAILED", 4, "4 submissions without progress; the last: it was killed"),
    ("too often, for no known reason", [], "", 4, "missing after 4 submissions"),
    ("a GPU too small", [failure("gpu-out-of-memory", True, 2.0)], "", 1, "cluster.slurm.constraint"),
    ("given up before", [failure("cancelled", True)], "", 1, "it was cancelled"),
    ("no memory left to give", [failure("out-of-memory", True, 8.0)], "", 2, "raise cluster.slurm.max_memory_gb"),
]


@pytest.mark.parametrize(("name", "own", "state", "rounds", "why"), GIVEN_UP, ids=[name for name, *_ in GIVEN_UP])
def test_given_up(name: str, own: list[Failure], state: str, rounds: int, why: str) -> None:
    decision = decide([0], own, {0: state} if state else {}, {0: rounds}, settings())
    assert decision.again == {}
    assert why in decision.given_up[0]


def test_shards_are_decided_one_by_one() -> None:
    own = [failure("error", True, shard=1), failure("out-of-memory", True, 2.0, shard=2)]
    decision = decide([0, 1, 2], own, {}, dict.fromkeys(range(3), 1), settings(max_memory_gb=3.0))
    assert decision.again == {0: 2.0, 2: 3.0}
    assert list(decision.given_up) == [1]


def test_memory_is_that_of_the_job_where_none_was_asked_for() -> None:
    own = [failure("out-of-memory", True, 1.5)]
    assert decide([0], own, {}, {0: 1}, ClusterConfig()).again == {0: 3.0}
    own += [failure("out-of-memory", True, memory) for memory in (3.0, 6.0)]
    assert "with 6 GiB; raise" in decide([0], own, {}, {0: 1}, ClusterConfig()).given_up[0]  # four times the first
    unknown = decide([0], [failure("out-of-memory", True)], {}, {0: 1}, ClusterConfig())
    assert "set cluster.slurm.attribute.memory_gb" in unknown.given_up[0]
