"""`flux-local download` against a hub on loopback that cuts, lies and refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flux_local import weights
from tests.hub import COMMIT, REPOSITORY, STRANGER, TOKEN, Hub, running
from tests.servers import MODEL, ROOT

BIG = "transformer/diffusion_pytorch_model.safetensors"


def embedded() -> Hub:
    """The embedded model as a repository, with what a hub's repository holds besides."""
    files = {str(p.relative_to(MODEL)): p.read_bytes() for p in MODEL.rglob("*") if p.is_file()}
    files = {name: data for name, data in files.items() if name != "flux-local.json"}
    extra = {"single-file.safetensors": b"s" * 50_000, "LICENSE.md": b"terms", "example.png": b"p" * 9,
             "tokenizer/empty.txt": b"", "vae/model.bin": b"pickle", "transformer/model.onnx": b"o"}  # fmt: skip
    return Hub(files | extra)


def environment(hub_url: str, home: Path, token: str) -> dict[str, str]:
    found = {n: v for n, v in os.environ.items() if not n.startswith(("FLUX_LOCAL_", "HF_"))}
    found |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home / "hub-home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    if token:
        found["HF_TOKEN"] = token
    return found


def command(hub_url: str, home: Path, *arguments: str | Path, token: str = "") -> subprocess.CompletedProcess[str]:
    process = started(hub_url, home, *arguments, token=token)
    out, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def started(hub_url: str, home: Path, *arguments: str | Path, token: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flux_local", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=home, env=environment(hub_url, home, token) | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def poll(look: Callable[[], list[Path]]) -> Iterator[Path]:
    """What there is as soon as there is any."""
    until = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < until
        time.sleep(0.01)
    yield from found


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


def test_the_command_that_a_start_prints_mends_the_folder(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "my models" / "Model-dev", tmp_path / "elsewhere"
    folder.parent.mkdir()
    elsewhere.mkdir()
    with running(embedded()) as hub:
        assert download(hub, folder).returncode == 0
        (folder / "vae" / "config.json").unlink()
        stopped = command("", elsewhere, "serve", "--port", "0", "--model", folder, "--data-dir", tmp_path / "data")
        assert stopped.returncode == 4
        printed = re.search("`flux-local (.+)`", stopped.stderr)
        assert printed
        assert command(hub.url, elsewhere, *shlex.split(printed[1])).returncode == 0
    weights.verify(folder)
    assert list(elsewhere.iterdir()) == []


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


LARGE = "transformer/large.safetensors"


def one_large_file(**faults: object) -> Hub:
    return Hub({"model_index.json": b"{}", LARGE: random.Random(0).randbytes(3_000_000)}, **faults)


def test_a_cut_connection_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    with running(one_large_file(cut={LARGE: 2}, busy=1)) as hub:
        done = download(hub, tmp_path / "model")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "model" / LARGE).read_bytes() == hub.files[LARGE]
        assert hub.ranges == [(LARGE, "bytes=1500000-"), (LARGE, "bytes=2250000-")]


def test_what_a_killed_download_has_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with running(one_large_file(halting={LARGE})) as hub:
        killed = started(hub.url, tmp_path, "download", REPOSITORY, "--to", folder)
        assert hub.halted.wait(60)
        part = next(poll(lambda: [p for p in folder.glob("*/*.part") if p.stat().st_size >= 1_000_000]))
        killed.kill()
        killed.communicate()
        hub.going_on.set()
        kept = part.stat().st_size
        done = download(hub, folder)
        assert done.returncode == 0, done.stderr
        assert hub.ranges == [(LARGE, f"bytes={kept}-")]
        assert (folder / LARGE).read_bytes() == hub.files[LARGE]
    assert not list(folder.glob("*/*.part"))


def test_a_copy_in_the_hub_librarys_cache_is_used(tmp_path: Path) -> None:
    with running(one_large_file()) as hub:
        cache = tmp_path / "hub-home" / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
        cached = cache / "snapshots" / COMMIT / LARGE
        cached.parent.mkdir(parents=True)
        cached.write_bytes(hub.files[LARGE])
        done = download(hub, tmp_path / "model")
        assert done.returncode == 0, done.stderr
        assert LARGE not in hub.fetched
        assert (tmp_path / "model" / LARGE).read_bytes() == hub.files[LARGE]


def test_what_else_is_in_the_folder_stays(tmp_path: Path) -> None:
    """A checkpoint's home is where the tokenizers go, and may be a person's own."""
    (tmp_path / "home" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / "home" / ".cache" / "huggingface" / "token").write_text("hf_mine")
    with running(embedded()) as hub:
        assert download(hub, tmp_path / "home", "--only", "tokenizers").returncode == 0
    assert (tmp_path / "home" / ".cache" / "huggingface" / "token").read_text() == "hf_mine"


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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nobody/Nothing"], "has no nobody/Nothing"),
        ([REPOSITORY, "--revision", "mistyped"], "no such revision"),
        ([REPOSITORY, "--to", "{file}/below"], "Not a directory"),
    ],
)
def test_what_was_mistyped_is_named(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with running(embedded()) as hub:
        given = [argument.format(file=tmp_path / "file") for argument in arguments]
        done = command(hub.url, tmp_path, "download", "--to", tmp_path / "to", *given)
    assert done.returncode == 4
    assert said in done.stderr, done.stderr


def test_a_hub_that_is_not_there(tmp_path: Path) -> None:
    done = download(Hub({}, url="http://127.0.0.1:9"), tmp_path / "model")
    assert done.returncode == 4
    assert "Run this again" in done.stderr
