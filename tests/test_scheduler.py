"""The scheduler's order, with integers for seconds."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flux_local.scheduler import AGEING, QUANTUM, Entry, Scheduler


def entry(
    id: str, steps: int, width: int = 128, cost: float = 1.0, arrived: float = 0.0, owner: str = "", **more: object
) -> Entry:
    return Entry(id, (width, 128), steps, cost, arrived, owner, **more)  # type: ignore[arg-type]


def filled(limit: int, *entries: Entry) -> Scheduler:
    scheduler = Scheduler(lambda entry: limit)
    for e in entries:
        scheduler.add(e)
    return scheduler


def test_nothing_to_do() -> None:
    assert filled(4).next_batch() == []


def test_shortest_remaining_cost_first() -> None:
    assert filled(1, entry("long", 50), entry("short", 4)).next_batch() == ["short"]
    assert filled(1, entry("large", 4, cost=9.0), entry("small", 8)).next_batch() == ["small"]


def test_equal_jobs_go_in_order_of_arrival() -> None:
    assert filled(1, entry("a", 4), entry("b", 4)).next_batch() == ["a"]


def test_waiting_earns_precedence() -> None:
    scheduler = filled(1, entry("old", 50, arrived=0), entry("new", 4, arrived=100))
    assert scheduler.next_batch() == ["old"]


def test_one_canvas_a_batch() -> None:
    scheduler = filled(4, entry("a", 4), entry("wide", 5, width=192), entry("b", 6), entry("c", 7), entry("d", 8))
    assert scheduler.next_batch() == ["a", "b", "c", "d"]


def test_the_limit_holds_and_sizes_are_few() -> None:
    jobs = [entry(str(i), 4) for i in range(9)]
    assert [len(filled(limit, *jobs).next_batch()) for limit in (1, 2, 3, 4, 7, 8)] == [1, 2, 2, 4, 4, 8]
    assert [len(filled(8, *jobs[:n]).next_batch()) for n in (1, 2, 3, 5)] == [1, 2, 2, 4]


def test_a_guided_job_is_two_rows() -> None:
    assert filled(4, entry("g", 4, rows=2), entry("a", 5), entry("b", 6)).next_batch() == ["g", "a", "b"]
    assert filled(2, entry("g", 4, rows=2), entry("a", 5)).next_batch() == ["g"]
    assert filled(1, entry("g", 4, rows=2), entry("a", 5)).next_batch() == ["g"]


def test_one_that_has_to_be_alone_is() -> None:
    scheduler = filled(4, entry("a", 4, alone=True), entry("b", 5), entry("c", 6, alone=True))
    assert scheduler.next_batch() == ["a"]
    scheduler.remove("a")
    assert scheduler.next_batch() == ["b"]


def test_keys_take_turns_by_what_they_have_had() -> None:
    scheduler = filled(1, *(entry(f"many{i}", 10, owner="x") for i in range(9)), entry("one", 10, owner="y"))
    turns = []
    for _ in range(20):
        (id,) = scheduler.next_batch()
        turns.append(scheduler.entries[id].owner)
        if scheduler.stepped(id, 1.0) == 0:
            scheduler.remove(id)
    assert turns.count("y") == 10


def test_a_key_pays_for_what_is_decoded_and_is_not_away_while_it_waits_for_that() -> None:
    scheduler = filled(1, entry("a", 1, owner="x"), entry("b", 9, owner="y"))
    for id in ("a", "b"):
        scheduler.stepped(id, 1.0)
    scheduler.finish("a")
    assert scheduler.next_batch() == ["b"]
    scheduler.charge("a", 5.0)
    assert scheduler.had("a") == 6.0
    scheduler.add(entry("c", 9, owner="x"))
    assert scheduler.had("c") == 6.0, "its key was here all the time"
    assert scheduler.had("b") == 1.0
    assert scheduler.remove("a")
    assert not scheduler.remove("a")


def test_absence_earns_no_credit() -> None:
    scheduler = filled(1, entry("a", 100, owner="x"))
    for _ in range(50):
        scheduler.stepped(scheduler.next_batch()[0], 1.0)
    scheduler.add(entry("b", 100, owner="y"))
    turns = []
    for _ in range(20):
        (id,) = scheduler.next_batch()
        scheduler.stepped(id, 1.0)
        turns.append(id)
    assert turns.count("a") == 10


def test_weights_stay_for_a_while() -> None:
    """Two keys, each with adapters of its own: fair, but not by a change of weights at every step."""
    scheduler = filled(1, entry("a", 100, owner="x", weights="A"), entry("b", 100, owner="y", weights="B"))
    turns = []
    for _ in range(100):
        (id,) = scheduler.next_batch()
        scheduler.stepped(id, QUANTUM / 10)
        turns.append(id)
    changes = sum(now != before for before, now in pairwise(turns))
    assert 8 <= changes <= 12
    assert 40 <= turns.count("a") <= 60


@given(
    st.lists(st.tuples(st.integers(1, 50), st.sampled_from([128, 160, 192]), st.integers(0, 200)), min_size=1),
    st.integers(1, 4),
)
def test_no_job_waits_beyond_the_bound(jobs: list[tuple[int, int, int]], limit: int) -> None:
    """One second a step: a job of R seconds is done R / AGEING after it came, plus all work that was there by then."""
    waiting = sorted((arrived, str(i), steps, width) for i, (steps, width, arrived) in enumerate(jobs))
    came = {id: (float(arrived), steps) for arrived, id, steps, _ in waiting}
    scheduler, now, finished = filled(limit), 0.0, dict[str, float]()
    while waiting or len(scheduler):
        while waiting and waiting[0][0] <= now:
            arrived, id, steps, width = waiting.pop(0)
            scheduler.add(entry(id, steps, width=width, arrived=arrived))
        for id in scheduler.next_batch():
            if scheduler.stepped(id, 1.0) == 0:
                finished[id] = now + 1
                scheduler.remove(id)
        now += 1
    assert set(finished) == set(came)
    for id, end in finished.items():
        arrived, steps = came[id]
        turn = arrived + steps / AGEING
        before = sum(s for a, s in came.values() if a <= turn)
        assert end <= turn + before + 1


class Machine(RuleBasedStateMachine):
    """Submit, cancel, step, expire, crash in any order: every job ends exactly once, and only alike share a step."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = 4
        self.scheduler = Scheduler(lambda entry: self.limit)
        self.steps: dict[str, int] = {}
        self.ended: list[str] = []
        self.now = 0.0
        self.count = 0

    def end(self, id: str) -> None:
        assert self.scheduler.remove(id)
        del self.steps[id]
        self.ended.append(id)

    @rule(steps=st.integers(1, 6), width=st.sampled_from([128, 192]), owner=st.sampled_from("xyz"),
          rows=st.integers(1, 2), alone=st.booleans())  # fmt: skip
    def submit(self, steps: int, width: int, owner: str, rows: int, alone: bool) -> None:
        id = str(self.count)
        self.count += 1
        self.scheduler.add(Entry(id, (width, 128), steps, 1.0, self.now, owner, rows, alone))
        self.steps[id] = steps

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def cancel_or_expire(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(sorted(self.steps))))

    @precondition(lambda self: self.steps)
    @rule()
    def step(self) -> None:
        batch = self.scheduler.next_batch()
        self.now += 1.0
        assert batch, "work is never left lying"
        assert len(set(batch)) == len(batch)
        entries = [self.scheduler.entries[id] for id in batch]
        assert len({e.canvas for e in entries}) == 1
        assert len(batch) == 1 or not any(e.alone for e in entries)
        assert len(batch) == 1 or sum(e.rows for e in entries) in (2, 4)
        assert sum(e.rows for e in entries) <= max(self.limit, entries[0].rows)
        for id in batch:
            self.steps[id] -= 1
            assert self.scheduler.stepped(id, 1.0 / len(batch)) == self.steps[id]
            if self.steps[id] == 0:
                self.end(id)

    @precondition(lambda self: self.steps)
    @rule()
    def crash(self) -> None:
        """Another engine begins with what is left, from the start."""
        left = list(self.scheduler.entries.values())
        self.scheduler = Scheduler(lambda entry: self.limit)
        for e in left:
            self.scheduler.add(Entry(e.id, e.canvas, self.steps[e.id], 1.0, e.arrived, e.owner, e.rows, True))

    @rule(limit=st.integers(1, 4))
    def memory_changes(self, limit: int) -> None:
        self.limit = limit

    @invariant()
    def nothing_is_lost_or_done_twice(self) -> None:
        assert set(self.scheduler.entries) == set(self.steps)
        assert len(self.ended) == len(set(self.ended))
        assert len(self.ended) + len(self.steps) == self.count


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase
