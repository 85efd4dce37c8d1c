"""`flux-local prepare`: the same pictures from what it writes, used as long as it fits, and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_local.errors import WeightsError
from flux_local.model import prepared
from flux_local.model.checkpoint import identify
from flux_local.model.fp8 import Fp8Linear, conversion
from flux_local.model.geometry import Geometry
from flux_local.model.layers import Layers
from flux_local.model.loader import load, weights_of
from flux_local.model.ops import Ops
from flux_local.model.prepared import PreparedLayers, Target
from flux_local.model.transformer import FluxTransformer
from tests.servers import MODEL, ROOT, environment, pictures, running
from tests.test_formats import drawn

BODY = {"prompt": "a large red star", "size": "128x128", "steps": 4, "seed": 1, "response_format": "b64_json"}


def prepare(cache: Path, model: Path = MODEL) -> str:
    command = [sys.executable, "-m", "flux_local", "prepare", "--model", str(model), "--cache-dir", str(cache)]
    done = subprocess.run(
        [*command, "--devices", "cpu"], capture_output=True, text=True, cwd=ROOT, env=environment(), check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    said = prepare(cache)
    assert "s a GB" in said
    assert str(next(cache.iterdir())) in said
    return cache


@pytest.mark.parametrize("tier", ["fp8", "swap"])
def test_the_same_picture(tier: str, cache: Path) -> None:
    plain, ready = load(MODEL, tier=tier), load(MODEL, tier=tier, cache=cache)  # type: ignore[arg-type]
    assert (plain.plan.prepared, ready.plan.prepared) == (False, True)
    assert np.array_equal(drawn(ready), drawn(plain))


def test_every_layer_is_there_to_the_bit_where_products_are_in_fp8(tmp_path: Path) -> None:
    """As on a GPU: the same e4m3 numbers, scales and parts."""
    checkpoint = identify(MODEL)
    geometry, weights = Geometry.of(checkpoint.config("transformer")), weights_of(checkpoint, "cpu")
    folder = prepared.write(tmp_path, checkpoint, weights, torch.float32)
    convert, native = conversion(torch.device("cpu"), Ops(), native=True)
    target = Target("cpu", native, Ops().quantised, modulation_on_host=False)
    expected = FluxTransformer(geometry, Layers(weights, convert), fp8=True)
    found = FluxTransformer(geometry, PreparedLayers(folder, target), fp8=True)
    count = 0
    for ours, theirs in zip(found.linears(), expected.linears(), strict=True):
        assert (type(ours), ours.parts) == (type(theirs), theirs.parts)
        assert torch.equal(ours.weight.float(), theirs.weight.float())
        assert torch.equal(ours.bias, theirs.bias)
        if isinstance(theirs, Fp8Linear):
            assert isinstance(ours, Fp8Linear)
            assert torch.equal(ours.scale, theirs.scale)
            count += 1
    assert count == 8 * geometry.double_blocks + 2 * geometry.single_blocks
    assert torch.equal(found.doubles[0].norm, expected.doubles[0].norm)
    assert torch.equal(found.singles[-1].norm, expected.singles[-1].norm)


def test_served(cache: Path, tmp_path: Path) -> None:
    with running(tmp_path, "--memory", "fp8", "--cache-dir", str(cache)) as server:
        assert "; as prepared" in server.output
        first = pictures(server.post(BODY))
    (tmp_path / "again").mkdir()
    with running(tmp_path / "again", "--memory", "fp8", "--cache-dir", str(tmp_path / "none")) as server:
        assert "; as prepared" not in server.output
        assert pictures(server.post(BODY)) == first


def test_another_model_does_not_find_it(cache: Path, tmp_path: Path) -> None:
    assert prepared.find(cache, identify(MODEL), torch.float32) is not None
    assert prepared.find(cache, identify(MODEL), torch.bfloat16) is None
    other = tmp_path / "model"
    shutil.copytree(MODEL, other)
    assert prepared.find(cache, identify(other), torch.float32) is not None, "a copy with its times is the same"
    (file,) = (other / "transformer").glob("*.safetensors")
    file.touch()
    assert prepared.find(cache, identify(other), torch.float32) is None


def test_a_file_with_the_same_size_and_time_is_looked_into(tmp_path: Path) -> None:
    shutil.copytree(MODEL, other := tmp_path / "model")
    (file,) = (other / "transformer").glob("*.safetensors")
    before, state = prepared.fingerprint(identify(other), torch.float32), file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert prepared.fingerprint(identify(other), torch.float32) != before


def test_where_it_cannot_be_written_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "flux_local", "prepare", "--devices", "cpu", "--cache-dir", tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 4
    assert "--cache-dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_not_whole_is_not_used(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, copy := tmp_path / "cache")
    (folder,) = copy.iterdir()
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="flux-local prepare"):
        prepared.find(copy, identify(MODEL), torch.float32)
    file.write_bytes(whole)
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index[:50])
    with pytest.raises(WeightsError, match="damaged"):
        prepared.find(copy, identify(MODEL), torch.float32)
    (folder / "index.json").unlink()
    assert prepared.find(copy, identify(MODEL), torch.float32) is None, "a run that was stopped"
    prepare(copy)
    assert prepared.find(copy, identify(MODEL), torch.float32) == folder


@pytest.mark.slow
def test_no_more_than_a_shard_is_held(tmp_path: Path) -> None:
    """FLUX.1's widths with three blocks of each kind, 3 GB in three shards: what is held beside the libraries stays
    under 1.3 shards."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.shards", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env=environment(PYTHONPATH="scripts"),
    )
    figures = json.loads(done.stdout)
    assert figures["total"] > 2.5 * figures["largest"]
    assert figures["held"] < 1.3 * figures["largest"], figures
