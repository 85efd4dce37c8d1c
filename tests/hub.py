"""A stand-in for the model hub on loopback: as much of its protocol as a download speaks, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REPOSITORY = "makers/Model-dev"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"
STRANGER = "hf_stranger"
LARGE = 20_000
"""Bytes from which on a file has a hash."""


@dataclass
class Hub:
    """A repository, what is wrong with its server, and what was asked of it."""

    files: dict[str, bytes]
    gated: bool = False
    cut: dict[str, int] = field(default_factory=dict)
    """A file and how many more times its transfer is cut off half-way."""
    halting: set[str] = field(default_factory=set)
    """Files whose transfer stands still half-way, which sets `halted`, until `going_on` is set."""
    halted: threading.Event = field(default_factory=threading.Event)
    going_on: threading.Event = field(default_factory=threading.Event)
    busy: int = 0
    """How many more times a file is answered by 503."""
    lies: set[str] = field(default_factory=set)
    """Files whose hash is said to be another."""
    swollen: dict[str, int] = field(default_factory=dict)
    """Files and the size that is said of them."""
    ranges: list[tuple[str, str]] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    url: str = ""

    def sibling(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        entry: dict[str, Any] = {
            "rfilename": name,
            "size": self.swollen.get(name, len(data)),
            "blobId": self.etag(name),
        }
        if len(data) >= LARGE:
            entry["lfs"] = {"sha256": self.etag(name), "size": entry["size"], "pointerSize": 134}
        return entry

    def etag(self, name: str) -> str:
        return hashlib.sha256(self.files[name] + (b"?" if name in self.lies else b"")).hexdigest()


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """Serves until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            if "Content_Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def denied(self) -> bool:
            token = (self.headers.get("authorization") or "").removeprefix("Bearer ")
            if token and token not in (TOKEN, STRANGER):
                wrong = "Invalid credentials in Authorization header"
                self.answer(401, json.dumps({"error": wrong}).encode(), X_Error_Message=wrong)
                return True
            if hub.gated and token != TOKEN:
                status = 403 if token else 401
                self.answer(status, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
                return True
            return False

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith(f"/api/models/{REPOSITORY}"):
                rest = path.removeprefix(f"/api/models/{REPOSITORY}")
                if rest == "/auth-check":
                    self.denied() or self.answer(200)
                    return
                if rest.startswith("/revision/") and rest.removeprefix("/revision/") not in ("main", COMMIT):
                    self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
                    return
                info = {
                    "id": REPOSITORY,
                    "modelId": REPOSITORY,
                    "sha": COMMIT,
                    "private": False,
                    "tags": [],
                    "gated": "auto" if hub.gated else False,
                    "siblings": [hub.sibling(n) for n in hub.files],
                }
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
                return
            if found := re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", path):
                if not self.denied():
                    self.file(found[1])
                return
            self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        def file(self, name: str) -> None:
            data = hub.files.get(name)
            if data is None:
                self.answer(404, X_Error_Code="EntryNotFound")
                return
            headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{hub.etag(name)}"', "Accept_Ranges": "bytes"}
            if len(data) >= LARGE:
                headers |= {"X_Linked_Size": str(len(data)), "X_Linked_ETag": f'"{hub.etag(name)}"'}
            if self.command == "HEAD":
                self.answer(200, **headers, Content_Length=str(len(data)))
                return
            hub.fetched.append(name)
            start, status = 0, 200
            if asked := self.headers.get("range"):
                hub.ranges.append((name, asked))
                start, status = int(asked.removeprefix("bytes=").partition("-")[0]), 206
                headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            rest = data[start:]
            if hub.busy > 0:
                hub.busy -= 1
                self.answer(503)
                return
            if name in hub.halting:
                hub.halting.remove(name)
                self.answer(status, rest[: len(rest) // 2], **headers, Content_Length=str(len(rest)))
                self.wfile.flush()
                hub.halted.set()
                hub.going_on.wait(60)
                self.close_connection = True
                return
            if hub.cut.get(name, 0) > 0:
                hub.cut[name] -= 1
                self.answer(status, rest[: len(rest) // 2], **headers, Content_Length=str(len(rest)))
                self.wfile.flush()
                self.close_connection = True
                return
            self.answer(status, rest, **headers, Content_Length=str(len(rest)))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
