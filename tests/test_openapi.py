"""The OpenAPI document is true: schemathesis tries what it allows and what it forbids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from flux_local.params import PARAMETERS
from tests.servers import Server

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"


def test_every_parameter_is_in_the_document(server: Server) -> None:
    document = httpx.get(server.url + "/openapi.json").json()
    for route in ("generations", "edits", "variations"):
        content = document["paths"][f"/v1/images/{route}"]["post"]["requestBody"]["content"]
        for schema in (kind["schema"]["properties"] for kind in content.values()):
            assert set(schema) == {name for p in PARAMETERS if route in p.routes for name in (p.name, *p.aliases)}
    for forbidden in ("http://", "https://"):
        assert forbidden not in httpx.get(server.url + "/docs").text.replace(server.url, "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_schemathesis_finds_nothing(server: Server, tmp_path: Path) -> None:
    """No server error, no undocumented status, type or schema.

    Left out: whether good input is accepted (the schema cannot say that two names of one parameter must agree).
    """
    done = subprocess.run(
        [Path(sys.executable).with_name("schemathesis"), "run",
         f"{server.url}/openapi.json", "--checks", CHECKS, "--phases", "coverage,fuzzing",
         "--max-examples", "30", "--seed", "1", "--no-color"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
