"""Who may call: every path is closed without a key, but those on a short list. Plain ASGI, on the raw path."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from flux_local.api.answers import error_response
from flux_local.errors import InvalidApiKey, answer_for

OPEN = frozenset({b"/health", b"/ready"})
FILE = re.compile(rb"(/openai)?(/v1)?/images/files/[A-Za-z0-9_-]{32}\.[a-z]{3,4}")
"""A file's URL carries its own unguessable id."""


class KeyGate:
    """ASGI middleware that answers 401 unless the request has a known bearer key. Without keys it lets all pass."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.digests or self.is_open(scope):
            await self.app(scope, receive, send)
            return
        if (owner := self.owner(scope)) is not None:
            await self.app({**scope, "owner": owner}, receive, send)
            return
        error = InvalidApiKey("No valid API key. Send the header 'Authorization: Bearer YOUR_KEY'.")
        response = error_response(answer_for(error), error.message)
        response.headers["www-authenticate"] = "Bearer"
        await response(scope, receive, send)

    def is_open(self, scope: Scope) -> bool:
        path = scope.get("raw_path") or scope["path"].encode()
        return path in OPEN or (scope["method"] in ("GET", "HEAD") and FILE.fullmatch(path) is not None)

    def owner(self, scope: Scope) -> str | None:
        """The digest of the key that the request shows, if it is a known one."""
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(headers) != 1:
            return None
        scheme, _, key = headers[0].partition(b" ")
        if scheme.lower() != b"bearer":
            return None
        offered = digest(key.strip())
        # All of them, every time: the time taken says nothing about which key was near.
        known = sum(hmac.compare_digest(offered, digest) for digest in self.digests) > 0
        return offered.hex() if known else None


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
