"""The command line as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
import torch
from PIL import Image

import flux_local
from flux_local import config, generate
from flux_local.errors import GenerationInvalid, StartError
from flux_local.model.vae import Autoencoder
from tests.servers import ROOT, environment


def flux(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flux_local", *arguments], capture_output=True, text=True, cwd=cwd,
        env=environment(PYTHONPATH=str(ROOT), **variables), timeout=120,
    )  # fmt: skip


@pytest.mark.alone
def test_help_is_quick_and_imports_nothing_heavy() -> None:
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        assert flux("--help").returncode == 0
        seconds.append(time.monotonic() - began)
    bare = []
    for _ in range(3):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(time.monotonic() - began)
    assert min(seconds) < max(0.5, 15 * min(bare)), "half a second, on a machine that starts Python in 30 ms"
    code = "import sys; from flux_local.cli import parser; parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    heavy = {"torch", "diffusers", "transformers", "fastapi", "uvicorn", "PIL", "httpx", "rich"}
    assert not heavy & set(loaded.stdout.split())


def test_version() -> None:
    assert flux("version").stdout == flux("--version").stdout == f"flux-local {flux_local.__version__}\n"


def test_a_flag_of_yes_or_no_takes_nothing_that_follows(tmp_path: Path) -> None:
    words = ["--go-fast", "a red circle", "--reference", "no", "--size", "128x128", "--steps", "1", "--png-metadata"]
    for wrong in (words, [*words[:-1], "--devices", "cpu,cpu"]):
        assert flux("generate", *wrong, "-o", "a.png", cwd=tmp_path).returncode == 2
    done = flux("generate", *words[:-1], "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["parameters"].startswith("a red circle\n")
        assert "Precision: fp8" in picture.info["parameters"]


def test_commands_offer_what_they_use() -> None:
    assert "--port" not in flux("prepare", "--help").stdout
    assert "--strength" not in flux("bench", "--help").stdout
    assert "--strength" in flux("generate", "--help").stdout


def test_generate_writes_the_file_and_prints_seed_and_time(tmp_path: Path) -> None:
    done = flux("generate", "a red circle", "-o", "a.png", "--seed", "7", "--n", "2", "--size", "160x128",
                "--steps", "2", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "seed 7" in done.stdout
    assert "seed 8" in done.stdout
    assert " s\n" in done.stdout
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (160, 128)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "a-1.png").read_bytes()


@pytest.mark.parametrize(
    ("failure", "error", "sentence"),
    [
        (torch.OutOfMemoryError("x"), StartError, "--memory"),
        (ArithmeticError("x"), GenerationInvalid, "no valid picture"),
    ],
)
def test_generate_says_what_the_model_could_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, error: type[Exception], sentence: str
) -> None:
    monkeypatch.setattr(Autoencoder, "decode", Mock(side_effect=failure))
    with pytest.raises(error, match=sentence):
        generate.run({"steps": "1"}, "a circle", tmp_path / "out.png", config.load({}, {}))


def test_generate_draws_what_the_server_draws(tmp_path: Path, server: object) -> None:
    import base64

    from tests.servers import Server

    assert isinstance(server, Server)
    body = {"prompt": "a blue star", "seed": 11, "steps": 3, "size": "128x128", "response_format": "b64_json"}
    served = base64.b64decode(server.post(body).json()["data"][0]["b64_json"])
    done = flux("generate", "a blue star", "-o", "b.png", "--seed", "11", "--steps", "3", "--size", "128x128",
                cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "b.png").read_bytes() == served


def test_generate_edits_what_the_server_edits(tmp_path: Path, server: object) -> None:
    import base64

    from tests.servers import Server

    assert isinstance(server, Server)
    picture = Image.new("RGBA", (144, 128), "blue")
    picture.save(tmp_path / "in.png")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(tmp_path / "mask.png")

    def url(name: str) -> str:
        return "data:image/png;base64," + base64.b64encode((tmp_path / name).read_bytes()).decode()

    body = {"prompt": "a red circle", "seed": 5, "steps": 6, "strength": 0.5, "image": url("in.png"),
            "mask": url("mask.png"), "negative_prompt": "a star", "true_cfg_scale": 2,
            "response_format": "b64_json"}  # fmt: skip
    answer = server.post(body, "/v1/images/edits").json()
    done = flux("generate", "a red circle", "-o", "e.png", "--seed", "5", "--steps", "6", "--strength", "0.5",
                "--image", "in.png", "--mask", "mask.png", "--negative-prompt", "a star", "--true-cfg-scale", "2",
                cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "e.png").read_bytes() == base64.b64decode(answer["data"][0]["b64_json"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("generate", "x", "--steps", "1000"), 2), (("generate", "x", "-o", "a.bmp"), 2),
     (("generate", "x", "--model", "nowhere"), 4), (("generate", "x", "--devices", "cuda:7"), 1),
     (("generate", "x", "--image", "none.png"), 2), (("generate", "x", "--mask", "none.png"), 2),
     (("generate", "x", "--image", str(ROOT / "README.md")), 2), (("generate", "x", "--seed", "many"), 2),
     (("generate", "x", "--go-fast", "perhaps"), 2), (("generate",), 2), (("fly",), 2), (("serve", "--wings", "2"), 2),
     (("serve", "--por", "0"), 2), (("serve", "--api-keys", "sk-secret"), 2),
     (("generate", "x", "-o", "no/such/folder.png"), 2)],
)  # fmt: skip
def test_mistakes_have_a_sentence_and_a_code(arguments: tuple[str, ...], code: int, tmp_path: Path) -> None:
    done = flux(*arguments, cwd=tmp_path)
    assert done.returncode == code
    assert done.stderr.strip()
    assert "Traceback" not in done.stderr
    assert "sk-secret" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("serve --data x", "flux-local serve: there is no --data. Did you mean --data-dir? flux-local serve --help"),
        ("serve --api-keys=SECRET", "flux-local serve: there is no --api-keys."),
        ("generate a red star", "flux-local generate: unexpected word 'red'. Put text with spaces in quotes."),
        ("draw", "flux-local: argument COMMAND: invalid choice: 'draw'"),
        ("bench --requests none", "flux-local bench: argument --requests: 'none' is not a whole number from 1 up."),
    ],
)
def test_what_a_command_does_not_know_is_refused_in_a_line(words: str, said: str) -> None:
    done = flux(*words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(said)
    assert done.stderr.endswith("--help lists what it takes.\n")
    assert done.stderr.count("\n") == 1
    assert "SECRET" not in done.stderr


def test_generate_draws_nothing_unchecked_where_all_is_to_be_checked(tmp_path: Path) -> None:
    done = flux("generate", "x", cwd=tmp_path, FLUX_LOCAL_SAFETY_CHECKER="on")
    assert done.returncode == 2
    assert "flux-local serve" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bench_measures_a_server_that_runs(server: object) -> None:
    from tests.servers import Server

    assert isinstance(server, Server)

    def known() -> set[str]:
        return {entry["id"] for entry in httpx.get(f"{server.url}/v1/images/requests?limit=100").json()["data"]}

    before = known()
    done = flux("bench", "--url", f"{server.url}/v1", "--size", "128x128", "--steps", "1", "--requests", "6",
                "--concurrency", "1", "3", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["server"]["model"] == httpx.get(f"{server.url}/ready").json()["model"]
    assert [row["clients"] for row in found["rows"]] == [1, 3]
    for row in found["rows"]:
        assert 0 < row["p50_s"] <= row["p95_s"]
        assert row["pictures_per_s"] > 0
    assert len(known() - before) == 1 + 6 + 3 + 6, "each row has a warm-up of one request a client"


def test_bench_starts_a_server_of_its_own(tmp_path: Path) -> None:
    done = flux("bench", "--size", "128x128", "--steps", "1", "--requests", "2", "--concurrency", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pictures/s" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--url", "http://127.0.0.1:9"), "Start a server with `flux-local serve`"),
        (("--model", "nowhere"), "No server to measure: "),
        (("--requests", "0"), "'0' is not a whole number from 1 up"),
        (("--concurrency", "many"), "'many' is not a whole number from 1 up"),
    ],
)
def test_bench_says_what_is_missing(flags: tuple[str, ...], message: str) -> None:
    done = flux("bench", *flags)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_says_what_the_server_refuses(server: object) -> None:
    from tests.servers import Server

    assert isinstance(server, Server)
    done = flux("bench", "--url", server.url, "--steps", "1000", "--requests", "1", "--concurrency", "1")
    assert done.returncode == 1
    assert "The server refused a request (400): 'num_inference_steps'" in done.stderr


def test_bench_knows_a_stranger() -> None:
    """Another server that answers, and nothing like what was asked for."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        done = flux("bench", "--url", f"http://127.0.0.1:{stranger.server_port}")
        stranger.shutdown()
    assert done.returncode == 1
    assert "is no flux-local" in done.stderr
