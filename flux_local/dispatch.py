"""What the server owes: admits pictures, hands them to engines, and ends each exactly once whatever the engines do.

A picture ends with its pixels, with an error, or cancelled. Knows neither HTTP nor torch, nor what work costs.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from flux_local.admission import NOTHING, Amount, Held, Limits, Speed, amount_of
from flux_local.errors import (
    BY_CODE,
    DeadlineExceeded,
    Draining,
    EngineDead,
    InternalError,
    NotReady,
    RequestCrashes,
    StartError,
)
from flux_local.messages import Cancel, Done, Failed, FromEngine, Job, Partial, Ready, Step
from flux_local.supervisor import Engine, Fall, Hooks

CRASHES = 2
"""Engines that a picture may bring down before it is refused."""
REFUSED_FOR = 3600.0
"""Seconds for which a request that brought down so many is refused."""
BATCH_GAIN = 0.5
"""What pictures that share steps cost at least, of what they cost alone."""
OUTSIDE_FALLS = 3
"""Engines that somebody else (the kernel, for want of memory) ended with a picture in hand, before it is refused."""

log = logging.getLogger("flux_local.dispatch")

OnEvent = Callable[[Step | Partial], None]
Outlook = dict[str, tuple[int, float]]
"""Of each request with pictures pending: pictures of others that came before its first, and an estimate of the seconds
until its last is done."""


@dataclass(eq=False)
class Pending:
    """A picture that has been promised an end."""

    job: Job
    future: asyncio.Future[Done]
    steps_left: int
    on_event: OnEvent | None
    engine: Engine | None = None
    asked: float = field(default_factory=time.monotonic)
    begun: bool = False
    """Whether its engine has told of a step."""
    crashes: int = 0
    outside: int = 0
    """Falls of its engine, with it in hand, from inside and from outside."""


class Dispatcher:
    """All engines and the pictures they owe. Lives on the event loop it is made on.

    Args:
        engines: makes them, not started yet.
    """

    def __init__(self, limits: Limits, engines: Callable[[Hooks], Sequence[Engine]]) -> None:
        self.limits = limits
        self.started = False
        self.precisions: tuple[str, ...] = ()
        self.attentions: dict[str, str] = {}
        """By precision, whose attention the engines have."""
        self.draining = False
        self.stopped = False
        self.pending: dict[str, Pending] = {}
        self.held: dict[str, Held] = {}
        self.refused: dict[tuple[str, bytes], float] = {}
        """Until when, by prompt and fingerprint."""
        self.speed = Speed()
        self.placed_again = 0
        """Pictures given to an engine once more after a fall."""
        self.dead: asyncio.Future[StartError] = asyncio.get_running_loop().create_future()
        self.engines = engines(Hooks(self._owes, self._on_message, self._on_ready, self._on_fall))
        self._running: list[asyncio.Task[None]] = []
        """The engines' guardians; one that is done has given its engine up."""
        self._serials = itertools.count(1)

    @property
    def ready(self) -> Ready | None:
        """An engine that is."""
        return next((engine.ready for engine in self.engines if engine.ready is not None), None)

    @property
    def _working(self) -> int:
        """Engines that are not given up."""
        return max(1, len(self.engines) - sum(task.done() for task in self._running))

    async def start(self) -> Ready:
        """Starts the engines and waits until each has drawn its warm-up picture.

        Raises:
            StartError: one could not start, with the exit code that fits.
        """
        loop = asyncio.get_running_loop()
        started: list[asyncio.Future[Ready]] = [loop.create_future() for _ in self.engines]
        for engine, future in zip(self.engines, started, strict=True):
            task = asyncio.create_task(engine.run(future))
            task.add_done_callback(self._on_end)
            self._running.append(task)
        readies = await asyncio.gather(*started)
        self.speed.step = max(ready.token_seconds for ready in readies)
        self.precisions = tuple(p for p in readies[0].precisions if all(p in ready.precisions for ready in readies))
        if not self.precisions:
            raise StartError("The devices have no precision in common. Set --precisions or --memory for all of them.")
        of_all = [dict(zip(ready.precisions, ready.attentions, strict=True)) for ready in readies]
        self.attentions = {p: ", ".join(sorted({of_one[p] for of_one in of_all})) for p in self.precisions}
        self.started = True
        return readies[0]

    async def stop(self) -> None:
        """Ends the engines; what is still pending ends with `Draining`, and so does what comes later."""
        self.stopped = True
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for pending in list(self.pending.values()):
            self._settle(pending, stopping())

    async def draw(self, job: Job, on_event: OnEvent | None = None) -> Done:
        """Draws one picture of an admitted request; cancelling the caller cancels the job.

        Args:
            job: its id is the request's, a dash, and something.
            on_event: called with each reported step and each partial picture. Starts over if an engine fell.

        Raises:
            RequestCrashes: see there. Draining: the server stops.
            GenerationInvalid, InternalError, DeadlineExceeded: the picture failed.
        """
        if self.stopped:
            raise stopping()
        self._check_refused(job)
        if held := self.held.get(request_of(job.id)):
            held.take(job)
        job = msgspec.structs.replace(job, serial=next(self._serials))
        future: asyncio.Future[Done] = asyncio.get_running_loop().create_future()
        pending = Pending(job, future, job.steps - job.skip, on_event)
        self.pending[job.id] = pending
        try:
            self._place(pending)
            return await future
        finally:
            if self.pending.pop(job.id, None) is not None and pending.engine is not None:
                pending.engine.send(Cancel(job.id))

    def _check_refused(self, job: Job) -> None:
        now = time.monotonic()
        self.refused = {known: until for known, until in self.refused.items() if until > now}
        if job.prompt in {prompt for prompt, _ in self.refused} and work_of(job) in self.refused:
            raise RequestCrashes

    def admit(self, request: str, owner: str, pictures: int, amount: Amount, seconds: float) -> None:
        """Takes a request in, if there is room for all of it; `release` it when it has ended.

        Args:
            amount: of all pictures.
            seconds: that its client gives it.

        Raises:
            DeadlineExceeded: it would take far longer than that even if nothing else were there. RateLimited: too
            much waits. NotReady: the engines are still starting. Draining: the server stops. An engine that is being
            replaced refuses nothing: what is admitted meanwhile waits for it.
        """
        self.check_open(owner, pictures, amount)
        alone = self.speed.seconds(amount) * BATCH_GAIN / self._working
        if alone > 2 * seconds:
            raise DeadlineExceeded(
                f"This would take about {alone:.0f} s, and the time for it is {seconds:g} s (the server's limit, or "
                "less by 'X-Request-Timeout'). Ask for fewer steps or pictures."
            )
        self.held[request] = Held(owner, pictures, amount)

    def check_open(self, owner: str, pictures: int, amount: Amount = NOTHING) -> None:
        """Whether a request of the owner's would be taken now.

        Raises:
            Draining, NotReady, RateLimited: as `admit`.
        """
        if self.draining:
            raise Draining("The server is stopping. Send the request to another one, or try again.", retry_after=5)
        if not self.started:
            raise NotReady("The model is still loading. Try again in a few seconds.", retry_after=5)
        more = pictures, self.speed.seconds(amount) / self._working
        self.limits.check(more, self.ahead(), of_key=False)
        if self.limits.share < 1:
            self.limits.check(more, self.ahead(owner), of_key=True, keys=len(self._owners() | {owner}))

    def release(self, request: str) -> None:
        self.held.pop(request, None)

    def ahead(self, owner: str | None = None) -> tuple[int, float]:
        """Pictures that the owner, or all, have been promised, and the seconds that they take by measured speed."""
        jobs = [p for p in self.pending.values() if owner in (None, p.job.owner)]
        held = [h for h in self.held.values() if owner in (None, h.owner)]
        seconds = sum(map(self._cost, jobs)) + sum(self.speed.seconds(h.amount) for h in held)
        return len(jobs) + sum(h.pictures for h in held), seconds / self._working

    def _owners(self) -> set[str]:
        """Of what has been promised."""
        return {pending.job.owner for pending in self.pending.values()} | {held.owner for held in self.held.values()}

    def outlook(self) -> Outlook:
        found: Outlook = {}
        seconds = 0.0
        for place, pending in enumerate(self.pending.values()):
            request = request_of(pending.job.id)
            seconds += self._cost(pending) / self._working
            found[request] = found.get(request, (place, 0.0))[0], seconds
        return found

    def outlook_of_held(self, request: str) -> tuple[int, float]:
        """As `outlook`, of a request that has no pictures pending: none yet, or none any more."""
        held = self.held.get(request)
        return (len(self.pending), self.ahead()[1]) if held and held.amount.token_steps > 0 else (0, 0.0)

    def _cost(self, pending: Pending) -> float:
        """Seconds of one device."""
        return self.speed.seconds(amount_of(pending.job, pending.steps_left))

    def _owes(self, engine: Engine) -> bool:
        return any(pending.engine is engine for pending in self.pending.values())

    def _place(self, pending: Pending) -> None:
        """Hands the picture to the ready engine that owes least; if none is ready, it waits for one."""
        ready = [engine for engine in self.engines if engine.ready is not None]
        if not ready:
            pending.engine = None
            return
        owed = dict.fromkeys(ready, 0.0)
        for other in self.pending.values():
            if other.engine in owed and other is not pending:
                owed[other.engine] += self._cost(other)
        pending.engine = min(ready, key=owed.__getitem__)
        pending.steps_left = pending.job.steps - pending.job.skip
        pending.engine.send(pending.job)

    def _on_ready(self, engine: Engine) -> None:
        """Gives the engine what waits for one, and its share of what others have not begun: the latest of it."""
        in_hand = {serial for other in self.engines for serial in other.in_hand()}
        movable = [
            pending
            for pending in self.pending.values()
            if pending.engine not in (None, engine) and not pending.begun and not pending.crashes
            and not pending.outside and pending.job.serial not in in_hand
        ]  # fmt: skip
        for pending in self.pending.values():
            if pending.engine is None:
                self._place(pending)
        owed: dict[Engine | None, float] = {}
        for pending in self.pending.values():
            owed[pending.engine] = owed.get(pending.engine, 0.0) + self._cost(pending)
        moved = []
        for pending in reversed(movable):
            cost = self._cost(pending)
            if owed[pending.engine] - cost < owed.get(engine, 0.0):
                continue
            owed[pending.engine] -= cost
            owed[engine] = owed.get(engine, 0.0) + cost
            moved.append(pending)
        for pending in reversed(moved):
            assert pending.engine is not None
            pending.engine.send(Cancel(pending.job.id))
            pending.engine = engine
            engine.send(pending.job)

    def _on_fall(self, engine: Engine, fall: Fall) -> None:
        """Places the engine's pictures anew; those that were in its hands go alone, and not for ever."""
        owed = [pending for pending in self.pending.values() if pending.engine is engine]
        for pending in owed:
            in_hand = pending.begun if fall.serials is None else pending.job.serial in fall.serials
            pending.engine, pending.begun = None, False
            if in_hand:
                pending.job = msgspec.structs.replace(pending.job, alone=True)
                pending.crashes += fall.inside
                pending.outside += not fall.inside
        for pending in owed:
            if pending.crashes >= CRASHES or pending.outside >= OUTSIDE_FALLS:
                self._refuse(pending.job)
        for pending in owed:
            if pending.job.id in self.pending:
                self.placed_again += 1
                self._place(pending)

    def _refuse(self, job: Job) -> None:
        """Ends all that is the same work, what comes in the next REFUSED_FOR seconds too: each more of it would cost
        an engine, and in the end the server."""
        work = work_of(job)
        self.refused[work] = time.monotonic() + REFUSED_FOR
        for pending in list(self.pending.values()):
            if pending.job.prompt == job.prompt and work_of(pending.job) == work:
                if pending.engine is not None:
                    pending.engine.send(Cancel(pending.job.id))
                self._settle(pending, RequestCrashes())

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """One engine is given up: its pictures go to the others; without others the server has to end."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, StartError):
            log.error("an engine's guardian failed", exc_info=error)
            error = EngineDead("An engine's guardian failed. The log above says how; start the server again.")
        if self.started and not all(t.done() for t in self._running):
            log.error("%s", error.message)
            engine = self.engines[self._running.index(task)]
            self._on_fall(engine, Fall((), False))
            return
        for pending in list(self.pending.values()):
            self._settle(pending, InternalError("The engine cannot be started. Ask the server's operator."))
        if not self.dead.done():
            self.dead.set_result(error)

    def _settle(self, pending: Pending, result: Done | Exception) -> None:
        self.pending.pop(pending.job.id, None)
        if pending.future.done():
            return
        if isinstance(result, Exception):
            pending.future.set_exception(result)
        else:
            pending.future.set_result(result)

    def _on_message(self, engine: Engine, message: FromEngine) -> None:
        if not isinstance(message, (Step, Partial, Done, Failed)):
            return
        pending = self.pending.get(message.id)
        if pending is None or pending.engine is not engine:
            return
        match message:
            case Step() | Partial():
                if isinstance(message, Step):
                    pending.steps_left, pending.begun = message.steps - message.step, True
                    self.speed.stepped(message.seconds / pending.job.tokens)
                if pending.on_event is not None:
                    try:
                        pending.on_event(message)
                    except Exception:  # what a client's side makes of it must not end the reading of the pipe
                        log.exception("an event of %s could not be told", message.id)
            case Done():
                self.speed.began(message.beginning_s)
                self.speed.decoded(message.decoding_s / pending.job.canvas_tokens)
                self._settle(pending, message)
            case Failed():
                error = BY_CODE.get(message.code, InternalError)(message.message)
                error.param, error.final = message.param, message.final
                self._settle(pending, error)


def request_of(job_id: str) -> str:
    return job_id.rpartition("-")[0]


def stopping() -> Draining:
    return Draining("The server is stopping. Send the request again.", retry_after=5)


def work_of(job: Job) -> tuple[str, bytes]:
    """What makes two jobs the same work: the prompt, and a fingerprint of it with all else but the seed, which is
    another one each time where none is given."""
    same = msgspec.structs.replace(job, id="", serial=0, owner="", deadline=None, alone=False, partials=0, seed=0)
    return job.prompt, hashlib.sha256(msgspec.msgpack.encode(same)).digest()
