"""The OpenAPI document is true: schemathesis tries what it allows and what it forbids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flux_local.parameters import PARAMETERS
from tests.servers import ROOT, Server, environment


def test_every_parameter_is_in_the_document(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    for route in ("generations", "edits", "variations"):
        content = document["paths"][f"/v1/images/{route}"]["post"]["requestBody"]["content"]
        for schema in (kind["schema"]["properties"] for kind in content.values()):
            assert set(schema) - {"images"} == {
                name for p in PARAMETERS if route in p.routes for name in (p.name, *p.aliases)
            }
    for forbidden in ("http://", "https://"):
        assert forbidden not in httpx.get(server.url + "/docs").text.replace(server.url, "")


FORMS = ["--include-path-regex", "/images/(edits|variations)$"]
"""The routes that take forms, whose fields have no types: `stream=0` is what a form has for false, and an empty list is
nothing at all. That they refuse bad input is left to tests/test_edits.py."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "options",
    [["--exclude-path-regex", FORMS[1]], [*FORMS, "--exclude-checks", "negative_data_rejection"]],
    ids=["JSON", "forms"],
)
def test_schemathesis_finds_nothing(server: Server, tmp_path: Path, options: list[str]) -> None:
    """All its checks: among them no server error, no undocumented status, type or schema, good input accepted, and but
    for forms bad input refused."""
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json", "--checks", "all",
         "--max-examples", "10", "--seed", "1", "--no-color", "--request-timeout", "120", "--max-response-time", "100",
         *options],
        capture_output=True, text=True, cwd=tmp_path,
        env=environment(SCHEMATHESIS_HOOKS="tests.schemathesis_hooks", PYTHONPATH=str(ROOT)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
