"""How far the host runs ahead of a GPU, and how long the GPU's steps take by its own clock.

A step's call returns as soon as the step is launched. A GPU may be one step behind and no more: it is busy all the
time, and yet a cancelled picture costs one step. On a CPU nothing runs behind and the caller's clock tells the truth,
so that there is nothing to do here. Knows nothing of what a step is.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Mark = float | torch.cuda.Event
"""A moment: of the monotonic clock, or of a GPU's own queue."""


@dataclass(frozen=True)
class Launched:
    """A step that was given to a GPU, with the events at its ends."""

    begin: torch.cuda.Event
    end: torch.cuda.Event
    tokens: int
    usual: bool


@dataclass
class Launching:
    """A step that is being given to a GPU. `usual`: whether its time says something about the next."""

    usual: bool = True


class Pace:
    """Of all the steps on a device, whosever they are."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.runs_behind = device.type == "cuda"
        self.token_seconds: float | None = None
        """Of a GPU's last usual step that is known to have ended, a token's share. None until there is one, and on a
        CPU."""
        self._launched: deque[Launched] = deque()

    @contextlib.contextmanager
    def step(self, tokens: int) -> Iterator[Launching]:
        """Around the launch of a step of so many image tokens: waits until the one before it has begun."""
        launching = Launching()
        if not self.runs_behind:
            yield launching
            return
        if self._launched:
            self._launched[-1].begin.synchronize()
        self._take_times()
        begin = self._event()
        yield launching
        self._launched.append(Launched(begin, self._event(), tokens, launching.usual))

    def finish(self) -> None:
        """Waits for all that was launched."""
        if self.runs_behind:
            torch.cuda.synchronize(self.device)
            self._take_times()

    def mark(self) -> Mark:
        """The moment at which all that was launched until now will have ended."""
        return self._event() if self.runs_behind else time.monotonic()

    def since(self, mark: Mark) -> float:
        """Seconds from a mark until all that was launched until now has ended; waits for that."""
        if isinstance(mark, float):
            return time.monotonic() - mark
        return self.between(mark, self._event())

    def between(self, mark: Mark, later: Mark) -> float:
        """Seconds from one mark to a later one; waits for that."""
        if isinstance(mark, float) or isinstance(later, float):
            assert isinstance(mark, float) and isinstance(later, float), "marks of one device"  # noqa: PT018
            return later - mark
        later.synchronize()
        seconds: float = mark.elapsed_time(later) / 1000
        return seconds

    def _take_times(self) -> None:
        while self._launched and self._launched[0].end.query():
            step = self._launched.popleft()
            if step.usual:
                self.token_seconds = step.begin.elapsed_time(step.end) / 1000 / step.tokens

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
