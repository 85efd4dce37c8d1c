"""The web page's files, as the server hands them out. What the page does is in test_browser.py."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest

from flux_local.web import FOLDER
from tests.servers import Server, running

PARTS = sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".css", ".js", ".svg"))
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def test_the_page_and_all_that_it_names_are_there(server: Server) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:src|href)="web/([^"]+)"', page.text))
    for script in FOLDER.glob("*.js"):
        named |= set(re.findall(r'from "\./([^"]+)"', script.read_text()))
    assert named == set(PARTS)
    for name in PARTS:
        part = httpx.get(f"{server.url}/web/{name}")
        assert part.status_code == 200
        assert part.headers["content-type"].startswith(TYPES[Path(name).suffix])
        assert part.content == (FOLDER / name).read_bytes()


@pytest.mark.parametrize("path", ["/", "/web/app.js"])
def test_it_may_load_nothing_from_elsewhere(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert httpx.head(server.url + path).headers["content-length"] == str(len(answer.content))


def test_nothing_in_it_is_from_elsewhere_or_read_as_html() -> None:
    for path in FOLDER.iterdir():
        if path.suffix in (".html", ".css", ".js", ".svg"):
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), (
                path
            )


@pytest.mark.parametrize(
    "path", ["/web/", "/web/none.js", "/web/__init__.py", "/web/..%2fcli.py", "/web/%2e%2e/cli.py", "/web/app.js/"]
)
def test_there_is_nothing_else(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_with_keys_the_page_is_open_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_API_KEYS="key-of-mine") as server:
        assert "web page" in server.output
        for path in ("/", *(f"/web/{name}" for name in PARTS)):
            assert httpx.get(server.url + path).status_code == 200
            assert httpx.head(server.url + path).status_code == 200
            assert httpx.post(server.url + path).status_code == 401
        for path in ("/web/none.js", "/web/", "//", "/docs", "/v1/models"):
            assert httpx.get(server.url + path).status_code == 401
