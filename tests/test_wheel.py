"""The wheel carries the embedded model and serves outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import httpx
import pytest

from tests.servers import ROOT, running


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_wheel_serves_outside_the_checkout(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True
    )
    (wheel,) = tmp_path.glob("flux_local-*.whl")
    assert wheel.stat().st_size < 16_000_000
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    site = next((home / "lib").glob("python3*/site-packages"))
    subprocess.run([home / "bin" / "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    # The libraries are those of the test's own environment; the package is the wheel's, which comes first.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    place = tmp_path / "elsewhere"
    place.mkdir()
    where = subprocess.run(
        [home / "bin" / "python", "-c", "import flux_local; print(flux_local.__file__)"],
        capture_output=True, text=True, check=True, cwd=place,
    )  # fmt: skip
    assert where.stdout.strip().startswith(str(site))
    with running(place, command=[str(home / "bin" / "flux-local")]) as server:
        answer = server.post({"prompt": "a red circle", "size": "128x128", "steps": 2})
        assert answer.status_code == 200
        assert httpx.get(server.url + "/").status_code == httpx.get(server.url + "/web/app.js").status_code == 200
