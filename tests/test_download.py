"""`flux-local download` against a hub on loopback that cuts, lies and refuses."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import COMMIT, REPOSITORY, STRANGER, TOKEN, Hub, running
from tests.servers import MODEL, ROOT

BIG = "transformer/diffusion_pytorch_model.safetensors"


def embedded() -> Hub:
    """The embedded model as a repository, with what a hub's repository holds besides."""
    files = {str(p.relative_to(MODEL)): p.read_bytes() for p in MODEL.rglob("*") if p.is_file()}
    files = {name: data for name, data in files.items() if name != "flux-local.json"}
    extra = {"single-file.safetensors": b"s" * 50_000, "LICENSE.md": b"terms", "example.png": b"p" * 9,
             "vae/model.bin": b"pickle", "transformer/model.onnx": b"o"}  # fmt: skip
    return Hub(files | extra)


def command(hub_url: str, home: Path, *arguments: str | Path, token: str = "") -> subprocess.CompletedProcess[str]:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("FLUX_LOCAL_", "HF_"))}
    environment |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home / "hub-home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-m", "flux_local", *arguments],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def download(hub: Hub, folder: Path, *flags: str, token: str = "") -> subprocess.CompletedProcess[str]:
    return command(hub.url, folder.parent, "download", REPOSITORY, "--to", folder, *flags, token=token)


def test_what_is_needed_comes_whole_and_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "Model-dev"
    with running(embedded()) as hub:
        done = download(hub, folder)
        assert done.returncode == 0, done.stderr
        assert f"flux-local serve --model {folder}" in done.stdout
        came = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        wanted = {n for n in hub.files if "/" in n and not n.endswith((".bin", ".onnx"))} | {
            "model_index.json",
            "LICENSE.md",
        }
        assert came == wanted | {"manifest.json", "flux-local.json"}
        assert all((folder / name).read_bytes() == hub.files[name] for name in wanted)
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["revision"], set(manifest["files"])) == (COMMIT, wanted)
        fetched = len(hub.fetched)
        assert download(hub, folder).returncode == 0
        assert len(hub.fetched) == fetched, "what is there is not fetched again"

    def doctor() -> dict[str, dict[str, str]]:
        done = command("", tmp_path, "doctor", "--verify", "--json", "--model", folder, "--devices", "cpu",
                       "--port", "0", "--data-dir", tmp_path / "data")  # fmt: skip
        return {verdict["name"]: verdict for verdict in json.loads(done.stdout)}

    assert doctor()["hashes"]["verdict"] == "good"
    data = bytearray((folder / BIG).read_bytes())
    data[-1] ^= 1
    (folder / BIG).write_bytes(data)
    found = doctor()["hashes"]
    assert (found["verdict"], BIG in found["text"]) == ("bad", True)
    (folder / "vae" / "config.json").unlink()
    stopped = command("", tmp_path, "serve", "--port", "0", "--model", folder, "--data-dir", tmp_path / "data")
    assert stopped.returncode == 4
    assert "flux-local download" in stopped.stderr


def test_the_tokenizers_alone(tmp_path: Path) -> None:
    """What a single-file checkpoint lacks; it is no model by itself."""
    folder = tmp_path / "beside"
    with running(embedded()) as hub:
        done = download(hub, folder, "--only", "tokenizers")
    assert done.returncode == 0, done.stderr
    came = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert came == {n for n in hub.files if n.startswith(("tokenizer/", "tokenizer_2/"))}
    assert came
    assert "serve" not in done.stdout


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    name, chunk = "transformer/large.safetensors", 10 << 20
    files = {"model_index.json": b"{}", name: random.Random(0).randbytes(5 * chunk // 2)}
    with running(Hub(files, cut={name: 1})) as hub:
        done = download(hub, tmp_path / "model")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "model" / name).read_bytes() == hub.files[name]
        assert hub.ranges == [(name, f"bytes={chunk}-")], "only whole chunks of the library's are kept"


def test_a_wrong_hash_is_not_kept(tmp_path: Path) -> None:
    with running(Hub(embedded().files, lies={BIG})) as hub:
        done = download(hub, tmp_path / "model")
        assert done.returncode == 4
        assert BIG in done.stderr
        assert hub.fetched.count(BIG) == 2
    assert not (tmp_path / "model" / BIG).exists()
    assert not (tmp_path / "model" / "manifest.json").exists()


def test_a_licence_that_is_not_accepted(tmp_path: Path) -> None:
    with running(Hub(embedded().files, gated=True)) as hub:
        page = f"{hub.url}/{REPOSITORY}"
        nobody = download(hub, tmp_path / "model")
        assert (nobody.returncode, page in nobody.stderr, "HF_TOKEN" in nobody.stderr) == (4, True, True)
        stranger = download(hub, tmp_path / "model", token=STRANGER)
        assert (stranger.returncode, page in stranger.stderr) == (4, True)
        wrong = download(hub, tmp_path / "model", token="hf_wrong")
        assert (wrong.returncode, "does not know this token" in wrong.stderr) == (4, True)
        assert not hub.fetched
        assert download(hub, tmp_path / "model", token=TOKEN).returncode == 0


@pytest.mark.parametrize(
    ("hub", "said"),
    [
        (Hub(embedded().files, swollen={BIG: 10**15}), "GB are needed"),
        (Hub({"README.md": b"nothing here"}), "no model_index.json"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_fetched(hub: Hub, said: str, tmp_path: Path) -> None:
    with running(hub):
        done = download(hub, tmp_path / "model")
    assert done.returncode == 4
    assert said in done.stderr
    assert not hub.fetched


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    done = download(Hub({}, url="http://127.0.0.1:9"), tmp_path / "model")
    assert done.returncode == 4
    assert "Run this again" in done.stderr
