"""What the Makefile starts, started by it: the server of a newcomer's first minute, and the benchmarks."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from mini.drawings import WHOLE
from mini.judge import look
from PIL import Image

from tests.servers import ROOT, START_LIMIT, environment, eventually

pytestmark = pytest.mark.slow


def test_make_serve_prints_a_curl_line_that_draws_what_it_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ["make", "serve", "PORT=0", f"ARGS=--data-dir {tmp_path}/data"],
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    try:

        def line() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"^.*?(curl .*)$", log.read_text(), re.MULTILINE)
            return found and found[1]

        eventually(line, START_LIMIT)
        command = line()
        assert command is not None
        done = subprocess.run(["sh", "-c", command], check=True, capture_output=True, timeout=60)
        answer = json.loads(done.stdout)["data"][0]
        content = base64.b64decode(answer["b64_json"]) if "b64_json" in answer else httpx.get(answer["url"]).content
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    background, things = look(Image.open(io.BytesIO(content)), WHOLE)
    said = re.search(r"a (?:large )?(\w+) (\w+) on a (\w+) background", command)
    assert said, command
    assert [(thing.colour, thing.shape) for thing in things] == [(said[1], said[2])]
    assert background == said[3]


def test_the_benchmark_measures_the_server_against_the_bare_pipeline() -> None:
    found = measured("--requests", "3", "--concurrency", "1", "2")
    assert set(found["step_s"]) == {"flux-local", "diffusers"}
    assert 0 < found["bare_pipeline_s"] < found["start_to_ready_s"]
    assert found["added_s"] < found["server_s"]
    assert [found[f"concurrency_{clients}"]["clients"] for clients in (1, 2)] == [1, 2]


def test_the_benchmark_measures_the_server_against_a_plain_one() -> None:
    found = measured("--baseline", "--requests", "1", "--trace", "6")
    for figure in ("pictures_per_s", "trace_mean_s", "trace_p90_longest_s"):
        assert set(found[figure]) == {"plain", "flux-local"}
        assert all(value > 0 for value in found[figure].values())


def measured(*flags: str) -> dict[str, Any]:
    command = [sys.executable, ROOT / "scripts" / "bench.py", "--size", "128x128", "--steps", "2", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
