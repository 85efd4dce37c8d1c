#!/usr/bin/env python3
"""What `flux-local bench` measures, with what it is measured against beside it: for those who work on the server.

    scripts/bench.py                              a server of its own, and the bare pipeline
    scripts/bench.py --baseline                   against a plain loop over diffusers behind HTTP

The bare pipeline (prompt to PNG in one process, no HTTP, no queue) is the floor: it and a lone client's requests take
turns, picture by picture, and what the server adds is the median of the differences, so that a machine whose speed
drifts drifts for both. The last line is one JSON document. Times are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from flux_local.model.denoiser import Denoiser, Picture

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from flux_local import bench  # noqa: E402
from flux_local.bench import percentile, timed  # noqa: E402

PROMPT = "a large red star on a blue background"
TRACE_SIDES = (128, 160, 192)
PAUSE = 0.05
"""Seconds before each of two that take turns: OpenMP's threads spin for some milliseconds after their last work, on the
cores of whoever comes next."""


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="flux-krea-mini")
    p.add_argument("--device", default="auto")
    p.add_argument("--size", default="512x512")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--requests", type=int, default=32, help="measured requests for each concurrency (default 32)")
    p.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    p.add_argument("--baseline", action="store_true", help="compare with scripts/baseline.py: a full house, a trace")
    p.add_argument("--trace", type=int, default=80, help="requests of the trace (default 80)")
    return p.parse_args()


def bare(o: argparse.Namespace) -> Callable[[int], None]:
    """One picture from prompt to PNG bytes without a server, through the functions that the server uses."""
    from flux_local import images, params, weights
    from flux_local.engine_process import pick_device
    from flux_local.model.loader import load

    folder = weights.find(o.model)
    checked = params.generation_params(
        {"prompt": PROMPT, "size": o.size, "steps": o.steps, "seed": 0}, weights.info(folder)
    )
    pipeline = load(folder, pick_device(o.device))

    def draw(seed: int) -> None:
        prompt = pipeline.text.encode(prompt_of(seed))
        picture = pipeline.begin(prompt, *checked.canvas, seed=seed, steps=checked.steps, guidance=checked.guidance)
        while picture.steps_left:
            pipeline.denoiser.advance([picture])
        pixels = pipeline.vae.decode(picture.latents, *checked.canvas)
        text = images.parameters_text(checked, seed, o.model)
        images.encode(images.delivered(pixels, checked.canvas, checked.delivered), checked, text)

    return draw


def step_seconds(o: argparse.Namespace, times: int = 40) -> dict[str, float]:
    """A denoising step of one picture through our transformer and through diffusers' own, in turns: the medians."""
    from flux_local import params, weights
    from flux_local.engine_process import pick_device
    from flux_local.model.loader import load

    folder = weights.find(o.model)
    canvas = params.generation_params({"prompt": PROMPT, "size": o.size}, weights.info(folder)).canvas
    taken: dict[str, list[float]] = {"flux-local": [], "diffusers": []}
    drawing = []
    for name in taken:
        pipeline = load(folder, pick_device(o.device), "full", reference=name == "diffusers")
        prompt = pipeline.text.encode(PROMPT)
        picture = pipeline.begin(prompt, *canvas, seed=0, steps=times + 3, guidance=4.5)
        drawing.append((taken[name], partial(one_step, pipeline.denoiser, picture)))
    for i in range(times + 3):
        for seconds, advance in drawing:
            took = timed(advance)
            if i >= 3:
                seconds.append(took)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def one_step(denoiser: Denoiser, picture: Picture) -> None:
    denoiser.advance([picture])
    denoiser.pace.finish()


def prompt_of(seed: int) -> str:
    """Another prompt for each picture, so that no cache answers."""
    return f"{PROMPT} {seed}"


def body_of(o: argparse.Namespace) -> dict[str, Any]:
    return {"prompt": PROMPT, "size": o.size, "steps": o.steps}


def own_server(o: argparse.Namespace) -> contextlib.AbstractContextManager[tuple[str, float]]:
    """Address and seconds to ready of a server with nothing set but its model and its device."""
    return bench.own_server(["--model", o.model, "--devices", o.device])


def added(o: argparse.Namespace, draw: Callable[[int], None], url: str) -> dict[str, float]:
    """The bare pipeline and a lone client in turns, each after a pause."""

    def rested(call: Callable[[], None]) -> float:
        time.sleep(PAUSE)
        return timed(call)

    with bench.client_of(url, None, 1) as client:
        request = bench.requester(client, body_of(o))
        for seed in range(-3, 0):
            draw(seed)
            request(seed)
        pairs = [(rested(partial(draw, seed)), rested(partial(request, seed))) for seed in range(o.requests)]
    return {
        "bare_pipeline_s": statistics.median(b for b, _ in pairs),
        "server_s": statistics.median(s for _, s in pairs),
        "added_s": statistics.median(s - b for b, s in pairs),
    }


@contextlib.contextmanager
def baseline_server(o: argparse.Namespace) -> Iterator[str]:
    """The address of a plain server over the same model."""
    from flux_local import weights

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "scripts" / "baseline.py"), str(weights.find(o.model)), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                httpx.get(url + "/openapi.json")
                break
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Arrival:
    """A request of a trace, `at` seconds after its beginning."""

    at: float
    size: str
    steps: int
    seed: int


def trace(count: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Poisson arrivals of mixed work: 4 to 50 steps, three canvases."""
    rng = random.Random(seed)
    at, found = 0.0, []
    for i in range(count):
        at += rng.expovariate(rate)
        side = rng.choice(TRACE_SIDES)
        found.append(Arrival(at, f"{side}x{side}", rng.choice((4, 8, 12, 20, 28, 50)), i))
    return found


def replay(url: str, arrivals: list[Arrival]) -> list[float]:
    """Each request's seconds from its arrival to its answer."""

    async def run() -> list[float]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

            async def one(a: Arrival) -> float:
                await asyncio.sleep(a.at)
                began = time.perf_counter()
                body = {"prompt": prompt_of(a.seed), "size": a.size, "steps": a.steps, "seed": a.seed}
                answer = await client.post("/v1/images/generations", json={**body, "response_format": "b64_json"})
                answer.raise_for_status()
                return time.perf_counter() - began

            return list(await asyncio.gather(*map(one, arrivals)))

    return asyncio.run(run())


def compare(o: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The same work to flux-local and to the plain server, one after the other, in one run."""
    full = argparse.Namespace(**{**vars(o), "size": "128x128", "steps": 16, "requests": max(64, o.requests)})
    found: dict[str, Any] = {}
    lone = [Arrival(0.0, a.size, a.steps, a.seed) for a in trace(18, 1.0, seed=1)]
    with baseline_server(o) as plain, own_server(o) as (ours, _):
        for url in (plain, ours):
            replay(url, [Arrival(0.0, f"{side}x{side}", 2, 0) for side in TRACE_SIDES])  # warm-up
        rows = {
            name: bench.measure(url, None, body_of(full), 16, full.requests)
            for name, url in (("plain", plain), ("flux-local", ours))
        }
        service = statistics.mean(replay(plain, [a])[0] for a in lone)
        arrivals = trace(o.trace, 0.8 / service)
        seconds = {name: replay(url, arrivals) for name, url in (("plain", plain), ("flux-local", ours))}
    costs = [a.steps * int(a.size.split("x")[0]) ** 2 for a in arrivals]
    longest = [i for i, cost in enumerate(costs) if cost >= percentile([float(c) for c in costs], 0.8)]
    table = Table("128x128, 16 steps, 16 clients; then a trace at 80% of the plain server's capacity", *seconds)
    found["pictures_per_s"] = {name: row.pictures_per_s for name, row in rows.items()}
    found["trace_mean_s"] = {name: statistics.mean(s) for name, s in seconds.items()}
    found["trace_p90_longest_s"] = {name: percentile([s[i] for i in longest], 0.9) for name, s in seconds.items()}
    for name, row in found.items():
        table.add_row(name, *(f"{row[server]:.3f}" for server in seconds))
    console.print(table)
    return {**found, "trace_requests": o.trace, "trace_rate_per_s": 0.8 / service}


def main() -> None:
    o = options()
    console = Console(stderr=False)
    result: dict[str, Any] = {"size": o.size, "steps": o.steps, "requests": o.requests, "cpu": cpu()}
    if o.baseline:
        print(json.dumps({"cpu": cpu(), **compare(o, console)}))
        return
    console.print(f"{o.size}, {o.steps} steps, {o.requests} requests for each row, {result['cpu']}")
    draw = bare(o)
    result["step_s"] = step_seconds(o)
    steps = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in result["step_s"].items())
    console.print(f"a step of one picture, in turns: {steps}")
    with own_server(o) as (url, result["start_to_ready_s"]):
        result |= added(o, draw, url)
        console.print(f"bare pipeline, prompt to PNG in one process: {1e3 * result['bare_pipeline_s']:.1f} ms")
        console.print(
            f"the same from the server, in turns: {1e3 * result['server_s']:.1f} ms, {1e3 * result['added_s']:+.1f} ms"
        )
        console.print(f"start to ready: {result['start_to_ready_s']:.1f} s")
        rows = [asdict(bench.measure(url, None, body_of(o), clients, o.requests)) for clients in o.concurrency]
    console.print(bench.table(rows))
    print(json.dumps(result | {f"concurrency_{row['clients']}": row for row in rows}))


def cpu() -> str:
    """The processor's name and the number of cores this process may use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{len(os.sched_getaffinity(0))} cores of {line.partition(':')[2].strip()}"
    return f"{os.cpu_count()} cores, {platform.machine()}"


if __name__ == "__main__":
    main()
