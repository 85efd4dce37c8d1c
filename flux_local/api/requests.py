"""Requests under way: each has an entry in the history, live progress, and can be cancelled by its id.

A request that was told 202 goes on without its client, and after a restart; one whose client waits ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flux_local.api.answers import GENERIC, error_body
from flux_local.api.promises import packed, unpacked
from flux_local.api.work import OnEvent, OnPicture, Services, Work
from flux_local.dispatch import Outlook
from flux_local.errors import Cancelled, Draining, FluxError, InternalError, RequestCrashes, StorageFull
from flux_local.history import FINAL, Entry, Reply, Status, without_pictures
from flux_local.messages import Partial, Step
from flux_local.params import GenerationParams

ALONE, GIVEN_UP = 2, 3
"""How many processes may end, not in order, after they took up a promise: from the first number on it is taken up only
when no other promise is at work, and from the second it is given up."""

log = logging.getLogger("flux_local.api")


@dataclass
class Live:
    """A request that is not finished."""

    task: asyncio.Task[Any]
    steps: dict[int, Step] = field(default_factory=dict)
    cancelled: bool = False
    refused: StorageFull | None = None
    """Why it must not go on: nothing of it can be written down."""


@dataclass(frozen=True)
class Ending:
    """How a request ended, as `History.finish` takes it."""

    status: Status
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    files: list[str] = field(default_factory=list)

    def of(self, entry: Entry) -> Entry:
        """The entry as if this had been written down."""
        return msgspec.structs.replace(entry, finished=entry.finished or time.time(), **vars(self))


class Requests:
    """All requests of this process."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.live: dict[str, Live] = {}
        self.stopping = False
        self.waited_for: set[asyncio.Task[Any]] = set()
        """Work whose client waits for the answer."""
        self.unwritten: dict[str, Ending] = {}
        """How requests ended that the disk had no room for."""
        self.in_turn: asyncio.Task[None] | None = None
        """Takes up, one by one, what may have ended the processes before."""
        services.metrics.unwritten.set_function(lambda: len(self.unwritten))

    async def begin(
        self, work: Work, route: str, on_event: OnEvent | None = None, on_picture: OnPicture | None = None
    ) -> asyncio.Task[dict[str, Any]]:
        """Accepts work whose client waits, and keeps an account of it (unless `sync_mode`); the task is the answer's.

        Where no account can be kept, work that stores nothing else goes on without.

        Raises:
            What `Dispatcher.admit` raises. StorageFull: its pictures could not be stored either.
        """
        with self._admitted(work):
            if work.params.sync_mode:
                return self._waited_for(self._spawn(work, route, work.run(on_event, on_picture)))
            # The account is written while the work begins; what is written later waits for it, in order.
            adding = asyncio.ensure_future(self.services.history.add(new(work, route, "running")))
            task = self._tracking(work, route, on_event, on_picture)
            self._waited_for(task)
            try:
                await adding
            except BaseException as error:
                if isinstance(error, StorageFull) and not work.stores:
                    return task
                if isinstance(error, StorageFull) and (live := self.live.get(work.id)):
                    live.refused = error
                task.cancel()
                await asyncio.wait([task])
                raise
            return task

    def _waited_for(self, task: asyncio.Task[dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
        """Its client waits."""
        self.waited_for.add(task)
        task.add_done_callback(self.waited_for.discard)
        return task

    async def start(self, work: Work, route: str, reply: Callable[[Entry], Reply | None]) -> Entry:
        """Accepts the work; it goes on by itself, and is taken up again if the server is restarted.

        Args:
            reply: what a repeat of the request will be answered, which becomes known with the promise or not at all.
        """
        with self._admitted(work):
            entry = new(work, route, "queued", await asyncio.to_thread(packed, work))
            await self.services.history.add(entry, reply(entry))
            self._tracking(work, route, whole=True)
            return entry

    @contextlib.contextmanager
    def _admitted(self, work: Work) -> Iterator[None]:
        """Room for the work, given back if it comes to nothing."""
        self.services.dispatcher.admit(work.id, work.owner, len(work.params.seeds), work.plan.amount, work.seconds)
        try:
            yield
        except BaseException:
            self.services.dispatcher.release(work.id)
            raise

    async def left_behind(self) -> list[Entry]:
        """What an earlier process promised and did not do; what nobody waits for any more is closed."""
        unfinished = await self.services.history.unfinished()
        for entry in unfinished:
            if entry.work is None:
                await self._lost(entry, InternalError("The server was stopped while it worked on this. Send it again."))
            elif entry.resumed >= GIVEN_UP:
                await self._lost(entry, RequestCrashes())
        return [entry for entry in unfinished if entry.work is not None and entry.resumed < GIVEN_UP]

    async def resume(self, promised: list[Entry]) -> None:
        """Takes up what an earlier process was told to do, less what was cancelled since."""
        taken = [await self._take_up(entry) for entry in promised if entry.resumed < ALONE]
        if suspects := [entry for entry in promised if entry.resumed >= ALONE]:
            self.in_turn = asyncio.create_task(self._one_by_one(suspects, [task for task in taken if task is not None]))

    async def _one_by_one(self, suspects: list[Entry], others: list[asyncio.Task[dict[str, Any]]]) -> None:
        """Takes them up in turn, after the others, so that the one that ends the process is the one that is counted."""
        if others:
            await asyncio.wait(others)
        for entry in suspects:
            if (task := await self._take_up(entry)) is not None:
                await asyncio.wait([task])

    async def _take_up(self, entry: Entry) -> asyncio.Task[dict[str, Any]] | None:
        """Begins what was promised, unless it was cancelled or cannot be done any more."""
        with contextlib.suppress(StorageFull):  # where that cannot be written, the work is done all the same
            if not await self.services.history.take_up(entry.id):
                return None
        try:
            work = unpacked(entry, self.services)
        except FluxError as error:  # an adapter or the model has gone meanwhile
            await self._lost(entry, error)
            return None
        except (msgspec.MsgspecError, ValueError):
            log.exception("request %s was accepted by another version and cannot be read", entry.id)
            await self._lost(entry, InternalError("The server was changed before it came to this. Send it again."))
            return None
        return self._tracking(work, entry.route, whole=True)

    async def _lost(self, entry: Entry, error: FluxError) -> None:
        await self._finish(entry.id, "failed", error=error_body(error))

    async def stop(self) -> None:
        """Leaves accepted work for the next process."""
        self.stopping = True
        tasks = [live.task for live in self.live.values()]
        for task in (*tasks, *([self.in_turn] if self.in_turn else ())):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        dispatcher = self.services.dispatcher
        if dispatcher.started and not dispatcher.dead.done():
            with contextlib.suppress(StorageFull):
                await self.services.history.put_down()

    def awaited(self) -> bool:
        """Whether a client waits for an answer."""
        return bool(self.waited_for)

    async def remove(self, id: str, owner: str) -> Entry:
        """Cancels what still runs and removes what is stored; returns the entry as it was last.

        Raises:
            NotFound: no such request of this owner. StorageFull: it stays as it is.
        """
        entry = await self.services.history.get(id, owner)
        if await self._cancelled(id):
            entry = await self.services.history.get(id, owner)
        ending = self.unwritten.get(id)
        await self.services.history.remove(id)  # first: where the disk is full, nothing is lost of what is not written
        self.unwritten.pop(id, None)
        for name in (*entry.files, *(ending.files if ending else ())):
            await asyncio.to_thread(self.services.store.remove, name)
        await self._cancelled(id)  # what was taken up from an earlier process meanwhile
        return ending.of(entry) if ending else entry

    async def _cancelled(self, id: str) -> bool:
        """Ends a request that runs; False if it does not."""
        live = self.live.get(id)
        if live is not None:
            live.cancelled = True
            live.task.cancel()
            with contextlib.suppress(Exception, asyncio.CancelledError):
                await asyncio.shield(asyncio.wait([live.task]))
        return live is not None

    def _spawn(
        self, work: Work, route: str, doing: Coroutine[Any, Any, dict[str, Any]]
    ) -> asyncio.Task[dict[str, Any]]:
        task, started = asyncio.create_task(doing), time.monotonic()
        self.services.metrics.accepted.labels(route).inc()

        def ended(task: asyncio.Task[Any]) -> None:
            self.services.dispatcher.release(work.id)
            error = CANCELLED if task.cancelled() else task.exception()  # told to whoever waits; nobody has to
            self.services.metrics.ended(route, error, time.monotonic() - started)

        task.add_done_callback(ended)
        return task

    def _tracking(
        self,
        work: Work,
        route: str,
        on_event: OnEvent | None = None,
        on_picture: OnPicture | None = None,
        whole: bool = False,
    ) -> asyncio.Task[dict[str, Any]]:
        """Work that has an entry. `whole`: it was promised, and its pictures stay in the entry."""
        task = self._spawn(work, route, self._tracked(work, on_event, on_picture, whole))
        self.live[work.id] = Live(task)
        task.add_done_callback(lambda _: self.live.pop(work.id, None))  # one may be cancelled before it begins
        return task

    async def _tracked(
        self, work: Work, on_event: OnEvent | None, on_picture: OnPicture | None, whole: bool
    ) -> dict[str, Any]:
        live = self.live[work.id]

        def note(index: int, event: Step | Partial) -> None:
            if isinstance(event, Step):
                live.steps[index] = event
            if on_event is not None:
                on_event(index, event)

        try:
            body = await work.run(note, on_picture)
            await self._finish(work.id, "succeeded", response=kept(body, whole), files=work.files)
        except asyncio.CancelledError:
            if live.refused is not None:
                raise live.refused from None
            if self.stopping:
                raise Draining("The server is stopping. Send the request again.", retry_after=5) from None
            await self._finish(work.id, "cancelled", error=error_body(CANCELLED))
            if live.cancelled:
                raise Cancelled("The request was cancelled.") from None
            raise
        except FluxError as error:
            if whole and (self.stopping or self.services.dispatcher.dead.done()):
                raise  # the server ends; what was promised is left for the next
            await self._finish(work.id, "failed", error=error_body(error))
            raise
        except Exception:
            log.exception("request %s failed", work.id)
            await self._finish(work.id, "failed", error=error_body(InternalError(GENERIC)))
            raise
        finally:
            self.live.pop(work.id, None)
        return body

    async def _finish(self, id: str, status: Status, **more: Any) -> None:
        """Writes down a request's end. Who cancels it meanwhile has come too late: this goes on until it is written."""
        writing = asyncio.ensure_future(self._write_ending(id, status, **more))
        while not writing.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([writing])
        writing.result()

    async def _write_ending(self, id: str, status: Status, **more: Any) -> None:
        """What a full disk does not take is kept in memory and written later."""
        try:
            await asyncio.to_thread(self.services.store.renew, more.get("files", ()))
            await self.services.history.finish(id, status, **more)
        except StorageFull:
            log.exception("the end of request %s (%s) could not be written down yet", id, status)
            self.unwritten[id] = Ending(status, **more)

    async def write_endings(self) -> None:
        """Writes down what could not be written before.

        Raises:
            StorageFull: it still cannot.
        """
        for id, ending in list(self.unwritten.items()):
            await self.services.history.finish(id, **vars(ending))
            self.unwritten.pop(id, None)

    def views(self, entries: list[Entry]) -> list[dict[str, Any]]:
        """Entries as the API shows them."""
        outlook = self.services.dispatcher.outlook() if any(entry.status not in FINAL for entry in entries) else {}
        return [self._view(entry, outlook) for entry in entries]

    def view(self, entry: Entry) -> dict[str, Any]:
        return self.views([entry])[0]

    def _view(self, entry: Entry, outlook: Outlook) -> dict[str, Any]:
        if (ending := self.unwritten.get(entry.id)) is not None:
            entry = ending.of(entry)
        live = self.live.get(entry.id)
        status = "running" if live and live.steps and entry.status == "queued" else entry.status
        found = {
            "id": entry.id,
            "object": "image.request",
            "status": status,
            "created": int(entry.created),
            "finished": entry.finished and int(entry.finished),
            "route": entry.route,
            "params": entry.params,
            "progress": self._progress(entry, live, outlook),
            "response": entry.response,
            "error": entry.error and entry.error["error"],
        }
        return {name: value for name, value in found.items() if value is not None}

    def _progress(self, entry: Entry, live: Live | None, outlook: Outlook) -> dict[str, Any] | None:
        """Steps done of steps to do, over all pictures; place in the queue and an estimate of the seconds left."""
        if entry.status in FINAL:
            return None
        each = entry.params["steps_run"]
        total = each * len(entry.params["seeds"])
        done = sum(step.step for step in live.steps.values()) if live else 0
        ahead, seconds = outlook.get(entry.id) or self.services.dispatcher.outlook_of_held(entry.id)
        return {
            "step": done,
            "steps": total,
            "queue_position": 0 if done else ahead,
            "seconds_left": round(seconds, 2),
        }


CANCELLED = Cancelled("The request was cancelled.")


def as_run(params: GenerationParams) -> dict[str, Any]:
    """The parameters for the history, seeds and defaults filled in."""
    found: dict[str, Any] = msgspec.to_builtins(params)
    found["delivered"], found["canvas"] = str(params.delivered), str(params.canvas)
    found["steps_run"], found["steps_computed"] = params.steps_run, params.steps_computed
    del found["computed"], found["computed_origin"]
    return {name: value for name, value in found.items() if value is not None}


def kept(body: dict[str, Any], whole: bool) -> dict[str, Any]:
    """The answer as the history keeps it: without the pictures' own bytes, where the client was there to get them."""
    return body if whole else without_pictures(body)


def new(work: Work, route: str, status: Status, whole: bytes | None = None) -> Entry:
    """Work as the history takes it down; with all of it (`packed`), it can be done again."""
    return Entry(
        id=work.id,
        owner=work.owner,
        route=route,
        status=status,
        created=time.time(),
        params=as_run(work.params),
        work=whole,
    )
