"""A cluster's other end: an engine on this machine under the supervisor that any has, and what it says of it.

`cluster` has it run as an actor of Ray's and calls it. It keeps nothing that a lost machine could take with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from typing import Any

import msgspec

import flux_local
from flux_local import weights
from flux_local.config import Settings
from flux_local.errors import FluxError, StartError
from flux_local.messages import Cancel, Done, Failed, FromEngine, Job, Ready, StartFailed, ToEngine, later
from flux_local.supervisor import Engine, Fall, Guard, Hooks, Supervisor

BEAT = 2.0
"""Seconds within which a host says something, if only that it is there."""

log = logging.getLogger("flux_local.cluster")


class Fell(msgspec.Struct, frozen=True, tag=True):
    """As `Fall`; the engine's supervisor is starting another."""

    serials: tuple[int, ...] | None
    inside: bool


class GivenUp(msgspec.Struct, frozen=True, tag=True):
    """There will be no other."""

    message: str


FromHost = FromEngine | Fell | GivenUp

encode = msgspec.msgpack.Encoder().encode
_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
from_host = msgspec.msgpack.Decoder(list[FromHost]).decode


class Host:
    """The actor: one engine of its machine, under a supervisor."""

    def __init__(self, settings: dict[str, Any], kind: str, guard: Guard, version: str) -> None:
        if os.environ.get("OMP_NUM_THREADS") == "1":  # Ray's, for what asks for one CPU
            del os.environ["OMP_NUM_THREADS"]
        self.settings = settings
        self.kind = kind
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
            settings = Settings(**self.settings)
            if (
                self.kind == "cuda"
            ):  # Ray shows an engine its own GPU alone; memory is shared with those of this machine
                settings = msgspec.structs.replace(settings, devices=",".join(["cuda:0"] * gpus_here()))
            folder = weights.find(settings.model)
            weights.verify(folder)
            hooks = Hooks(lambda engine: bool(self.owed), self.on_message, self.on_ready, self.on_fall)
            device = "cuda:0" if self.kind == "cuda" else "cpu"
            self.supervisor = Supervisor(folder, device, self.guard, hooks, settings.engine_options())
            started: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
            self.running = asyncio.create_task(self.supervisor.run(started))
            self.running.add_done_callback(self.on_end)
            return encode([self.named(await started)])
        except StartError as error:
            return encode([StartFailed(f"{error.message} (on {socket.gethostname()})", error.exit_code)])

    async def receive(self) -> bytes:
        """What has come from the engine since the last call, once there is something, or nothing after BEAT."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BEAT):
                await self.more.wait()
        self.more.clear()
        news, self.news = self.news, []
        return encode(news)

    async def send(self, life: int, encoded: bytes) -> None:
        """Messages for the engine, unless it has fallen since: then they are placed anew."""
        if self.supervisor is None or self.supervisor.ready is None or life != self.life:
            return
        now = time.monotonic()
        for message in _to_engine(encoded):
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
    import ray

    here = ray.get_runtime_context().get_node_id()
    return max([1, *(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["NodeID"] == here)])
