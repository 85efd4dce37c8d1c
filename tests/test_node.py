"""The official client for JavaScript, in a real Node process."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.servers import ROOT, Server, eventually, pictures

pytestmark = pytest.mark.slow

HERE = ROOT / "tests" / "node"
MODULES = Path(sys.prefix) / "node"
"""Where `make test-all` installs the client."""


def test_everything_once(server: Server, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node, "No Node: `make test-all` installs it where it can; else install the package nodejs."
    (tmp_path / "node_modules").symlink_to(MODULES / "node_modules")
    shutil.copy(HERE / "client.mjs", tmp_path)
    done = subprocess.run(
        [node, "client.mjs", f"{server.url}/v1"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "flux-krea-mini" in found["models"]
    body = {"prompt": "a large red star on a blue background", "size": "128x128", "steps": 4, "seed": 7}
    expected = pictures(server.post({**body, "n": 2, "response_format": "b64_json"}))
    assert found["made"] == expected
    assert found["usage"]["output_tokens"] == 2 * 64
    assert found["fetched"] == expected[0]
    with Image.open(io.BytesIO(base64.b64decode(found["edited"]))) as edited:
        assert edited.size == (128, 128)
    assert found["edited"] != expected[0]
    kinds = [(kind, index) for kind, index, _ in found["events"]]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert kinds == [(partial, 0), (partial, 1), (completed, None)]
    assert found["events"][-1][2] == expected[0]
    assert found["refused"] == ["BadRequestError", 400, "steps", "invalid_value"]
    assert found["left"] == 1, "the first partial picture was enough"
    seen = httpx.get(f"{server.url}/v1/images/requests").json()["data"]
    left = next(entry for entry in seen if entry["params"]["steps"] == 100)
    eventually(lambda: httpx.get(f"{server.url}/v1/images/requests/{left['id']}").json()["status"] == "cancelled")
