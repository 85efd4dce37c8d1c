"""The API process's side of the engine: starts it, feeds it, brings it back, and keeps every promise about a job.

A submitted job ends exactly once: with its picture, with an error, or cancelled. Knows neither HTTP nor torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flux_local.errors import BY_CODE, EngineDead, EngineRestarting, InternalError, NotReady, RateLimited, StartError
from flux_local.messages import (
    HEADER,
    Cancel,
    Done,
    Failed,
    FromEngine,
    Job,
    Partial,
    Ready,
    StartFailed,
    Step,
    decode_from_engine,
    frame,
)

START_TRIES = 5
"""Engine starts in a row that may fail before the server gives up."""

ATTEMPTS = 2
"""Times a job may be given to an engine."""

log = logging.getLogger("flux_local.dispatch")


@dataclass
class Pending:
    """A job that has been promised an end."""

    job: Job
    future: asyncio.Future[Done]
    steps_left: int
    attempts: int = 0
    on_event: Callable[[Step | Partial], None] | None = field(default=None)


class Dispatcher:
    """One engine process and the jobs it owes."""

    def __init__(self, folder: Path, device: str, max_waiting: int) -> None:
        self.folder = folder
        self.device = device
        self.max_waiting = max_waiting
        self.ready: Ready | None = None
        self.draining = False
        self.pending: dict[str, Pending] = {}
        self.picture_seconds = 1.0
        self.step_seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self.dead: asyncio.Future[EngineDead] = asyncio.get_running_loop().create_future()
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None

    async def start(self) -> Ready:
        """Starts the engine and waits until it has drawn its warm-up picture.

        Raises:
            StartError: the engine could not start, with the exit code that fits.
        """
        reader = await self._spawn()
        ready = await self._first_message(reader)
        self._supervisor = asyncio.create_task(self._supervise(reader))
        return ready

    async def stop(self) -> None:
        """Ends the engine; what is still pending ends with `EngineRestarting`."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._kill()
        for pending in list(self.pending.values()):
            self._settle(pending, EngineRestarting("The server is stopping. Send the request again.", retry_after=5))

    async def draw(self, job: Job, on_event: Callable[[Step | Partial], None] | None = None) -> Done:
        """Draws one picture; cancelling the caller cancels the job.

        Args:
            on_event: called with each step and each partial picture. Starts over if the engine had to be replaced.

        Raises:
            RateLimited: too many pictures wait. NotReady: the engine is still starting.
            GenerationInvalid, InternalError: the model or the engine failed.
        """
        self.admit(1)
        pending = Pending(job, asyncio.get_running_loop().create_future(), job.steps - job.skip, on_event=on_event)
        self.pending[job.id] = pending
        self._submit(pending)
        try:
            return await pending.future
        finally:
            if self.pending.pop(job.id, None) is not None and self._writer is not None:
                self._writer.write(frame(Cancel(job.id)))

    def admit(self, pictures: int) -> None:
        """Raises unless so many more pictures may be submitted now."""
        if self.draining:
            raise NotReady("The server is stopping. Send the request to another one, or try again.", retry_after=5)
        if self.ready is None and not self.pending:
            raise NotReady("The model is still loading. Try again in a few seconds.", retry_after=5)
        if len(self.pending) + pictures > self.max_waiting:
            wait = math.ceil(len(self.pending) * self.picture_seconds)
            raise RateLimited(
                "Too many pictures are waiting. Try again after the time in Retry-After.",
                retry_after=min(120, max(1, wait)),
            )

    def outlook(self, request: str) -> tuple[int, float]:
        """Pictures of other requests that came before this one's, and an estimate of the seconds until it is done."""
        ahead, seconds, before = 0, 0.0, 0.0
        for pending in self.pending.values():
            before += pending.steps_left * self.step_seconds
            if pending.job.id.startswith(request + "-"):
                seconds = before
            elif seconds == 0:
                ahead += 1
        return ahead, seconds

    def _submit(self, pending: Pending) -> None:
        if self._writer is not None and self.ready is not None:
            pending.attempts += 1
            self._writer.write(frame(pending.job))

    def _settle(self, pending: Pending, result: Done | Exception) -> None:
        self.pending.pop(pending.job.id, None)
        if pending.future.done():
            return
        if isinstance(result, Exception):
            pending.future.set_exception(result)
        else:
            pending.future.set_result(result)

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "flux_local.engine", "--fd", str(theirs.fileno()),
                   "--model", str(self.folder), "--device", self.device]  # fmt: skip
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        return reader

    async def _first_message(self, reader: asyncio.StreamReader) -> Ready:
        try:
            message = await self._receive(reader)
        except EOFError:
            raise StartError("The engine process ended while loading. Its last words are above.") from None
        if isinstance(message, StartFailed):
            error = StartError(message.message)
            error.exit_code = message.exit_code
            raise error
        assert isinstance(message, Ready)
        self.ready = message
        self.step_seconds = self.step_seconds or message.step_seconds
        return message

    async def _receive(self, reader: asyncio.StreamReader) -> FromEngine:
        """Raises EOFError when the engine has gone."""
        try:
            (length,) = HEADER.unpack(await reader.readexactly(HEADER.size))
            return decode_from_engine(await reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionResetError) as error:
            raise EOFError from error

    async def _supervise(self, reader: asyncio.StreamReader) -> None:
        """Hands out what the engine sends; when it dies, starts another and gives the open jobs to that one."""
        while True:
            with contextlib.suppress(EOFError):
                while True:
                    self._handle(await self._receive(reader))
            self.ready = None
            self._kill()
            log.error("the engine process ended; starting another")
            for pending in list(self.pending.values()):
                if pending.attempts >= ATTEMPTS:
                    self._settle(pending, InternalError("The engine failed twice on this request. Change it."))
            restarted = await self._restart()
            if restarted is None:
                return
            reader = restarted
            for pending in list(self.pending.values()):
                self._submit(pending)

    async def _restart(self) -> asyncio.StreamReader | None:
        """Another engine, with a growing pause between tries; None once it has given up."""
        for attempt in range(START_TRIES):
            try:
                reader = await self._spawn()
                await self._first_message(reader)
                return reader
            except StartError as error:
                log.error("the engine did not start: %s", error.message)
                self._kill()
                await asyncio.sleep(min(60, 2**attempt) * (0.5 + secrets.randbelow(1000) / 2000))
        for pending in list(self.pending.values()):
            self._settle(pending, InternalError("The engine cannot be started. Ask the server's operator."))
        self.dead.set_result(EngineDead("The engine process cannot be started again."))
        return None

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, (Ready, StartFailed)):
            return
        pending = self.pending.get(message.id)
        if pending is None:
            return
        match message:
            case Step() | Partial():
                if isinstance(message, Step):
                    pending.steps_left = message.steps - message.step
                    self.step_seconds += 0.1 * (message.seconds - self.step_seconds)
                if pending.on_event is not None:
                    pending.on_event(message)
            case Done():
                seconds = message.encode_s + message.denoise_s + message.decode_s
                self.picture_seconds += 0.1 * (seconds - self.picture_seconds)
                self._settle(pending, message)
            case Failed():
                error = BY_CODE.get(message.code, InternalError)
                self._settle(pending, error(message.message))

    def _kill(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
