"""The GPU proof's script, at toy sizes on the CPU, with no more installed than it says it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, environment

SCRIPT = ROOT / "scripts" / "gpu_check.py"
LOADS = ROOT / "scripts" / "load_check.py"
NOT_THERE = ("fastapi", "starlette", "uvicorn", "msgspec", "multipart", "rich", "sentencepiece", "httpx", "openai")


@pytest.mark.timeout(300)
def test_runs_on_a_bare_machine(tmp_path: Path) -> None:
    out = f"{tmp_path}/report.json"
    hide = f"import sys, runpy; sys.modules.update(dict.fromkeys({NOT_THERE!r})); "
    run = (
        f"sys.argv = ['gpu_check.py', '--device', 'cpu', '--small', '--out', {out!r}]; runpy.run_path({str(SCRIPT)!r}, "
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{hide}{run}run_name='__main__')"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    with open(out) as file:
        assert json.load(file) == printed
    assert printed["failures"] == []
    assert printed["environment"]["small"] is True
    assert {check["name"] for check in printed["checks"]} == {
        "velocity at 48² against fp32", "velocity at 48² in fp8 against ours", "each block's contribution in fp8",
        "velocity at 48² in fp8, attention too, against ours", "velocity at 64×32 against plain operations",
        "velocity at 64×32 in fp8, 77 tokens of text, against plain operations",
    }  # fmt: skip
    assert printed["timings"]["step_ms"]["ours 64"]["1"] > 0
    assert printed["timings"]["picture_s"]["64² fp8, attention torch, acceleration high"] > 0
    assert printed["timings"]["picture_s"]["64² fp8, attention fp8 emulated, acceleration high"] > 0
    assert printed["floor"]["64"]["least_ms"] > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_way_to_load_is_measured(tmp_path: Path) -> None:
    """`scripts/load_check.py`: a process for each, all five, adapters where they can be changed."""
    command = [sys.executable, str(LOADS), "--device", "cpu", "--small", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["tier"]: one for one in json.loads(done.stdout.splitlines()[-1])["loads"]}
    assert list(found) == ["both", "full", "fp8", "swap", "offload"]
    assert all(one["load_s"] > 0 and one["gb"] > 0 and one["host_gb"] >= 0 for one in found.values())
    assert {tier for tier, one in found.items() if "switch_s" in one} == {"both", "fp8", "swap"}
    assert found["both"]["switch_s"]["held"] > 0
    assert list(tmp_path.iterdir()) == [], "it cleans up"


@pytest.mark.parametrize("script", [SCRIPT, LOADS])
def test_without_a_gpu_it_says_so(script: Path) -> None:
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment())
    assert done.returncode == 2
    assert "--device cpu --small" in done.stderr
