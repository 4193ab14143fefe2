"""Which jobs may start, by hand on a small graph."""

from hpcguard.sweeps.jobs import Graph, Inputs, Job
from hpcguard.sweeps.ready import Ready


def graph() -> Graph:
    """base -> store -> a, b (guided) and p (not guided), each with its evaluation."""
    jobs = [
        Job("refine-base", "refine", "models/m", "base", ()),
        Job("attribute-s", "attribute", "stores/s", "", ("refine-base",)),
        *(Job(f"refine-{arm}", "refine", "stores/s", arm, ("attribute-s",)) for arm in "ab"),
        Job("refine-p", "refine", "models/m", "p", ()),
        *(Job(f"evaluate-{arm}", "evaluate", "stores/s", arm, (f"refine-{arm}",)) for arm in "ab"),
        Job("evaluate-p", "evaluate", "models/m", "p", ("refine-p",)),
    ]
    inputs = {job.name: Inputs(None, None, None) for job in jobs}  # type: ignore[arg-type]
    return Graph([], {job.name: job for job in jobs}, inputs)


def names(batch: list[Job]) -> list[str]:
    return [job.name for job in batch]


def test_a_job_starts_when_all_is_done_that_it_needs() -> None:
    plan = graph()
    ready = Ready(plan, list(plan.jobs), pack=1)
    assert [names(ready.take()), names(ready.take()), ready.take()] == [["refine-base"], ["refine-p"], []]
    ready.done("refine-p")
    assert names(ready.take()) == ["evaluate-p"]  # before anything else: its cell ends
    ready.done("refine-base")
    assert names(ready.take()) == ["attribute-s"]
    assert ready.take() == []
    ready.done("attribute-s")
    assert [names(ready.take()), names(ready.take()), ready.take()] == [["refine-a"], ["refine-b"], []]


def test_jobs_of_one_folder_go_together_up_to_pack() -> None:
    plan = graph()
    ready = Ready(plan, list(plan.jobs), pack=2)
    assert names(ready.take()) == ["refine-base"]  # alone, for a store waits for it
    ready.done("refine-base")
    assert names(ready.take()) == ["attribute-s"]
    ready.done("attribute-s")
    assert names(ready.take()) == ["refine-a", "refine-b"]
    ready.again_alone(plan.jobs["refine-a"])
    ready.again_alone(plan.jobs["refine-b"])
    assert [names(ready.take()) for _ in range(4)] == [["refine-a"], ["refine-b"], ["refine-p"], []]


def test_the_last_few_are_shared_out_over_the_slots() -> None:
    jobs = [Job(f"refine-{number}", "refine", "models/m", str(number), ()) for number in range(7)]
    plan = Graph([], {job.name: job for job in jobs}, {job.name: Inputs(None, None, None) for job in jobs})  # type: ignore[arg-type]
    ready = Ready(plan, list(plan.jobs), pack=3, slots=2)
    assert [len(ready.take()) for _ in range(5)] == [3, 2, 1, 1, 0]


def test_a_failure_holds_up_what_needs_it_and_nothing_else() -> None:
    plan = graph()
    ready = Ready(plan, list(plan.jobs), pack=1)
    assert ready.held_up_by("refine-base") == {"attribute-s", "refine-a", "refine-b", "evaluate-a", "evaluate-b"}
    assert ready.held_up_by("refine-a") == {"evaluate-a"}
    assert ready.held_up_by("evaluate-p") == set()


def test_what_is_done_already_is_not_waited_for() -> None:
    plan = graph()
    ready = Ready(plan, ["refine-b", "evaluate-b"], pack=4)
    assert names(ready.take()) == ["refine-b"]
    ready.done("refine-b")
    assert names(ready.take()) == ["evaluate-b"]
