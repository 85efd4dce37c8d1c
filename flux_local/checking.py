"""Decoded pictures that wait for the safety checker's verdict, while the steps of others go on.

Knows neither how they came about nor what becomes of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from flux_local.model.safety import SafetyChecker

Decoding = tuple[str, int | None]
"""A job, and which of its partial pictures; None for the finished one."""

OVERDUE = 10.0
"""Seconds after which a picture without a verdict is to hold up all others, so that a checker that hangs is seen to."""


class Unchecked(NamedTuple):
    pixels: bytes
    since: float


class Checks:
    """The pictures that one checker has been given, the oldest first. Without any it is false."""

    def __init__(self, checker: SafetyChecker | None) -> None:
        self.checker = checker
        self.unchecked: dict[Decoding, Unchecked] = {}

    def __bool__(self) -> bool:
        return bool(self.unchecked)

    def submit(self, decoded: Decoding, pixels: bytes, width: int, height: int) -> None:
        """Has RGB rows looked at, `width` · `height` of them."""
        assert self.checker is not None
        self.unchecked[decoded] = Unchecked(pixels, time.monotonic())
        self.checker.submit(decoded, pixels, width, height)

    def drop(self, id: str) -> None:
        """The job has gone: its pictures' verdicts are nobody's any more."""
        self.unchecked = {decoded: found for decoded, found in self.unchecked.items() if decoded[0] != id}

    def ids(self) -> list[str]:
        """Of the jobs whose pictures wait."""
        return list(dict.fromkeys(id for id, _ in self.unchecked))

    def overdue(self) -> bool:
        return any(time.monotonic() - found.since > OVERDUE for found in self.unchecked.values())

    def verdicts(self, patience: float) -> Iterator[tuple[Decoding, bytes, bool | None]]:
        """Pictures, their pixels, and whether they are flagged, or None where the checker failed; waits at most
        `patience` seconds for the first."""
        assert self.checker is not None
        for decoded, flagged in self.checker.verdicts(patience):
            if (found := self.unchecked.pop(decoded, None)) is not None:
                yield decoded, found.pixels, flagged
