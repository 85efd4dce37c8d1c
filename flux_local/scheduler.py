"""Which pictures take the next step. Plain arithmetic over jobs; knows neither torch nor processes.

A job is a canvas and a number of steps left. Between any two steps jobs may join, leave or be cancelled; those of
one canvas advance together, whatever their steps, guidance, seeds and prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

AGEING = 0.5
"""Of the seconds a job has waited, the share taken off its remaining cost, so that no job starves."""


@dataclass
class Entry:
    """A job as the scheduler sees it. `step_cost`: seconds for one step of it alone."""

    id: str
    width: int
    height: int
    steps_left: int
    step_cost: float
    arrived: float
    order: int = field(default=0)

    def priority(self, now: float) -> tuple[float, int]:
        """Less is sooner: remaining seconds, less what it has earned by waiting; then first come."""
        return (self.steps_left * self.step_cost - AGEING * (now - self.arrived), self.order)


class Scheduler:
    """The jobs that are not done yet."""

    def __init__(self, batch_limit: int) -> None:
        self.batch_limit = batch_limit
        self.entries: dict[str, Entry] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, entry: Entry) -> None:
        entry.order = self._order
        self._order += 1
        self.entries[entry.id] = entry

    def remove(self, id: str) -> bool:
        """True if the job was there."""
        return self.entries.pop(id, None) is not None

    def next_batch(self, now: float) -> list[str]:
        """The most urgent job, and the most urgent of those that fit with it; empty if there is nothing to do."""
        if not self.entries:
            return []
        urgent = sorted(self.entries.values(), key=lambda entry: entry.priority(now))
        first = urgent[0]
        alike = [e.id for e in urgent if (e.width, e.height) == (first.width, first.height)]
        return alike[: self.batch_limit]

    def stepped(self, id: str) -> int:
        """Counts a step; returns the steps left."""
        entry = self.entries[id]
        entry.steps_left -= 1
        return entry.steps_left
