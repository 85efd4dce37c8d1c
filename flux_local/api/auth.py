"""Who may call: with keys, nobody without one, but for a short list of paths; without keys, this machine's own.

Plain ASGI, on the raw path.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from flux_local.api.answers import error_response
from flux_local.api.page import PATHS
from flux_local.errors import InvalidApiKey, InvalidValue, answer_for

OPEN = frozenset({b"/health", b"/ready"})
FILE = re.compile(rb"(/openai)?(/v1)?/images/files/[A-Za-z0-9_-]{32}\.[a-z]{3,4}")
"""A file's URL carries its own unguessable id."""


class KeyGate:
    """ASGI middleware that answers 401 unless the request has a known bearer key."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self.app = app
        self.digests = [digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.is_open(scope):
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
        path = path_of(scope)
        reading = scope["method"] in ("GET", "HEAD")
        return path in OPEN or (reading and (path in PATHS or FILE.fullmatch(path) is not None))

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


class OwnGate:
    """ASGI middleware for a server without keys: web pages of others may not call it.

    A browser lets any page send a form anywhere, and has a page whose name leads here (DNS rebinding) read the answer
    too. The first shows in `Origin`, the second in `Host`.

    Args:
        origins: of the pages that may call, beside the server's own.
        any_host: whether it may be called by any name, or only by addresses, names without a dot and `public`.
        public: the name in its public address, if it has one.
    """

    def __init__(self, app: ASGIApp, origins: Iterable[str], any_host: bool, public: str | None) -> None:
        self.app = app
        self.origins = frozenset(origins)
        self.any_host, self.public = any_host, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and path_of(scope) not in OPEN and (refusal := self.refusal(scope)):
            error = InvalidValue(refusal)
            await error_response(answer_for(error), error.message)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> str | None:
        """What is wrong with the request, and what its sender or the operator can do."""
        sent = {name: value.decode("latin-1").lower() for name, value in scope["headers"]}
        host, origin = sent.get(b"host", ""), sent.get(b"origin")
        name = name_in(f"//{host}")
        if not self.any_host and not is_local(name) and name != self.public:
            return (
                "This server has no API keys and does not answer to this name: call it by its address, as localhost, "
                "or by the name that its operator gave it with --public-url."
            )
        own = origin is None or origin.partition("://")[2] == host or sent.get(b"sec-fetch-site") == "same-origin"
        if own or origin in self.origins or (self.public is not None and name_in(origin or "") == self.public):
            return None
        return "Web pages of another origin may not call this server. Its operator can allow one with --cors-origins."


def owner_of(request: Request) -> str:
    """Whose request this is: the digest of its key, empty where the server has no keys."""
    found: str = request.scope.get("owner", "")
    return found


def path_of(scope: Scope) -> bytes:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    return path


def name_in(url: str) -> str | None:
    """The host that a URL names, without its port."""
    with contextlib.suppress(ValueError):
        return urlsplit(url).hostname
    return None


def is_local(name: str | None) -> bool:
    """Whether a name is an address, or one that strangers cannot make lead elsewhere: of this machine, or without a
    dot, as in a container's network. A client may also give none."""
    if name is None or "." not in name or name.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return False


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
