"""`Idempotency-Key`: what is sent again is not done again."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response

from flux_local.api.repeats import MOST_WAITING, Keep, Repeats
from flux_local.errors import Cancelled, DeadlineExceeded, RateLimited, TryLater
from flux_local.history import History
from tests.servers import Server, eventually, leaving_after, running

BODY: dict[str, Any] = {"prompt": "a red circle", "size": "128x128", "steps": 4}


def keyed(key: str | None = None, **more: str) -> dict[str, str]:
    return {"idempotency-key": key or uuid.uuid4().hex, **more}


def made(server: Server) -> str:
    """The newest request of the history."""
    found: str = httpx.get(server.url + "/v1/images/requests", params={"limit": 1}).json()["data"][0]["id"]
    return found


def test_a_repeat_gets_the_stored_answer(server: Server) -> None:
    headers = keyed()
    first = server.post(BODY, headers=headers)
    newest = made(server)
    again = server.post(BODY, headers=headers)
    assert again.content == first.content, "the same random seed, the same URL"
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    for name in ("x-flux-seed", "content-type"):
        assert again.headers[name] == first.headers[name]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert made(server) == newest, "nothing was drawn"


def test_a_repeat_meanwhile_waits_for_the_same(server: Server) -> None:
    headers, body = keyed(), {**BODY, "steps": 60}
    paths = ["/v1/images/generations", "/images/generations"] * 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda path: server.post(body, path, headers=headers), paths))
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 3


def test_a_repeat_waits_no_longer_than_its_client(server: Server) -> None:
    headers, body = keyed(), {**BODY, "steps": 100, "n": 4, "size": "192x192"}
    assert server.post(BODY).status_code == 200
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        newest = made(server)
        first = pool.submit(server.post, body, headers=headers)
        eventually(lambda: made(server) != newest)
        again = server.post(body, headers={**headers, "x-request-timeout": "0.1"})
        assert (again.status_code, again.json()["error"]["code"]) == (408, "deadline_exceeded")
        assert "x-should-retry" not in again.headers, "a retry gets the stored answer"
        assert first.result().status_code == 200


def test_a_repeat_takes_over_from_a_client_that_left(server: Server) -> None:
    headers, body = keyed(), {**BODY, "steps": 100, "n": 4}
    newest = made(server)
    leaving_after(server, body, lambda: made(server) != newest, headers)
    again = server.post(body, headers=headers)
    assert (again.status_code, "idempotent-replayed" in again.headers) == (200, False)
    latest = httpx.get(server.url + "/v1/images/requests", params={"limit": 2}).json()["data"]
    assert [entry["status"] for entry in latest] == ["succeeded", "cancelled"]


def with_key(left: asyncio.Event) -> Request:
    """A request under the key k, whose client leaves when the event is set."""

    async def receive() -> dict[str, str]:
        await left.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http", "headers": [(b"idempotency-key", b"k")]}, receive)


def test_a_repeat_whose_client_left_waits_no_more_and_takes_nothing_over(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 60)
        repeats, stays, leaves = Repeats(history), asyncio.Event(), asyncio.Event()
        over = asyncio.get_running_loop().create_future()
        made: list[str] = []

        async def make(name: str) -> Response:
            made.append(name)
            await over
            return Response(status_code=500)

        def asked(name: str, left: asyncio.Event) -> asyncio.Future[Response]:
            request = with_key(left)
            return asyncio.ensure_future(repeats.once(request, "", "generations", "f", 60, lambda _, keep: make(name)))

        first = asked("first", stays)
        await asyncio.sleep(0)
        repeated = [asked("repeat", leaves) for _ in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(RateLimited, match="Too many"):
            await asked("one more", stays)
        leaves.set()
        ended = await asyncio.wait_for(asyncio.gather(*repeated, return_exceptions=True), 10)
        assert {type(error) for error in ended} == {Cancelled}
        waiting = asked("another", stays)
        await asyncio.sleep(0)
        over.set_result(None)
        await asyncio.gather(first, waiting)
        assert made == ["first", "another"]
        history.close()

    asyncio.run(run())


def test_a_key_is_its_owner_s_own(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 60)
        repeats, made = Repeats(history), list[str]()

        async def make(name: str, keep: Keep) -> Response:
            made.append(name)
            return Response(name, headers={"x-request-id": name})

        async def asked(owner: str, name: str) -> bytes:
            request = with_key(asyncio.Event())
            request.scope["request_id"] = name
            once = repeats.once(request, owner, "generations", "f", 60, lambda _, keep: make(name, keep))
            return bytes((await once).body)

        assert [await asked(*each) for each in (("one", "a"), ("two", "b"), ("one", "c"))] == [b"a", b"b", b"a"]
        assert made == ["a", "b"]
        history.close()

    asyncio.run(run())


def test_a_repeat_that_takes_over_has_what_is_left_of_its_time(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 60)
        repeats, request = Repeats(history), with_key(asyncio.Event())
        left: list[float] = []

        async def fails(seconds: float, keep: Keep) -> Response:
            await asyncio.sleep(0.3)
            raise TryLater("x")

        async def works(seconds: float, keep: Keep) -> Response:
            left.append(seconds)
            return Response(status_code=500)

        first = asyncio.ensure_future(repeats.once(request, "", "generations", "f", 60, fails))
        await asyncio.gather(first, repeats.once(request, "", "generations", "f", 10, works), return_exceptions=True)
        assert isinstance(first.exception(), TryLater)
        assert 8 < left[0] < 9.8

        async def comes_too_late(seconds: float, keep: Keep) -> Response:
            raise DeadlineExceeded("x")

        first = asyncio.ensure_future(repeats.once(request, "", "generations", "f", 60, fails))
        second = repeats.once(request, "", "generations", "f", 10, comes_too_late)
        with pytest.raises(TryLater, match="Send it again"):
            await asyncio.gather(asyncio.wait([first]), second)
        assert isinstance(first.exception(), TryLater)
        history.close()

    asyncio.run(run())


def test_another_body_under_the_same_key(server: Server) -> None:
    headers = keyed()
    assert server.post(BODY, headers=headers).status_code == 200
    other = server.post({**BODY, "prompt": "a blue circle"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert server.post(BODY, "/v1/images/variations", headers=headers).status_code == 400, "a key is a route's own"


def test_refusals_are_not_stored(server: Server) -> None:
    headers = keyed()
    assert server.post({**BODY, "n": 99}, headers=headers).status_code == 400
    assert server.post(BODY, headers=headers).status_code == 200


def test_promises_are_made_once(server: Server) -> None:
    headers = keyed(prefer="respond-async")
    first, again = (server.post(BODY, headers=headers) for _ in range(2))
    assert first.status_code == again.status_code == 202
    assert first.headers["location"] == again.headers["location"]
    eventually(lambda: httpx.get(first.headers["location"]).json()["status"] == "succeeded")


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb"])
def test_what_is_no_key(server: Server, key: str) -> None:
    answer = server.post(BODY, headers=[(b"idempotency-key", key.encode())])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize("name", ["stream", "sync_mode"])
def test_what_leaves_nothing_to_repeat_takes_none(server: Server, name: str) -> None:
    answer = server.post({**BODY, name: True}, headers=keyed())
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)


def test_what_was_deleted_is_not_repeated(server: Server) -> None:
    headers, body = keyed(), {**BODY, "response_format": "b64_json"}
    first = server.post(body, headers=headers)
    assert httpx.delete(f"{server.url}/v1/images/requests/{first.json()['id']}").status_code == 200
    again = server.post(body, headers=headers)
    assert (again.status_code, "idempotent-replayed" in again.headers) == (200, False)
    assert again.json()["id"] != first.json()["id"]


@pytest.mark.slow
def test_keys_are_an_owner_s_own_and_outlive_the_process_for_a_day(tmp_path: Path) -> None:
    keys = {"FLUX_LOCAL_API_KEYS": "one,two"}
    one, two = (keyed("same", authorization=f"Bearer {name}") for name in ("one", "two"))
    file, fast = tmp_path / "data" / "history.sqlite3", {**BODY, "go_fast": True}
    with running(tmp_path, **keys) as server:
        first, other = server.post(fast, headers=one), server.post(BODY, headers=two)
        assert other.content != first.content
        server.process.kill()
        server.process.wait()
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as history:
        history.execute("UPDATE requests SET finished = finished - 1e9 WHERE id = ?", (other.json()["id"],))
    with running(tmp_path, "--precisions", "full", **keys) as server:
        assert server.post(fast, headers=one).content == first.content, "though it could not be drawn now"
        entries = f"{server.url}/v1/images/requests/"
        eventually(lambda: httpx.get(entries + other.json()["id"], headers=two).status_code == 404)
        assert httpx.get(entries + first.json()["id"], headers=one).status_code == 200
        with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as history:
            history.execute("UPDATE replies SET created = created - 86401")
        assert server.post(fast, headers=one).status_code == 400
