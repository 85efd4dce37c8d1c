"""One engine process and its guardian: starts it, watches it, brings it back, and says what it was doing when it fell.

Knows nothing of what the messages mean, and nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flux_local.errors import EngineDead, StartError
from flux_local.messages import HEADER, Done, FromEngine, Ready, StartFailed, ToEngine, decode_from_engine, frame
from flux_local.pulse import Phase, Pulse

LOOK_EVERY = 0.2
"""Seconds between two looks at an engine that has work."""
ASLEEP = 1.0
"""Seconds by which a look may be late. If it is later, the whole machine or container stood still, and the engine with
it."""
LOAD_LIMIT = 1800.0
"""Seconds that loading and warming up may take the first time."""
RELOAD_LIMIT, RELOAD_FACTOR = 30.0, 5.0
"""Seconds that loading again may take, or so many times as long as the first time, if that is more: the files are in
memory now, or a driver hangs."""
REAP_SECONDS = 10.0
HARD_WORK = 20
"""No phase takes longer than so many steps of the warm-up picture: no step on a canvas four times as large, whose
attention takes sixteen times as long, and no proof of a batch. What takes a minute a step, as FLUX.1 on a CPU, is not
hung."""
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
"""Signals that somebody else sends: no request is to blame for them."""

log = logging.getLogger("flux_local.supervisor")


@dataclass(frozen=True)
class Fall:
    """An engine that is no more. `serials`: of the jobs it had in hand, or None where only the steps that it told of
    can say. `inside`: whether they may be the cause."""

    serials: tuple[int, ...] | None
    inside: bool


class Engine(Protocol):
    """An engine as a dispatcher sees it, wherever it runs.

    `ready`: what it said when it was, or None while it is not. `falls`: since the server's start, by cause: `inside` or
    `outside`.
    """

    device: str
    ready: Ready | None
    falls: Counter[str]

    async def run(self, started: asyncio.Future[Ready]) -> None:
        """Until cancelled, or until the engine is given up.

        Args:
            started: gets the first start's outcome; a first start that fails is not tried again.

        Raises:
            EngineDead: too many falls.
        """

    def send(self, message: ToEngine) -> None:
        """Nothing happens if the engine is down."""

    def in_hand(self) -> tuple[int, ...]:
        """Serials of the jobs that the engine is known to be working on at this moment."""


@dataclass(frozen=True)
class Hooks:
    """Whom an engine's life concerns. `busy`: whether it owes anything; an idle engine's silence is no hang."""

    busy: Callable[[Engine], bool]
    on_message: Callable[[Engine, FromEngine], None]
    on_ready: Callable[[Engine], None]
    on_fall: Callable[[Engine, Fall], None]


@dataclass(frozen=True)
class Guard:
    """When an engine is given up.

    `patience`: seconds that a phase of work may take before it counts as hung; more, where steps are long. `max_falls`
    in `window` seconds without a finished picture, and it is not started again.
    """

    patience: float
    max_falls: int
    window: float


class Supervisor:
    """Keeps one engine process running on one device of this machine.

    Args:
        options: more of the engine program's own.
    """

    def __init__(self, folder: Path, device: str, guard: Guard, hooks: Hooks, options: Sequence[str] = ()) -> None:
        self.folder = folder
        self.device = device
        self.guard = guard
        self.patience = guard.patience
        self.options = list(options)
        self.hooks = hooks
        self.ready: Ready | None = None
        self.was_ready = False
        self.process: subprocess.Popen[bytes] | None = None
        self.sent = 0.0
        self.falls: Counter[str] = Counter()
        self._falls: deque[float] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._pulse: Pulse | None = None
        self._hung = False
        self._load_seconds = 0.0
        self._load_limit = LOAD_LIMIT

    async def run(self, started: asyncio.Future[Ready]) -> None:
        """As `Engine.run`."""
        try:
            while True:
                try:
                    reader = await self._start()
                except StartError as error:
                    if not started.done():
                        started.set_exception(error)
                        return
                    await self._kill()
                    log.error("the engine on %s did not start: %s", self.device, error.message)
                else:
                    if not started.done():
                        assert self.ready is not None
                        started.set_result(self.ready)
                    await self._serve(reader)
                await self._pause()
        finally:
            await self._kill()

    def send(self, message: ToEngine) -> None:
        """As `Engine.send`."""
        if self._writer is not None:
            self.sent = time.monotonic()
            self._writer.write(frame(message))

    def in_hand(self) -> tuple[int, ...]:
        """As `Engine.in_hand`."""
        return () if self._pulse is None else self._pulse.read().serials

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        """Hands messages on until the engine falls, and says how it fell."""
        watch = asyncio.create_task(self._watch())
        try:
            with contextlib.suppress(EOFError):
                while True:
                    message = await self._receive(reader)
                    if isinstance(message, Done):
                        self._falls.clear()  # it falls now and then, but in between it works
                    self.hooks.on_message(self, message)
        finally:
            watch.cancel()
        self.ready = None
        assert self.process is not None and self._pulse is not None  # noqa: PT018
        state = self._pulse.read()
        code = await ended(self.process, 0.5)
        inside = self._hung or code is None or code >= 0 or -code not in FROM_OUTSIDE
        why = "hung" if self._hung else f"ended ({signal.Signals(-code).name if code and code < 0 else code})"
        log.error("the engine on %s %s while in phase %s; starting another", self.device, why, state.phase.name)
        self._hang_up()
        self.falls["inside" if inside else "outside"] += 1
        self.hooks.on_fall(self, Fall(state.serials, inside))
        await self._kill()

    async def _watch(self) -> None:
        """Ends an engine that has been in one phase of work for too long."""
        assert self._pulse is not None and self.process is not None  # noqa: PT018
        awake = 0.0
        while True:
            pause, looked = min(LOOK_EVERY, self.patience / 4), time.monotonic()
            await asyncio.sleep(pause)
            if time.monotonic() - looked > pause + ASLEEP:
                awake = time.monotonic()
            phase, since, _ = self._pulse.read()
            since = max(since, awake)
            if phase == Phase.IDLE:
                # With work before it, idleness is a hang too; it begins with the latest message.
                since = max(since, self.sent)
            if self.hooks.busy(self) and time.monotonic() - since > self.patience:
                self._hung = True
                self.ready = None
                self.process.kill()
                if self._writer is not None:
                    self._writer.transport.abort()  # a process that a driver holds on to may outlive its own end
                return

    async def _pause(self) -> None:
        """Before another start: none after the first fall, longer and longer after more.

        Raises:
            EngineDead: there have been too many.
        """
        now = time.monotonic()
        self._falls.append(now)
        window = max(self.guard.window, 2 * self.guard.max_falls * self._load_seconds)
        while now - self._falls[0] > window:
            self._falls.popleft()
        if len(self._falls) >= self.guard.max_falls:
            raise EngineDead(
                f"The engine on {self.device} fell {len(self._falls)} times in {window:.0f} s and is given up. "
                "The log above says how; start the server again once that is mended."
            )
        if len(self._falls) > 1:
            await asyncio.sleep(min(30.0, 2.0 ** (len(self._falls) - 2)) * (0.5 + secrets.randbelow(1000) / 1000))

    async def _start(self) -> asyncio.StreamReader:
        """Starts the process and waits for its warm-up picture.

        Raises:
            StartError: with the exit code that fits.
        """
        try:
            reader = await self._spawn()
        except OSError as error:
            raise StartError(f"The engine process cannot be started: {error.strerror or error}.") from error
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._load_limit):
                message = await self._receive(reader)
        except EOFError:
            raise StartError("The engine process ended while loading. Its last words are above.") from None
        except TimeoutError:
            limit, self._load_limit = self._load_limit, min(LOAD_LIMIT, 2 * self._load_limit)  # from a disk, perhaps
            raise StartError(f"The engine process did not load within {limit:.0f} s.") from None
        finally:
            self._load_seconds = time.monotonic() - began
        if isinstance(message, StartFailed):
            raise message.error()
        assert isinstance(message, Ready)
        if not self.was_ready:
            # What comes after a crash is laid out as the first was, though the memory that is free may tempt otherwise.
            self.device = message.device
            self.options += ["--memory", message.tier]
            self._load_limit = min(LOAD_LIMIT, max(RELOAD_LIMIT, RELOAD_FACTOR * self._load_seconds))
        self.ready, self.was_ready = message, True
        self.patience = max(self.guard.patience, HARD_WORK * message.step_seconds)
        self.hooks.on_ready(self)
        return reader

    async def _spawn(self) -> asyncio.StreamReader:
        """The process, and our end of the socket to it."""
        ours, theirs = socket.socketpair()
        self._hung = False
        self._pulse = Pulse()
        command = [sys.executable, "-m", "flux_local.engine_process", "--fd", str(theirs.fileno()),
                   "--pulse", str(self._pulse.descriptor), "--model", str(self.folder),
                   "--device", self.device, *self.options]  # fmt: skip
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno(), self._pulse.descriptor], stdin=subprocess.DEVNULL
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _receive(self, reader: asyncio.StreamReader) -> FromEngine:
        """Raises EOFError when the engine has gone."""
        try:
            (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            return decode_from_engine(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise EOFError from error

    def _hang_up(self) -> None:
        self.ready = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    async def _kill(self) -> None:
        self._hang_up()
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            if await ended(process, REAP_SECONDS) is None:
                log.error("the engine process %d on %s cannot be ended; see to its device", process.pid, self.device)
        if self._pulse is not None:
            self._pulse.close()
            self._pulse = None


async def ended(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code of a process that ends within so many seconds. Waits for it without holding anybody up."""
    until = time.monotonic() + seconds
    while (code := process.poll()) is None and time.monotonic() < until:
        await asyncio.sleep(0.01)
    return code
