"""Engines on the machines of a Ray cluster, which the dispatcher gives pictures to as to any other.

Ray finds a machine for each and says when one is gone. There the engine has the same supervisor as here, and on it all
depends that depends on engines here: what is joined to a batch, what hangs, who is to blame for a crash. Messages cross
as msgpack. Knows nothing of requests, and has no queue of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError

import flux_local
from flux_local.config import Settings
from flux_local.errors import EngineDead, SettingsError, StartError
from flux_local.host import Fell, FromHost, GivenUp, Host, encode, from_host
from flux_local.messages import Job, Ready, StartFailed, ToEngine, later
from flux_local.supervisor import Engine, Fall, Guard, Hooks

CONNECT_SECONDS = 5.0
PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before an engine is asked for again whose machine went or could not start it, twice as long each time."""
SILENCE = 15.0
"""Seconds without a word, a beat either, after which a host counts as lost."""
AT_ONCE = 16 << 20
"""Bytes of pictures and masks, about, that go to a host in one call."""
ROOM_SOON = 15.0
"""Seconds after which it is worth a line in the log that no machine has room for an engine."""
SECRETS = {"api_keys", "api_keys_file"}

log = logging.getLogger("flux_local.cluster")


def connect(address: str) -> None:
    """Joins the cluster that this machine is a part of.

    Raises:
        StartError: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        host, _, port = address.rpartition(":")
        if host and "/" not in host:  # Ray itself would try for a minute
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address, namespace="flux-local", logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise StartError(
            f"No Ray cluster at '{address}' that this machine is a part of ({brief(error)}). Make it one with `ray "
            "start --head` here, or `ray start --address=HEAD:6379`, and name it with --cluster auto."
        ) from error


def devices(settings: Settings) -> list[str]:
    """A kind of device for each engine: those of the settings, or every GPU in the cluster, or each machine's CPU.

    Raises:
        SettingsError: more GPUs than there are.
    """
    asked = settings.device_list()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if asked == ["auto"]:
        return ["cuda"] * gpus or ["cpu"] * sum(node["Alive"] for node in ray.nodes())
    kinds = ["cpu" if name == "cpu" else "cuda" for name in asked]
    if kinds.count("cuda") > gpus:
        raise SettingsError(
            f"The cluster has {gpus} GPUs where --devices names {kinds.count('cuda')}. Name fewer, or start Ray on "
            "more machines."
        )
    return kinds


def engines(settings: Settings, guard: Guard) -> Callable[[Hooks], Sequence[Engine]]:
    """Makes the engines of a dispatcher.

    Raises:
        StartError: no cluster. SettingsError: it has not what is asked for.
    """
    passed_on = for_others(settings)
    connect(settings.cluster)
    kinds = devices(settings)
    host = ray.remote(Host)
    return lambda hooks: [
        RemoteEngine(host, passed_on | {"devices": ",".join(kinds)}, kind, guard, hooks) for kind in kinds
    ]


def for_others(settings: Settings) -> dict[str, Any]:
    """The settings as they mean the same on another machine, in another working directory; without secrets.

    Raises:
        WeightsError: the safety checker is to be on, and is not there.
    """
    checker, model = settings.safety_folder(), Path(settings.model).expanduser()
    values = msgspec.structs.asdict(settings)
    values |= {"cluster": "", "safety_checker": "off" if checker is None else "on"}
    values |= {} if checker is None else {"safety_model": str(checker.resolve())}
    values |= {"model": str(model.absolute())} if model.exists() else {}
    return {name: value for name, value in values.items() if name not in SECRETS}


class RemoteEngine:
    """An engine wherever in the cluster there is room for it, and elsewhere once its machine is gone.

    Args:
        actor: the class `Host` as Ray's.
        settings: of the other machine, by name.
        kind: of device, `cuda` or `cpu`.
    """

    def __init__(self, actor: Any, settings: dict[str, Any], kind: str, guard: Guard, hooks: Hooks) -> None:
        self.actor = actor
        self.settings = settings
        self.device = self.kind = kind
        self.guard = guard
        self.hooks = hooks
        self.ready: Ready | None = None
        self.falls: Counter[str] = Counter()
        self._first: Ready | None = None
        self._host: Any = None
        self._life = 0
        self._outgoing: list[ToEngine] = []
        self._more = asyncio.Event()

    async def run(self, started: asyncio.Future[Ready]) -> None:
        """As `Engine.run`. A machine may be lost any number of times; a start that fails too often is the last."""
        failures, pause = 0, PAUSE
        try:
            while True:
                try:
                    await self._start()
                    failures, pause = 0, PAUSE
                    if not started.done():
                        assert self.ready is not None
                        started.set_result(self.ready)
                    await self._serve()
                except (RayError, TimeoutError) as error:
                    if not started.done():
                        started.set_exception(StartError(f"A machine did not get its engine started: {brief(error)}"))
                        return
                    log.error("the engine on %s is gone with its machine or process: %s", self.device, brief(error))
                    self._fell(Fall(None, False))
                except StartError as error:
                    if not started.done():
                        started.set_exception(error)
                        return
                    failures += 1
                    if isinstance(error, EngineDead):
                        raise
                    if failures >= self.guard.max_falls:
                        raise EngineDead(f"An engine did not start {failures} times: {error.message}") from error
                    log.error("an engine of the cluster did not start: %s", error.message)
                self._let_go()
                await asyncio.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
        finally:
            self._let_go()

    def send(self, message: ToEngine) -> None:
        """As `Engine.send`."""
        if self.ready is not None:
            self._outgoing.append(message)
            self._more.set()

    def in_hand(self) -> tuple[int, ...]:
        """As `Engine.in_hand`: its pulse is on another machine."""
        return ()

    async def _start(self) -> None:
        """Has a machine start the engine, however long there is none with room.

        Raises:
            StartError: with the exit code that fits.
        """
        room = {"num_gpus": 1, "num_cpus": 0} if self.kind == "cuda" else {"num_cpus": 1}
        placing = self.actor.options(scheduling_strategy="SPREAD", **room)
        self._host = placing.remote(self.settings, self.kind, self.guard, flux_local.__version__)
        answering = asyncio.ensure_future(self._host.start.remote())
        placed = asyncio.ensure_future(self._host.place.remote())
        if not (await asyncio.wait([placed], timeout=ROOM_SOON))[0]:
            log.warning("no machine of the cluster has room for an engine on '%s'; waiting for one", self.kind)
        (answer,) = from_host((await asyncio.gather(placed, answering))[1])
        if isinstance(answer, StartFailed):
            raise answer.error()
        assert isinstance(answer, Ready)
        if self._first is None:
            self._first = answer
            self.settings = self.settings | {"memory": answer.tier}  # as in `Supervisor`: what comes later is as it was
        elif not same_pictures(self._first, answer):
            raise StartError(f"{answer.device} would draw other pictures than {self._first.device} did.")
        self._life = 0
        self._begin(answer)

    async def _serve(self) -> None:
        """Hands messages on, both ways, until the machine or the engine is gone for good.

        Raises:
            RayError, TimeoutError: it is lost. EngineDead: see there.
        """
        sending = asyncio.create_task(self._send_on())
        receiving = asyncio.ensure_future(self._host.receive.remote())
        try:
            while True:
                await asyncio.wait([sending, receiving], timeout=SILENCE, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
                if not receiving.done():
                    raise TimeoutError(f"It has said nothing for {SILENCE:.0f} s.")
                for message in from_host(receiving.result()):
                    self._take(message)
                receiving = asyncio.ensure_future(self._host.receive.remote())
        finally:
            sending.cancel()
            receiving.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)

    def _take(self, message: FromHost) -> None:
        match message:
            case Ready():
                self._begin(message)
            case Fell():
                self._fell(Fall(message.serials, message.inside))
            case GivenUp():
                raise EngineDead(message.message)
            case _:
                self.hooks.on_message(self, message)

    async def _send_on(self) -> None:
        """One call at a time: Ray promises no order among more."""
        while True:
            await self._more.wait()
            life, now, batch, nbytes = self._life, time.monotonic(), [], 0
            while self._outgoing and nbytes < AT_ONCE:
                message = self._outgoing.pop(0)
                batch.append(later(message, -now))
                if isinstance(message, Job):
                    nbytes += len(message.image or b"") + len(message.mask or b"")
            if not self._outgoing:
                self._more.clear()
            if batch:
                await self._host.send.remote(life, encode(batch))

    def _begin(self, ready: Ready) -> None:
        self._life += 1
        self.device, self.ready = ready.device, ready
        self.hooks.on_ready(self)

    def _fell(self, fall: Fall) -> None:
        if self.ready is None:
            return
        self.ready = None
        self._outgoing.clear()
        self.falls["inside" if fall.inside else "outside"] += 1
        self.hooks.on_fall(self, fall)

    def _let_go(self) -> None:
        host, self._host, self.ready = self._host, None, None
        if host is not None:  # in a thread, because it may wait for a machine
            asyncio.get_running_loop().run_in_executor(None, end, host)


def same_pictures(first: Ready, other: Ready) -> bool:
    """Whether an engine that replaces another has the model, the precisions and the attention that it had."""
    return (first.weights_bytes, first.precisions, first.attentions, first.tier) == (
        other.weights_bytes,
        other.precisions,
        other.attentions,
        other.tier,
    )


def end(host: Any) -> None:
    with contextlib.suppress(RayError, RuntimeError, ValueError):
        ray.kill(host)


def brief(error: Exception) -> str:
    """The last line of an error: where Ray says why."""
    return ([line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1][:300]
