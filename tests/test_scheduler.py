"""The scheduler's order, with integers for seconds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flux_local.scheduler import AGEING, Entry, Scheduler


def entry(id: str, steps: int, width: int = 128, height: int = 128, cost: float = 1.0, arrived: float = 0.0) -> Entry:
    return Entry(id, width, height, steps, cost, arrived)


def filled(limit: int, *entries: Entry) -> Scheduler:
    scheduler = Scheduler(limit)
    for e in entries:
        scheduler.add(e)
    return scheduler


def test_nothing_to_do() -> None:
    assert Scheduler(4).next_batch(0) == []


def test_shortest_remaining_cost_first() -> None:
    assert filled(1, entry("long", 50), entry("short", 4)).next_batch(0) == ["short"]
    assert filled(1, entry("large", 4, cost=9.0), entry("small", 8)).next_batch(0) == ["small"]


def test_equal_jobs_go_in_order_of_arrival() -> None:
    assert filled(1, entry("a", 4), entry("b", 4)).next_batch(0) == ["a"]


def test_waiting_earns_precedence() -> None:
    scheduler = filled(1, entry("old", 50, arrived=0), entry("new", 4, arrived=100))
    assert scheduler.next_batch(100) == ["old"]


def test_one_canvas_a_batch() -> None:
    scheduler = filled(4, entry("a", 4), entry("wide", 5, width=192), entry("b", 6), entry("c", 7))
    assert scheduler.next_batch(0) == ["a", "b", "c"]


def test_the_limit_holds() -> None:
    assert len(filled(2, *(entry(str(i), 4) for i in range(5))).next_batch(0)) == 2


def test_jobs_leave_between_steps() -> None:
    scheduler = filled(2, entry("a", 2), entry("b", 3))
    assert scheduler.next_batch(0) == ["a", "b"]
    assert scheduler.remove("a")
    assert not scheduler.remove("a")
    assert scheduler.next_batch(0) == ["b"]
    assert scheduler.stepped("b") == 2


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([128, 160, 192]), st.integers(0, 200)), min_size=1),
    st.integers(1, 4),
)
def test_every_job_ends_and_none_waits_beyond_the_bound(jobs: list[tuple[int, int, int]], limit: int) -> None:
    """With one second a step, a job of k steps starts before the cost of all jobs, plus what ageing makes good."""
    arrivals = sorted((arrived, str(i), steps, width) for i, (steps, width, arrived) in enumerate(jobs))
    scheduler, now, finished = Scheduler(limit), 0.0, {}
    total = sum(steps for steps, _, _ in jobs)
    while arrivals or len(scheduler):
        while arrivals and arrivals[0][0] <= now:
            arrived, id, steps, width = arrivals.pop(0)
            scheduler.add(entry(id, steps, width=width, arrived=arrived))
        for id in scheduler.next_batch(now):
            if scheduler.stepped(id) == 0:
                finished[id] = now - scheduler.entries[id].arrived
                scheduler.remove(id)
        now += 1
    assert len(finished) == len(jobs)
    assert max(finished.values()) <= total / AGEING + total
