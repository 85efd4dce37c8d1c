"""What stands in deploy/ fits the server."""

from __future__ import annotations

import configparser
import json
import re

import httpx
import yaml

from flux_local import errors
from flux_local.api.uploads import BODY_LIMIT
from flux_local.config import PREFIX, Settings
from tests.servers import ROOT, Server

DEPLOY = ROOT / "deploy"


def test_the_dashboard_asks_for_metrics_that_there_are(server: Server) -> None:
    server.post({"prompt": "a red circle", "size": "128x128", "steps": 1})
    text = httpx.get(server.url + "/metrics").text
    there = set(re.findall(r"^([a-z_]+)(?:\{| )", text, re.MULTILINE))
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"\b((?:flux|process)_[a-z_]+)\{", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= there


def test_the_unit_knows_exit_codes_and_settings() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "flux-local.service")
    never = {errors.SettingsError.exit_code, errors.AlreadyTaken.exit_code, errors.WeightsError.exit_code}
    assert set(map(int, unit["Service"]["RestartPreventExitStatus"].split())) == never
    names = re.findall(r"^Environment=FLUX_LOCAL_([A-Z_]+)=", (DEPLOY / "flux-local.service").read_text(), re.MULTILINE)
    assert len(names) == 3
    assert (unit["Service"]["StateDirectoryMode"], unit["Service"]["UMask"]) == ("0700", "0077")
    assert {name.lower() for name in names} <= set(Settings.__struct_fields__)


def test_the_container_knows_files_and_settings() -> None:
    lines = (DEPLOY / "Dockerfile").read_text()
    copied = [name for names in re.findall(r"^COPY (.+) \S+$", lines, re.MULTILINE) for name in names.split()]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in
    assert all((ROOT / name).exists() for name in copied)
    (service,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    names = {*re.findall(r"FLUX_LOCAL_([A-Z_]+)=", lines), *(n.removeprefix(PREFIX) for n in service["environment"])}
    assert len(names) == 6
    assert {name.lower() for name in names} <= set(Settings.__struct_fields__)
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().is_file()


def test_the_proxy_lets_through_what_the_server_takes() -> None:
    lines = (DEPLOY / "nginx.conf").read_text()
    size, timeout, address = (
        re.findall(rf"^ *{name} (.+);$", lines, re.MULTILINE)[0]
        for name in ("client_max_body_size", "proxy_read_timeout", "proxy_pass")
    )
    assert int(size.removesuffix("m")) << 20 > BODY_LIMIT
    assert int(timeout.removesuffix("s")) > Settings().request_timeout
    assert address == f"http://{Settings().host}:{Settings().port}"
