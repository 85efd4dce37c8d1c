"""Weights that are not whole stop the start at once, with the file's name."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flux_local import weights
from flux_local.errors import WeightsError
from tests.servers import MODEL, ROOT, environment

SHARD = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(MODEL, copy)
    return copy


def test_the_embedded_model_is_whole() -> None:
    weights.verify(MODEL)


@pytest.mark.parametrize("keep", [0, 4, 8, 1000, -1])
def test_a_cut_file(folder: Path, keep: int) -> None:
    path = folder / "transformer" / SHARD
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=SHARD):
        weights.verify(folder)


def test_a_file_with_something_after_it(folder: Path) -> None:
    with (folder / "vae" / SHARD).open("ab") as file:
        file.write(b"more")
    with pytest.raises(WeightsError, match="header says"):
        weights.verify(folder)


def test_a_shard_that_an_index_names(folder: Path) -> None:
    index = folder / "transformer" / f"{SHARD}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": SHARD, "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match="00002-of-00002"):
        weights.verify(folder)
    index.write_text(json.dumps({"weight_map": {"proj_out.weight": SHARD, "proj_out.more": SHARD}}))
    with pytest.raises(WeightsError, match=r"lacks the tensor proj_out\.more"):
        weights.verify(folder)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="index"):
        weights.verify(folder)


def test_a_tensor_that_other_blocks_have(folder: Path) -> None:
    path, name = folder / "transformer" / SHARD, "single_transformer_blocks.2.proj_mlp.weight"
    state = load_file(path)
    del state[name]
    save_file(state, path)
    with pytest.raises(WeightsError, match=re.escape(name)):
        weights.verify(folder)


@pytest.mark.alone
def test_the_start_ends_at_once_with_4(folder: Path, tmp_path: Path) -> None:
    path = folder / "text_encoder_2" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    command = [sys.executable, "-m", "flux_local", "serve", "--port", "0", "--model", str(folder), "--data-dir"]
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [*command, str(tmp_path / "data")], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60
        )
        seconds.append(time.monotonic() - began)
        assert done.returncode == 4
        assert "text_encoder_2/model.safetensors" in done.stderr
    assert min(seconds) < 3
