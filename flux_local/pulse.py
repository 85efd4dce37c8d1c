"""What an engine is doing right now, in a page of memory that it shares with its supervisor.

The engine writes it before each phase, which costs it nothing and wakes nobody; the supervisor looks when it wonders.
So a hang is told from hard work, and after a crash it is known whose pictures were in hand. Knows nothing of either.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import zlib
from enum import IntEnum
from typing import NamedTuple

MOST = 16
"""Jobs of a batch that the page has room for."""
RECORD = struct.Struct(f"<dBB6x{MOST}Q")
SUM = struct.Struct("<I")
SLOT = RECORD.size + SUM.size
"""The page's first byte says which of two slots behind it has the latest state; the other may be half written."""
LOOKS = 100
"""At a state that does not agree with its checksum, before it is taken as it is."""


class Phase(IntEnum):
    LOAD = 0
    IDLE = 1
    """Waiting for messages, or about to look for them."""
    BEGIN = 2
    """Encoding a prompt or an image."""
    STEP = 3
    DECODE = 4
    PROVE = 5
    """Showing that a batch shape keeps bits, at its first use."""
    CHECK = 6
    """Waiting for the safety checker alone."""


class State(NamedTuple):
    """`since`: seconds of the machine's monotonic clock. `serials`: of the jobs in hand."""

    phase: Phase
    since: float
    serials: tuple[int, ...]


class Pulse:
    """The page. Made by the supervisor, handed to the engine as a file descriptor."""

    def __init__(self, descriptor: int | None = None) -> None:
        self.descriptor = os.memfd_create("flux-local-pulse") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, mmap.PAGESIZE)
        self._page = mmap.mmap(self.descriptor, mmap.PAGESIZE)
        if descriptor is None:
            self.enter(Phase.LOAD)

    def enter(self, phase: Phase, serials: tuple[int, ...] = ()) -> None:
        serials = serials[:MOST]
        padded = serials + (0,) * (MOST - len(serials))
        record = RECORD.pack(time.monotonic(), phase, len(serials), *padded)
        other = 1 - self._page[0]
        self._page[1 + other * SLOT : 1 + (other + 1) * SLOT] = record + SUM.pack(zlib.crc32(record))
        self._page[0] = other

    def renew(self) -> None:
        """The phase goes on, and lives: its time begins anew."""
        state = self.read()
        self.enter(state.phase, state.serials)

    def read(self) -> State:
        for _ in range(LOOKS):  # a writer may come round to the slot while it is being read
            latest = self._page[0]
            found = self._page[1 + latest * SLOT : 1 + (latest + 1) * SLOT]
            record = found[: RECORD.size]
            if SUM.pack(zlib.crc32(record)) == found[RECORD.size :]:
                break
        since, phase, count, *serials = RECORD.unpack(record)
        return State(Phase(phase), since, tuple(serials[:count]))

    def close(self) -> None:
        self._page.close()
        os.close(self.descriptor)
