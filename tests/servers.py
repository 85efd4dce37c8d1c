"""Starts real server processes for tests, on free ports, with data directories of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "weights" / "flux-krea-mini"
START_LIMIT = 150.0
NOTHING_OF_THE_USERS = {"FLUX_LOCAL_SAFETY_MODEL": "no-checker", "FLUX_LOCAL_LORAS_DIR": "no-adapters",
                        "FLUX_LOCAL_CACHE_DIR": "no-cache"}  # fmt: skip


@dataclass
class Server:
    """A server that is ready, or a process that has ended."""

    process: subprocess.Popen[str]
    log: Path
    url: str = ""

    @property
    def output(self) -> str:
        return self.log.read_text()

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        """The official client, without its own retries, so that a failure shows."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)  # type: ignore[arg-type]

    def post(self, body: object, path: str = "/v1/images/generations", **options: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, **{"timeout": 150, **options})  # type: ignore[arg-type]

    def engine(self) -> psutil.Process:
        """The engine process."""
        return self.engines()[0]

    def engines(self) -> list[psutil.Process]:
        """All engine processes that live."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                if "flux_local.engine_process" in child.cmdline():
                    found.append(child)
        return found

    def wait_ready(self, limit: float = START_LIMIT) -> None:
        eventually(lambda: httpx.get(self.url + "/ready").status_code == 200, limit)


def environment(**extra: str) -> dict[str, str]:
    """The process's own, without settings that somebody may have exported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLUX_LOCAL_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **NOTHING_OF_THE_USERS, **extra}


@contextlib.contextmanager
def started(folder: Path, *flags: str, command: list[str] | None = None, **env: str) -> Iterator[Server]:
    """`flux-local serve` with these flags; yields at once, and ends the process afterwards."""
    log = folder / "server.log"
    command = command or [sys.executable, "-m", "flux_local"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "serve", "--port", "0", "--data-dir", str(folder / "data"), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=environment(**({"PYTHONPATH": str(ROOT)} if command[0] == sys.executable else {}), **env),
        )
    try:
        yield Server(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(folder: Path, *flags: str, **options: object) -> Iterator[Server]:
    """As `started`, but ready."""
    with started(folder, *flags, **options) as server:  # type: ignore[arg-type]

        def address() -> bool:
            assert server.process.poll() is None, server.output
            return "address" in server.output

        try:
            eventually(address, START_LIMIT)
        except AssertionError:
            raise AssertionError(f"it was not ready after {START_LIMIT:.0f} s:\n{server.output}") from None
        found = re.search(r"address\s+(http://\S+)/v1", server.output)
        assert found, server.output
        server.url = found[1]
        yield server


def eventually(condition: object, limit: float = 30.0) -> None:
    """Waits until the condition holds; fails the test when the limit has passed."""
    deadline = time.monotonic() + limit
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def leaving_after(
    server: Server, body: object, condition: object, headers: dict[str, str] | None = None, tail: bytes = b""
) -> None:
    """Sends a request for pictures and, as soon as the condition holds, the tail, and closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = {"host": host, "content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST /v1/images/generations HTTP/1.1\r\n{lines}\r\n".encode() + content)
        eventually(condition)
        connection.sendall(tail)


def pictures(answer: httpx.Response) -> list[str]:
    """The base64 of all pictures of a good answer."""
    assert answer.status_code == 200, answer.text
    return [item["b64_json"] for item in answer.json()["data"]]
