"""The training script, from nothing to a folder that serves, in as few steps as will run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_trains_goes_on_exports_and_evaluates(tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    command = [sys.executable, ROOT / "scripts" / "train_mini.py", "--out", folder, "--work", work]

    def run(*flags: str) -> str:
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--scale", "0.001", "--eager")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    first, vocabulary = weights.read_bytes(), tokenizer.read_bytes()
    weights.unlink()
    run("--scale", "0.001", "--eager")
    assert weights.read_bytes() == first, "a run that has ended must not train on"
    assert tokenizer.read_bytes() == vocabulary, "another process gives the words the same numbers"
    output = run("--evaluate", "--brief", "--count", "6", "--canvases", "128x128", "--steps", "2")
    assert "128x128" in output
    assert (folder / "samples.png").stat().st_size > 1000
