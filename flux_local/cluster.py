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
from typing import Any

import msgspec
import ray
from ray.exceptions import RayActorError, RayError

import flux_local
from flux_local import weights
from flux_local.config import Settings
from flux_local.errors import EngineDead, FluxError, SettingsError, StartError
from flux_local.messages import Cancel, Done, Failed, FromEngine, Job, Ready, StartFailed, ToEngine, later
from flux_local.supervisor import Engine, Fall, Guard, Hooks, Supervisor

CONNECT_SECONDS = 5.0
PAUSE = 1.0
"""Seconds before an engine is asked for again whose machine went, or did not get it started."""
ROOM_SOON = 15.0
"""Seconds after which it is worth a line in the log that no machine has room for an engine."""
SECRETS = {"api_keys", "api_keys_file"}

log = logging.getLogger("flux_local.cluster")


class Fell(msgspec.Struct, frozen=True, tag=True):
    """As `Fall`; the engine's supervisor is starting another."""

    serials: tuple[int, ...]
    inside: bool


class GivenUp(msgspec.Struct, frozen=True, tag=True):
    """There will be no other."""

    message: str


FromHost = FromEngine | Fell | GivenUp

_encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(list[ToEngine])
_from_host = msgspec.msgpack.Decoder(list[FromHost])


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
            f"No Ray cluster at '{address}' that this machine is a part of. Make it one with `ray start --head` here, "
            "or `ray start --address=HEAD:6379`, and name it with --cluster auto."
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
    connect(settings.cluster)
    kinds = devices(settings)
    return lambda hooks: [RemoteEngine(settings, kind, guard, hooks) for kind in kinds]


class RemoteEngine:
    """An engine wherever in the cluster there is room for it, and elsewhere once its machine is gone.

    Args:
        kind: of device, `cuda` or `cpu`.
    """

    def __init__(self, settings: Settings, kind: str, guard: Guard, hooks: Hooks) -> None:
        self.settings = {k: v for k, v in msgspec.structs.asdict(settings).items() if k not in SECRETS}
        self.device = self.kind = kind
        self.guard = guard
        self.hooks = hooks
        self.ready: Ready | None = None
        self.falls: Counter[str] = Counter()
        self._host: Any = None
        self._life = 0
        self._outgoing: list[ToEngine] = []
        self._more = asyncio.Event()

    async def run(self, started: asyncio.Future[Ready]) -> None:
        """As `Engine.run`. A machine that is lost is no fall of its pictures' making, and never the last."""
        try:
            while True:
                try:
                    await self._start(started)
                    await self._serve()
                except RayActorError as error:
                    if not started.done():
                        started.set_exception(StartError("A machine was lost while its engine was loading. Try again."))
                        return
                    log.error("the engine on %s is gone with its machine or process (%s)", self.device, brief(error))
                    self._fell(Fall((), False))
                except StartError as error:
                    if not started.done():
                        started.set_exception(error)
                        return
                    if isinstance(error, EngineDead):
                        raise
                    log.error("an engine of the cluster did not start: %s", error.message)
                self._let_go()
                await asyncio.sleep(PAUSE)
        finally:
            self._let_go()

    def send(self, message: ToEngine) -> None:
        """As `Engine.send`."""
        if self.ready is not None:
            self._outgoing.append(message)
            self._more.set()

    def in_hand(self) -> tuple[int, ...]:
        """None is known of: what a distant engine draws is known by the steps it reports."""
        return ()

    async def _start(self, started: asyncio.Future[Ready]) -> None:
        """Has a machine start the engine, however long there is none with room.

        Raises:
            StartError: with the exit code that fits.
        """
        room = {"num_gpus": 1, "num_cpus": 0} if self.kind == "cuda" else {"num_cpus": 1}
        actor = ray.remote(Host).options(scheduling_strategy="SPREAD", **room)
        self._host = actor.remote(self.settings, self.kind, self.guard, flux_local.__version__)
        answering = asyncio.ensure_future(self._host.start.remote())
        placed = asyncio.ensure_future(self._host.place.remote())
        if not (await asyncio.wait([placed], timeout=ROOM_SOON))[0]:
            log.warning("no machine of the cluster has room for an engine on '%s'; waiting for one", self.kind)
        await placed
        (answer,) = _from_host.decode(await answering)
        if isinstance(answer, StartFailed):
            failed = StartError(answer.message)
            failed.exit_code = answer.exit_code
            raise failed
        assert isinstance(answer, Ready)
        self._life = 0
        self._begin(answer)
        if not started.done():
            started.set_result(answer)

    async def _serve(self) -> None:
        """Hands messages on, both ways, until the machine or the engine is gone for good.

        Raises:
            RayActorError, EngineDead: see there.
        """
        sending = asyncio.create_task(self._send_on())
        try:
            while True:
                for message in _from_host.decode(await self._host.receive.remote()):
                    match message:
                        case Ready():
                            self._begin(message)
                        case Fell():
                            self._fell(Fall(message.serials, message.inside))
                        case GivenUp():
                            raise EngineDead(message.message)
                        case _:
                            self.hooks.on_message(self, message)
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, RayActorError):
                await sending

    async def _send_on(self) -> None:
        """One call at a time: Ray promises no order among more."""
        while True:
            await self._more.wait()
            self._more.clear()
            now = time.monotonic()
            batch = [later(message, -now) for message in self._outgoing]
            self._outgoing.clear()
            await self._host.send.remote(self._life, _encode(batch))

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
        if host is not None:
            with contextlib.suppress(RayError, RuntimeError):
                ray.kill(host)


class Host:
    """The other end, an actor: one engine of its machine, under a supervisor."""

    def __init__(self, settings: dict[str, Any], kind: str, guard: Guard, version: str) -> None:
        # Ray sets it to 1 for what asks for one CPU; the engine's process should have the threads it has anywhere.
        os.environ.pop("OMP_NUM_THREADS", None)
        self.kind = kind
        beside = ["cuda:0"] * gpus_here() if kind == "cuda" else ["cpu"]
        self.settings = Settings(**settings | {"devices": ",".join(beside), "cluster": ""})
        self.guard = guard
        self.version = version
        self.supervisor: Supervisor | None = None
        self.running: asyncio.Task[None] | None = None
        self.owed: set[str] = set()
        self.life = 0
        self.news: list[FromHost] = []
        self.more = asyncio.Event()

    async def place(self) -> str:
        """The machine's name, as soon as there is one."""
        return socket.gethostname()

    async def start(self) -> bytes:
        """`Ready` once the engine is, or `StartFailed`."""
        try:
            if self.version != flux_local.__version__:
                raise StartError(
                    f"{socket.gethostname()} has flux-local {flux_local.__version__} and the server {self.version}. "
                    "Install the same everywhere."
                )
            folder = weights.find(self.settings.model)
            weights.verify(folder)
            hooks = Hooks(lambda engine: bool(self.owed), self.on_message, self.on_ready, self.on_fall)
            device = "cuda:0" if self.kind == "cuda" else "cpu"
            self.supervisor = Supervisor(folder, device, self.guard, hooks, self.settings.engine_options())
            started: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
            self.running = asyncio.create_task(self.supervisor.run(started))
            self.running.add_done_callback(self.on_end)
            return _encode([self.named(await started)])
        except StartError as error:
            return _encode([StartFailed(f"{error.message} (on {socket.gethostname()})", error.exit_code)])

    async def receive(self) -> bytes:
        """What has come from the engine since the last call, once there is something."""
        await self.more.wait()
        self.more.clear()
        news, self.news = self.news, []
        return _encode(news)

    async def send(self, life: int, encoded: bytes) -> None:
        """Messages for the engine, unless another has taken its place since: then they are placed anew."""
        if self.supervisor is None or life != self.life:
            return
        now = time.monotonic()
        for message in _to_engine.decode(encoded):
            match message:
                case Job():
                    self.owed.add(message.id)
                case Cancel():
                    self.owed.discard(message.id)
            self.supervisor.send(later(message, now))

    def tell(self, message: FromHost) -> None:
        self.news.append(message)
        self.more.set()

    def named(self, ready: Ready) -> Ready:
        return msgspec.structs.replace(ready, device=f"{socket.gethostname()} {ready.device}")

    def on_message(self, engine: Engine, message: FromEngine) -> None:
        if isinstance(message, (Done, Failed)):
            self.owed.discard(message.id)
        self.tell(message)

    def on_ready(self, engine: Engine) -> None:
        self.life += 1
        assert engine.ready is not None
        if self.life > 1:
            self.tell(self.named(engine.ready))

    def on_fall(self, engine: Engine, fall: Fall) -> None:
        self.owed.clear()
        self.tell(Fell(fall.serials, fall.inside))

    def on_end(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an engine of the cluster ended", exc_info=error)
            self.tell(GivenUp(error.message if isinstance(error, FluxError) else "An engine's guardian failed."))


def gpus_here() -> int:
    """Of this machine, as Ray counts them; at least one."""
    here = ray.get_runtime_context().get_node_id()
    return max(1, *(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == here), 1)


def brief(error: Exception) -> str:
    return str(error).partition("\n")[0]
