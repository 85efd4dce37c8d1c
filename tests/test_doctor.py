"""`flux-local doctor`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import MODEL, ROOT, environment, running


def examined(data: Path, *flags: str) -> tuple[int, dict[str, dict[str, Any]]]:
    command = [sys.executable, "-m", "flux_local", "doctor", "--json", "--data-dir", str(data), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.stderr == ""
    return done.returncode, {verdict["name"]: verdict for verdict in json.loads(done.stdout)}


def test_a_machine_that_is_well(tmp_path: Path) -> None:
    code, found = examined(tmp_path, "--port", "0")
    assert code == 0
    assert {verdict["verdict"] for verdict in found.values()} == {"good"}
    assert str(MODEL) in found["weights"]["text"]
    assert "torch" in found["device auto"]["text"]
    assert found["memory auto"]["text"].startswith("both: everything resident")
    assert examined(tmp_path, "--port", "0", "--memory", "swap")[1]["memory auto"]["text"].startswith("swap: ")


def test_everything_that_is_wrong_and_what_mends_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, found = examined(
            tmp_path / "file", "--port", port, "--model", "no-such-model", "--devices", "cpu,cuda:7",
            "--safety-checker", "on", "--safety-model", str(tmp_path),
        )  # fmt: skip
    assert code == 1
    bad = {name for name, verdict in found.items() if verdict["verdict"] == "bad"}
    assert bad == {"weights", "safety checker", "data directory", "address", "device cuda:7"}
    assert found["device cpu"]["verdict"] == "good"
    assert "--port" in found["address"]["text"]
    assert "--devices cpu" in found["device cuda:7"]["text"]


def test_pictures_that_were_promised_for_longer_stay(tmp_path: Path) -> None:
    picture = tmp_path / "files" / f"{'a' * 32}.png"
    picture.parent.mkdir()
    picture.write_bytes(b"a picture")
    os.utime(picture, (1e9, 1e9))
    assert examined(tmp_path, "--port", "0")[0] == 0
    assert picture.is_file()


def test_for_people_it_is_a_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flux_local", "doctor", "--data-dir", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("good  ") for line in lines)


@pytest.mark.slow
def test_a_server_that_runs_is_no_trouble(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        code, found = examined(tmp_path / "data", "--port", port)
        other = examined(tmp_path / "data", "--port", "0")[1]
        strangers = examined(tmp_path / "own", "--port", port)[1]
    assert code == 0
    assert {verdict["verdict"] for verdict in found.values()} == {"good"}
    assert "flux-krea-mini" in found["address"]["text"]
    assert "in use" in found["data directory"]["text"]
    assert "as the running server has it" in found["memory auto"]["text"]
    assert other["data directory"]["verdict"] == "bad", "a second server would not start"
    assert (strangers["data directory"]["verdict"], strangers["address"]["verdict"]) == ("good", "bad")
