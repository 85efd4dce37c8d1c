"""Which pictures take the next step. Plain arithmetic over jobs; knows neither torch nor processes.

A job is a canvas and a number of steps left. Between any two steps jobs may join, leave or be cancelled; those of one
canvas advance together, whatever their steps, guidance, seeds and prompts.

Between keys the turn goes to the one that has had least of the device (start-time fair queueing); within a key to the
job with the least remaining cost, less a share of the time that it has waited. A picture that has had its last step is
still to be decoded: its key has that turn too, and pays for it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from heapq import nsmallest
from operator import attrgetter

AGEING = 0.5
"""Of the seconds a job has waited, the share taken off its remaining cost. A job of R seconds that has waited R /
AGEING yields to no job that comes later, so it waits at most that long and for what was there before."""

QUANTUM = 1.0
"""Seconds of the device between two changes of weights, as long as there is work for those that are in place: a change
writes every layer that an adapter touches."""

Canvas = tuple[int, int]


@dataclass(slots=True)
class Entry:
    """A job as the scheduler sees it.

    `family`: what else jobs must share to share a step, such as their precision. `weights`: what the model's weights
    have to be changed to for them. `rows` of a batch that it takes: two with real classifier-free guidance.
    `step_cost`: seconds for a step of it alone. `alone`: shares no batch, because one that it was in has failed.
    """

    id: str
    canvas: Canvas
    steps_left: int
    step_cost: float
    arrived: float
    owner: str = ""
    rows: int = 1
    alone: bool = False
    family: Hashable = None
    weights: Hashable = None
    kind: Hashable = field(init=False)
    """What jobs must have in common to share a step."""
    rank: float = field(init=False, default=0.0)
    """Less is sooner: remaining seconds, less what waiting has earned. Waiting earns alike for all, so that the time of
    arrival stands for it. Of equals the first come is first."""

    def __post_init__(self) -> None:
        self.kind = (self.canvas, self.family, self.id if self.alone else None)

    def update_rank(self) -> None:
        self.rank = self.steps_left * self.step_cost + AGEING * self.arrived


class Scheduler:
    """The jobs that are not done yet.

    Args:
        rows_limit: rows that a batch with a job may have; asked anew for each batch.
        sizes: numbers of rows that a batch may have, ascending from 1. Few, so that shapes are few.
    """

    def __init__(self, rows_limit: Callable[[Entry], int], sizes: tuple[int, ...] = (1, 2, 4, 8)) -> None:
        self.rows_limit = rows_limit
        self.sizes = sizes
        self.entries: dict[str, Entry] = {}
        self.through: dict[str, str] = {}
        """Of jobs that have had their last step and are not decoded yet, the owners."""
        self.served: dict[str, float] = {}
        self._weights: Hashable = None
        self._since_change = 0.0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> None:
        """A newcomer's key starts level with the one that has had least, so that absence earns no credit."""
        self.through.pop(entry.id, None)
        active = {e.owner for e in self.entries.values()}.union(self.through.values())
        if entry.owner not in active:
            level = min((self.served[owner] for owner in active), default=0.0)
            self.served[entry.owner] = max(level, self.served.get(entry.owner, 0.0) if active else 0.0)
        self.served = {o: s for o, s in self.served.items() if o in active or o == entry.owner}
        entry.update_rank()
        self.entries[entry.id] = entry

    def remove(self, id: str) -> bool:
        """True if the job was there."""
        return self.through.pop(id, None) is not None or self.entries.pop(id, None) is not None

    def finish(self, id: str) -> None:
        """The job takes no more steps; until it is removed it is still its owner's."""
        self.through[id] = self.entries.pop(id).owner

    def owner(self, id: str) -> str:
        """Of a job that is not removed."""
        return self.through[id] if id in self.through else self.entries[id].owner

    def had(self, id: str) -> float:
        """Seconds of the device that the job's key has had: those whose keys have had least come first."""
        return self.served[self.owner(id)]

    def charge(self, id: str, seconds: float) -> None:
        """Counts seconds of the device that the job took beside its steps."""
        self.served[self.owner(id)] += seconds

    def next_batch(self) -> list[str]:
        """The most urgent job and those that go with it; empty only if there is nothing to do."""
        if not self.entries:
            return []
        entries, served = self.entries.values(), self.served
        least = min(served[owner] for owner in {entry.owner for entry in entries})
        first = min((entry for entry in entries if served[entry.owner] == least), key=attrgetter("rank"))
        if first.weights != self._weights:
            staying = [entry for entry in entries if entry.weights == self._weights]
            if staying and self._since_change < QUANTUM:
                first = min(staying, key=lambda entry: (served[entry.owner], entry.rank))
            else:
                self._weights, self._since_change = first.weights, 0.0
        limit = self.rows_limit(first)
        if limit == 1:
            return [first.id]
        alike = [entry for entry in entries if entry.kind == first.kind]
        soonest = nsmallest(limit, alike, key=lambda entry: (served[entry.owner], entry.rank))
        return [entry.id for entry in self.fitting(soonest)]

    def fitting(self, alike: list[Entry]) -> list[Entry]:
        """As many of them, in order, as make up the largest number of rows allowed; the first in any case."""
        limit = self.rows_limit(alike[0])
        sums = [0]
        for entry in alike:
            sums.append(sums[-1] + entry.rows)
        best = max((n for n in range(1, len(sums)) if sums[n] in self.sizes and sums[n] <= limit), default=1)
        return alike[:best]

    def stepped(self, id: str, seconds: float = 0.0) -> int:
        """Counts a step that took its share of so many seconds of the device; returns the steps left."""
        entry = self.entries[id]
        entry.steps_left -= 1
        entry.update_rank()
        self.served[entry.owner] += seconds
        self._since_change += seconds
        return entry.steps_left
