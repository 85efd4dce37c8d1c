"""A server's life: lock, bind, load, serve, drain. The order is the point: nothing is loaded that cannot be served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flux_local import weights
from flux_local.admission import Limits
from flux_local.api.answers import error_body
from flux_local.api.app import create_app, new_request_id
from flux_local.api.requests import Requests
from flux_local.api.work import Services
from flux_local.config import Settings
from flux_local.decoder import SafeDecoder
from flux_local.dispatch import Dispatcher
from flux_local.errors import AlreadyTaken, InvalidValue, SettingsError, StorageFull
from flux_local.history import History
from flux_local.messages import Ready
from flux_local.metrics import Metrics
from flux_local.store import Store
from flux_local.supervisor import Engine, Guard, Hooks, Supervisor

DRAIN_SECONDS = 60
KEEP_ALIVE_SECONDS = 75
"""For which a connection without a request is kept; longer than clients' pools keep theirs, so that none is cut just as
it is used again."""
HEAD_SECONDS = 10
EARLY = 65_536
"""Bytes of further requests that are taken from a client whose first is still under way."""
SWEEP_SECONDS = 600
LOOK_EVERY = 0.05
"""Seconds between looks at whether a drain has come to its end."""

log = logging.getLogger("flux_local.server")


async def serve(settings: Settings, announce: Callable[[str, str, Ready], None]) -> None:
    """Serves until a signal, then drains.

    Args:
        announce: called with address, model and engine once requests are answered.

    Raises:
        AlreadyTaken, SettingsError, WeightsError, StartError: what prevents the start.
        EngineDead: the engine cannot be brought back.
    """
    folder = weights.find(settings.model)
    weights.verify(folder)
    model = weights.info(folder)
    store = Store(Path(settings.data_dir).expanduser(), settings.url_lifetime)
    listener = bind(settings.host, settings.port)
    limits = Limits(
        pictures=settings.max_waiting,
        seconds=settings.max_wait,
        share=settings.key_share if len(settings.keys()) > 1 else 1.0,
    )
    dispatcher = Dispatcher(limits, engines(settings, folder))
    history = History(Path(settings.data_dir).expanduser(), settings.url_lifetime)
    decoder = SafeDecoder()
    has_checker = settings.safety_folder() is not None
    metrics = Metrics(dispatcher, model.name)
    services = Services(settings, model, dispatcher, store, history, decoder, metrics, int(time.time()), has_checker)
    requests = Requests(services)
    app = create_app(services, requests)
    server = Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=DRAIN_SECONDS,
                                   http=Protocol, server_header=False, access_log=False, proxy_headers=False,
                                   timeout_keep_alive=KEEP_ALIVE_SECONDS))  # fmt: skip
    stopping, hurry = asyncio.Event(), asyncio.Event()

    def signalled() -> None:
        (hurry if stopping.is_set() else stopping).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, signalled)
    promised = await requests.left_behind()
    serving = asyncio.create_task(server.serve([listener]))
    sweeping = asyncio.create_task(sweep(services, requests))
    try:
        starting = asyncio.create_task(dispatcher.start())
        stop = asyncio.create_task(stopping.wait())
        await first_of(starting, stop, serving, dispatcher.dead)
        if starting.done():
            ready = starting.result()
            await requests.resume(promised)
            del promised  # megabytes, where edits were among them
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            announce(f"http://{shown}:{port}", model.name, ready)
            await first_of(stop, serving, dispatcher.dead)
        starting.cancel()
        dispatcher.draining = True
        await drain(requests, hurry)
        if dispatcher.dead.done():
            raise dispatcher.dead.result()
    finally:
        sweeping.cancel()
        server.should_exit = True
        await requests.stop()
        try:
            await dispatcher.stop()
        except Exception:
            log.exception("the engines could not be stopped in order")
        await decoder.close()
        await first_of(serving, asyncio.create_task(hurry.wait()))
        server.force_exit = True  # connections in the middle of something
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()
        with contextlib.suppress(StorageFull):
            await requests.write_endings()
        history.close()
        store.close()


def engines(settings: Settings, folder: Path) -> Callable[[Hooks], Sequence[Engine]]:
    """Makes those that the settings ask for: on this machine's devices, or on a cluster's.

    Raises:
        StartError: there is no such cluster. SettingsError, WeightsError: what they are to have is not there.
    """
    guard = Guard(settings.engine_timeout, settings.engine_falls, settings.engine_window)
    if settings.cluster:
        try:
            from flux_local import cluster
        except ImportError as error:
            raise SettingsError(
                "A cluster wants Ray. In the checkout: .venv/bin/pip install -c constraints.txt -e '.[cluster]'"
            ) from error
        return cluster.engines(settings, guard)
    options = settings.engine_options()
    return lambda hooks: [Supervisor(folder, device, guard, hooks, options) for device in settings.device_list()]


class Protocol(H11Protocol):
    """uvicorn's, but a connection has HEAD_SECONDS to send a request's whole head, or the rest of a body that has been
    answered already; it may idle between requests."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.head: asyncio.TimerHandle | None = self.loop.call_later(HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < EARLY:
            self.flow.resume_reading()  # uvicorn reads no more once there is something, and would not see it leave
        theirs, answered = self.conn.their_state, self.conn.our_state is h11.DONE
        half_a_head = theirs is h11.IDLE and bool(self.conn.trailing_data[0])
        unwanted = theirs is h11.SEND_BODY and answered
        if not half_a_head and not unwanted:
            self.forget()
        elif self.head is None:
            self.head = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP, in the form of all errors; it reaches no route."""
        error = InvalidValue("This is not valid HTTP/1.1. Check the request line, headers and chunks.")
        headers = [("content-type", "application/json"), ("connection", "close"), ("x-request-id", new_request_id())]
        events: list[h11.Event] = [
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=msgspec.json.encode(error_body(error))),
            h11.EndOfMessage(),
        ]
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        super().connection_lost(exc)

    def forget(self) -> None:
        if self.head is not None:
            self.head.cancel()
            self.head = None


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        yield


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Returns when one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def drain(requests: Requests, hurry: asyncio.Event) -> None:
    """Waits for the requests whose clients wait, at most `DRAIN_SECONDS`; new ones are answered 503 meanwhile.

    What was accepted with 202 is left for the next process.

    Args:
        hurry: once set, nothing is waited for.
    """
    deadline = time.monotonic() + DRAIN_SECONDS
    dead = requests.services.dispatcher.dead
    if requests.awaited():
        log.info("stopping: finishing what clients wait for, %d s at most; again to stop at once", DRAIN_SECONDS)
    while requests.awaited() and time.monotonic() < deadline and not dead.done() and not hurry.is_set():
        await asyncio.sleep(LOOK_EVERY)


async def sweep(services: Services, requests: Requests) -> None:
    """At once and now and then: removes what has expired, and writes what could not be written before."""
    while True:
        try:
            await asyncio.to_thread(services.store.sweep)
            await requests.write_endings()
            await services.history.sweep()
        except Exception:  # a full disk, say: what could not be done now is done later
            log.exception("what has expired could not be removed")
        await asyncio.sleep(SWEEP_SECONDS)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, taken before anything is loaded.

    Raises:
        AlreadyTaken: the port is in use. SettingsError: no such address here, or a port that is not for everybody.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except PermissionError as error:
        raise SettingsError(f"May not listen on port {port}; choose one above 1023 with --port.") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AlreadyTaken(f"Port {port} is in use. Stop what uses it, or choose another with --port.") from error
        reason = error.strerror or error
        raise SettingsError(f"Cannot listen on {host}: {reason}. Choose another address with --host.") from error
    return listener
