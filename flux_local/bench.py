"""What a server's clients see of its speed: latency and pictures a second, at so many clients at once.

Measures a server that runs, or one of its own. Speaks HTTP to it as any client does, and knows nothing of its inside.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import httpx
from rich.table import Table

from flux_local.config import PREFIX
from flux_local.errors import StartError

PATIENCE = 1800.0
"""Seconds for which an answer is waited for: what a server itself gives a request."""


@dataclass(frozen=True)
class Row:
    """What so many clients, each with one request at a time, got."""

    clients: int
    p50_s: float
    p95_s: float
    pictures_per_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all lie below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * len(ordered)))]


def timed(call: Callable[[], object]) -> float:
    """Wall-clock seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def client_of(url: str, key: str | None, connections: int) -> httpx.Client:
    """A client that keeps as many connections open; `url` with or without `/v1`."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
    address = url.rstrip("/").removesuffix("/v1")
    return httpx.Client(base_url=address, headers=headers, timeout=PATIENCE, limits=limits)


def ready(client: httpx.Client) -> dict[str, Any]:
    """What the server says of itself.

    Raises:
        StartError: nothing answers there, or no flux-local that is ready.
    """
    try:
        answer = client.get("/ready")
    except httpx.HTTPError as error:
        raise StartError(
            f"Nothing answers at {client.base_url} ({error}). Start a server with `flux-local serve`, or leave --url "
            "away to have one started."
        ) from error
    if answer.status_code != 200:
        raise StartError(f"The server at {client.base_url} is not ready: {said(answer)}")
    with contextlib.suppress(ValueError):
        found = answer.json()
        if isinstance(found, dict) and {"model", "device", "precisions"} <= found.keys():
            return found
    raise StartError(f"What answers at {client.base_url} is no flux-local. Name the address of one with --url.")


def requester(client: httpx.Client, body: Mapping[str, Any]) -> Callable[[int], None]:
    """One request for a number: a prompt of its own, so that no cache answers, and its own seed."""

    def request(number: int) -> None:
        own = {"seed": abs(number), **body, "prompt": f"{body['prompt']} {number}", "response_format": "b64_json"}
        try:
            answer = client.post("/v1/images/generations", json=own)
        except httpx.HTTPError as error:
            raise StartError(f"The server broke off ({error}). Look at its log, and measure again.") from error
        if answer.status_code != 200:
            raise StartError(f"The server refused a request ({answer.status_code}): {said(answer)}")

    return request


def said(answer: httpx.Response) -> str:
    """The message of an error in OpenAI's form, or the answer's beginning."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(answer.json()["error"]["message"])
    return answer.text[:200]


def measure(url: str, key: str | None, body: Mapping[str, Any], clients: int, requests: int) -> Row:
    """Latency and throughput of `requests` requests, or one for each client if those are more, after a warm-up."""
    count = max(requests, clients)
    with client_of(url, key, clients) as client, ThreadPoolExecutor(clients) as pool:
        request = requester(client, body)

        def one(number: int) -> float:
            return timed(partial(request, number))

        list(pool.map(one, range(-clients, 0)))  # connections, caches, first shapes
        began = time.perf_counter()
        seconds = list(pool.map(one, range(count)))
        total = time.perf_counter() - began
    pictures = count * int(body.get("n", 1))
    return Row(clients, statistics.median(seconds), percentile(seconds, 0.95), pictures / total)


def run(
    body: Mapping[str, Any],
    concurrency: Sequence[int],
    requests: int,
    flags: Sequence[str],
    url: str | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """The server's word on itself and a `Row` for each concurrency, as one document.

    Args:
        body: a request's parameters, its prompt among them.
        flags: those that a server of our own is started with.
        url: a server that runs, and `key`, its API key; without it, one is started.

    Raises:
        StartError: there is no server to measure, or it refuses the requests.
    """
    result: dict[str, Any] = {"request": dict(body)}
    with contextlib.ExitStack() as stack:
        if url is None:
            url, result["start_to_ready_s"] = stack.enter_context(own_server(flags))
            key = None
        with client_of(url, key, 1) as client:
            result["server"] = ready(client)
        return result | {"rows": [asdict(measure(url, key, body, clients, requests)) for clients in concurrency]}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows for people."""
    shown = Table("clients", "p50", "p95", "pictures/s")
    for row in rows:
        shown.add_row(
            str(row["clients"]), f"{row['p50_s']:.3f} s", f"{row['p95_s']:.3f} s", f"{row['pictures_per_s']:.2f}"
        )
    return shown


@contextlib.contextmanager
def own_server(flags: Sequence[str]) -> Iterator[tuple[str, float]]:
    """A server on a free port of this machine, with a data folder of its own; ended afterwards.

    Args:
        flags: of `flux-local serve`; what is set in no flag has its default, whatever the environment says.

    Yields:
        Its address, and the seconds from its start to its being ready.

    Raises:
        StartError: it did not start; with the last that it said.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "flux_local", "serve", *flags, "--host", "127.0.0.1", "--port", "0", "--data-dir",
             folder],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"address\s+(\S+)/v1", line):
                    yield found[1], time.perf_counter() - began
                    return
            process.wait()
            log.seek(0)
            last = (log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise StartError(f"No server to measure: {last.removeprefix('flux-local: ')}")
        finally:
            process.terminate()
            process.wait()
