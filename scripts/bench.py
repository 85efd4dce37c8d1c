#!/usr/bin/env python3
"""Measures a flux-local server: latency and pictures a second, and what the server adds to the bare pipeline.

    scripts/bench.py                              start a server with the embedded model and measure it
    scripts/bench.py --url http://host:8000       measure a server that runs

The bare pipeline (prompt to PNG in one process, no HTTP, no queue) is measured first, as the floor, where this script
starts the server itself. The last line is one JSON document. Times are wall-clock seconds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PROMPT = "a large red star on a blue background"


def options() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--url", help="a server that runs; otherwise one is started")
    p.add_argument("--key", default=os.environ.get("FLUX_LOCAL_BENCH_KEY"), help="its API key [FLUX_LOCAL_BENCH_KEY]")
    p.add_argument("--model", default="flux-krea-mini", help="model for a server of our own")
    p.add_argument("--device", default="auto", help="its device")
    p.add_argument("--size", default="512x512")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--requests", type=int, default=32, help="measured requests for each concurrency (default 32)")
    p.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    return p.parse_args()


def bare(o: argparse.Namespace) -> Callable[[int], None]:
    """One picture from prompt to PNG bytes without a server, through the functions that the server uses."""
    from flux_local import images, params, weights
    from flux_local.engine import pick_device
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


def prompt_of(seed: int) -> str:
    """Another prompt for each picture, so that no cache answers."""
    return f"{PROMPT} {seed}"


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@contextlib.contextmanager
def own_server(o: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Address and seconds to ready of a server on a free port, ended afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        environment = {n: v for n, v in os.environ.items() if not n.startswith("FLUX_LOCAL_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "flux_local", "serve", "--port", "0", "--data-dir", folder, "--model", o.model,
             "--device", o.device],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if found := re.search(r"address\s+(\S+)/v1", line):
                    yield found[1], time.perf_counter() - began
                    return
            raise SystemExit("the server did not start; `flux-local serve` shows why")
        finally:
            process.terminate()
            process.wait()


def measure(o: argparse.Namespace, url: str, concurrency: int) -> dict[str, float]:
    """Latency and throughput of `requests` pictures with so many clients at once."""
    headers = {"authorization": f"Bearer {o.key}"} if o.key else {}
    body: dict[str, Any] = {"size": o.size, "steps": o.steps, "response_format": "b64_json"}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    with (
        httpx.Client(base_url=url, headers=headers, timeout=600, limits=limits) as client,
        concurrent.futures.ThreadPoolExecutor(concurrency) as pool,
    ):

        def one(seed: int) -> float:
            def call() -> None:
                answer = client.post(
                    "/v1/images/generations", json={**body, "prompt": prompt_of(seed), "seed": abs(seed)}
                )
                answer.raise_for_status()

            return timed(call)

        list(pool.map(one, range(-concurrency, 0)))  # warm-up: connections, caches, first shapes
        began = time.perf_counter()
        seconds = sorted(pool.map(one, range(max(o.requests, concurrency))))
        total = time.perf_counter() - began
    return {
        "p50_s": statistics.median(seconds),
        "p95_s": seconds[min(len(seconds) - 1, round(0.95 * len(seconds)))],
        "pictures_per_s": len(seconds) / total,
    }


def main() -> None:
    o = options()
    console = Console(stderr=False)
    result: dict[str, Any] = {"size": o.size, "steps": o.steps, "requests": o.requests, "cpu": platform.processor()}
    console.print(f"{o.size}, {o.steps} steps, {o.requests} requests for each row")
    with contextlib.ExitStack() as stack:
        if o.url:
            url = o.url.rstrip("/").removesuffix("/v1")
        else:
            draw = bare(o)
            for seed in range(3):
                draw(seed)
            result["bare_pipeline_s"] = statistics.median(timed(partial(draw, seed)) for seed in range(o.requests))
            console.print(f"bare pipeline, prompt to PNG in one process: {1e3 * result['bare_pipeline_s']:.1f} ms")
            url, result["start_to_ready_s"] = stack.enter_context(own_server(o))
            console.print(f"start to ready: {result['start_to_ready_s']:.1f} s")
        table = Table("clients", "p50", "p95", "pictures/s", "over the bare pipeline")
        for concurrency in o.concurrency:
            row = measure(o, url, concurrency)
            added = ""
            if concurrency == 1 and "bare_pipeline_s" in result:
                row["added_s"] = row["p50_s"] - result["bare_pipeline_s"]
                added = f"+{1e3 * row['added_s']:.1f} ms"
            result[f"concurrency_{concurrency}"] = row
            shown = (f"{1e3 * row['p50_s']:.0f} ms", f"{1e3 * row['p95_s']:.0f} ms", f"{row['pictures_per_s']:.2f}")
            table.add_row(str(concurrency), *shown, added)
        console.print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
