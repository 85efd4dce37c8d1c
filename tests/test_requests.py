"""Asynchronous requests, the history, progress, cancelling, restarts."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import io
import json
import random
import socket
import sqlite3
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.servers import MODEL, Server, eventually, pictures, running, started

ASYNC = {"prefer": "respond-async"}
SHAPES = {"A": (1, 64), "B": (192, 1)}
BODY: dict[str, Any] = {"prompt": "a small green heart on white", "size": "128x128", "steps": 3, "seed": 8}


def status(url: str) -> str:
    found: str = httpx.get(url).json()["status"]
    return found


def test_accepted_at_once_and_done_later(server: Server) -> None:
    answer = server.post({**BODY, "n": 2}, headers=ASYNC)
    assert answer.status_code == 202
    location = answer.headers["location"]
    assert location == f"{server.url}/v1/images/requests/{answer.json()['id']}"
    assert answer.json()["status"] in ("queued", "running")
    assert answer.json()["progress"]["steps"] == 6
    assert answer.json()["progress"]["seconds_left"] > 0
    assert answer.headers["x-flux-seed"] == "8,9"
    eventually(lambda: status(location) == "succeeded")
    entry = httpx.get(location).json()
    assert entry["object"] == "image.request"
    assert entry["params"]["seeds"] == [8, 9]
    assert entry["params"]["prompt"] == BODY["prompt"]
    assert entry["finished"] >= entry["created"]
    assert "progress" not in entry
    assert "error" not in entry
    assert [item["seed"] for item in entry["response"]["data"]] == [8, 9]
    assert httpx.get(entry["response"]["data"][0]["url"]).headers["content-type"] == "image/png"


def test_preferences_may_be_several_headers(server: Server) -> None:
    answer = server.post(BODY, headers=[("prefer", "wait=5"), ("prefer", "Respond-Async; x=1")])
    assert answer.status_code == 202
    eventually(lambda: status(answer.headers["location"]) == "succeeded")


def test_the_same_picture_as_a_plain_request(server: Server) -> None:
    plain = server.post({**BODY, "response_format": "b64_json"}).json()["data"]
    location = server.post({**BODY, "response_format": "b64_json"}, headers=ASYNC).headers["location"]
    eventually(lambda: status(location) == "succeeded")
    assert httpx.get(location).json()["response"]["data"] == plain


def drawing() -> str:
    out = io.BytesIO()
    Image.new("RGB", (96, 80), "red").save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_edits_are_accepted_too(server: Server) -> None:
    answer = server.post({"prompt": "x", "image": drawing(), "steps": 2}, "/v1/images/edits", headers=ASYNC)
    assert answer.status_code == 202
    eventually(lambda: status(answer.headers["location"]) == "succeeded")
    assert httpx.get(answer.headers["location"]).json()["response"]["size"] == "96x80"


def test_plain_requests_are_in_the_history_without_their_bytes(server: Server) -> None:
    made = server.post({**BODY, "response_format": "b64_json", "user": "somebody"}).json()
    entry = httpx.get(f"{server.url}/v1/images/requests/{made['id']}").json()
    assert entry["status"] == "succeeded"
    assert entry["params"]["user"] == "somebody"
    assert entry["response"]["timings"] == made["timings"]
    assert "b64_json" not in entry["response"]["data"][0]
    listed = httpx.get(server.url + "/v1/images/requests").json()
    assert listed["object"] == "list"
    assert listed["data"][0] == entry


def test_a_page_of_the_history_is_without_pictures(server: Server) -> None:
    location = server.post({**BODY, "response_format": "b64_json"}, headers=ASYNC).headers["location"]
    eventually(lambda: status(location) == "succeeded")
    one, (listed, *_) = httpx.get(location).json(), httpx.get(server.url + "/v1/images/requests").json()["data"]
    assert one["response"]["data"][0].pop("b64_json")
    assert listed == one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.slow
def test_what_is_deleted_while_the_model_loads_is_not_drawn(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=1") as server:
        promised = [server.post(BODY, headers=ASYNC).json()["id"] for _ in range(2)]
        server.process.kill()
        server.process.wait()
    port = free_port()
    with started(tmp_path, "--port", str(port)) as server:
        server.url = f"http://127.0.0.1:{port}"
        url = server.url + "/v1/images/requests/"

        def deleted() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                return httpx.delete(url + promised[0], timeout=30).status_code == 200
            return False

        eventually(deleted)
        server.wait_ready()
        eventually(lambda: status(url + promised[1]) == "succeeded")
        (left,) = httpx.get(url.rstrip("/")).json()["data"]
        assert left["id"] == promised[1]
        assert len(list((tmp_path / "data" / "files").iterdir())) == 1


@pytest.mark.slow
def test_a_promise_whose_adapter_has_gone_ends(tmp_path: Path) -> None:
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    save_file({f"transformer.x_embedder.lora_{half}.weight": torch.zeros(shape) for half, shape in SHAPES.items()},
              adapters / "night.safetensors")  # fmt: skip
    with running(tmp_path, "--loras-dir", str(adapters), FLUX_LOCAL_FAULTS="slow seconds=1") as server:
        promised = server.post({**BODY, "loras": [{"path": "night"}]}, headers=ASYNC)
        assert promised.status_code == 202, promised.text
        server.process.kill()
        server.process.wait()
    (adapters / "night.safetensors").unlink()
    with running(tmp_path, "--loras-dir", str(adapters)) as server:
        url = f"{server.url}/v1/images/requests/{promised.json()['id']}"
        eventually(lambda: status(url) == "failed")
        assert httpx.get(url).json()["error"]["code"] == "not_found"


@pytest.mark.slow
def test_a_promise_is_for_the_model_that_it_was_made_with(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=1") as server:
        promised = server.post(BODY, headers=ASYNC).json()["id"]
        server.process.kill()
        server.process.wait()
    other = tmp_path / "another-model"
    other.symlink_to(MODEL)
    with running(tmp_path, "--model", str(other)) as server:
        url = f"{server.url}/v1/images/requests/{promised}"
        eventually(lambda: status(url) == "failed")
        assert "another model" in httpx.get(url).json()["error"]["message"]


def test_sync_mode_leaves_no_trace(server: Server) -> None:
    made = server.post({**BODY, "sync_mode": True}).json()
    assert httpx.get(f"{server.url}/v1/images/requests/{made['id']}").status_code == 404


def test_progress_counts_steps(server: Server) -> None:
    location = server.post({**BODY, "steps": 100, "n": 10}, headers=ASYNC).headers["location"]
    seen: list[dict[str, Any]] = []

    def half_way() -> bool:
        seen.append(httpx.get(location).json())
        return seen[-1]["status"] == "running" and seen[-1]["progress"]["step"] >= 20

    eventually(half_way)
    steps = [entry["progress"]["step"] for entry in seen]
    assert steps == sorted(steps)
    assert seen[-1]["progress"]["steps"] == 1000
    assert 0 < seen[-1]["progress"]["seconds_left"] < 60
    assert httpx.delete(location).json()["deleted"]


def test_delete_cancels_what_runs_and_removes_what_is_stored(server: Server) -> None:
    work = {**BODY, "steps": 100, "n": 4, "size": "192x192"}  # under `max_wait` on a slow machine as well
    long = server.post(work, headers=ASYNC).headers["location"]
    behind = server.post(work, headers=ASYNC)
    assert behind.status_code == 202, behind.text
    assert behind.json()["progress"]["queue_position"] <= 4
    for location in (long, behind.headers["location"]):
        gone = httpx.delete(location).json()
        assert gone["status"] == "cancelled"
        assert httpx.get(location).status_code == 404
        assert httpx.delete(location).status_code == 404
    made = server.post(BODY).json()
    url = made["data"][0]["url"]
    assert httpx.get(url).status_code == 200
    assert httpx.delete(f"{server.url}/v1/images/requests/{made['id']}").status_code == 200
    assert httpx.get(url).status_code == 404


def test_deleted_twice_at_once_a_request_is_cancelled_once(server: Server) -> None:
    """Whoever waits for it is told as always, however the two meet."""
    work = {**BODY, "steps": 100, "n": 4, "size": "192x192"}
    newest = httpx.get(server.url + "/v1/images/requests", params={"limit": 1}).json()["data"]
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        for _ in range(4):
            waiting = pool.submit(server.post, work)
            eventually(lambda: running_now(server) is not None)
            location = f"{server.url}/v1/images/requests/{running_now(server)}"
            deleted = [answer.status_code for answer in pool.map(httpx.delete, [location] * 8)]
            assert set(deleted) <= {200, 404}
            assert 200 in deleted
            answer = waiting.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (499, "cancelled"), answer.text
            assert "x-request-id" in answer.headers
    assert httpx.get(server.url + "/v1/images/requests", params={"limit": 1}).json()["data"] == newest


def running_now(server: Server) -> str | None:
    """The newest request, if it is not done."""
    for entry in httpx.get(server.url + "/v1/images/requests", params={"limit": 1}).json()["data"]:
        return str(entry["id"]) if entry["status"] == "running" else None
    return None


def test_what_is_not_drawn_waits_in_the_same_queue(tmp_path: Path) -> None:
    """Strength 0 keeps the picture; files of it are work all the same, and are kept in memory."""
    work = {**BODY, "image": drawing(), "strength": 0, "size": "1024x1024", "n": 10, "output_format": "avif"}
    with running(tmp_path, "--max-waiting", "10") as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: server.post(work, "/v1/images/edits"), range(4)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert codes[-1] == 429, codes
        assert server.post(work, "/v1/images/edits").status_code == 200, "and it is let go"


@pytest.mark.parametrize(("name", "value"), [("stream", True), ("sync_mode", True)])
def test_what_does_not_go_together(server: Server, name: str, value: bool) -> None:
    answer = server.post({**BODY, name: value}, headers=ASYNC)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_a_request_that_was_cancelled_leaves_no_files(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=0.1") as server:
        files = tmp_path / "data" / "files"
        long = server.post({**BODY, "steps": 40, "n": 8}, headers=ASYNC).headers["location"]
        eventually(lambda: any(files.iterdir()))
        assert httpx.delete(long).json()["status"] == "cancelled"
        assert list(files.iterdir()) == []


def test_unknown_ids(server: Server) -> None:
    for id in ("req_" + "0" * 24, "x", "%00", "a" * 3000):
        assert httpx.get(f"{server.url}/v1/images/requests/{id}").status_code == 404
        assert httpx.delete(f"{server.url}/v1/images/requests/{id}").status_code == 404


def test_entries_belong_to_their_key(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_API_KEYS="one,two") as server:
        one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
        id = server.post(BODY, headers=one).json()["id"]
        url = f"{server.url}/v1/images/requests/{id}"
        assert httpx.get(url, headers=one).status_code == 200
        assert httpx.get(url, headers=two).status_code == 404
        assert httpx.delete(url, headers=two).status_code == 404
        assert httpx.get(server.url + "/v1/images/requests", headers=two).json()["data"] == []


def test_accepted_work_outlives_a_kill(tmp_path: Path) -> None:
    """Each accepted request ends in exactly one final state, and its picture is the one it would have been."""
    with running(tmp_path) as server:
        expected = server.post({**BODY, "response_format": "b64_json"}).json()["data"]
        ids = [server.post({**BODY, "steps": 60, "size": "192x192"}, headers=ASYNC).json()["id"] for _ in range(3)]
        ids.append(server.post({**BODY, "response_format": "b64_json"}, headers=ASYNC).json()["id"])
        server.process.kill()
        server.process.wait()
    with running(tmp_path) as server:
        for id in ids:
            eventually(lambda id=id: status(f"{server.url}/v1/images/requests/{id}") == "succeeded", 60)
        assert httpx.get(f"{server.url}/v1/images/requests/{ids[-1]}").json()["response"]["data"] == expected


@pytest.mark.slow
def test_what_a_client_gave_it_is_all_the_time_that_a_promise_has_later_too(tmp_path: Path) -> None:
    slow, body = {"FLUX_LOCAL_FAULTS": "slow seconds=0.5"}, {**BODY, "steps": 20}
    with running(tmp_path, **slow) as server:
        location = server.post(body, headers={**ASYNC, "x-request-timeout": "3"}).headers["location"]
        server.process.kill()
        server.process.wait()
    with running(tmp_path, **slow) as server:
        here = server.url + httpx.URL(location).path
        eventually(lambda: status(here) == "failed")
        assert httpx.get(here).json()["error"]["code"] == "deadline_exceeded"


@pytest.mark.slow
@pytest.mark.parametrize("promises", [1, 3])
def test_accepted_work_outlives_a_start_that_fails(tmp_path: Path, promises: int) -> None:
    body = {**BODY, "steps": 60}
    with running(tmp_path) as server:
        locations = [server.post(body, headers=ASYNC).headers["location"] for _ in range(promises)]
        server.process.kill()
        server.process.wait()
    with started(tmp_path, "--devices", "cuda:7") as server:
        assert server.process.wait(60) == 1
    with running(tmp_path) as server:
        for location in locations:
            here = server.url + httpx.URL(location).path
            eventually(lambda here=here: status(here) == "succeeded")


@pytest.mark.slow
def test_a_promise_that_ends_server_after_server_is_given_up(tmp_path: Path) -> None:
    """And the one beside it, which was in hand each time, is kept."""
    faults = {"FLUX_LOCAL_FAULTS": "crash prompt=boom step=1; slow prompt=heart seconds=0.2"}

    def told() -> list[str]:
        with contextlib.closing(sqlite3.connect(tmp_path / "data" / "history.sqlite3")) as history:
            return [status for (status,) in history.execute("SELECT status FROM requests ORDER BY created")]

    with running(tmp_path, "--engine-falls", "1", **faults) as server:
        for body in ({**BODY, "prompt": "boom"}, {**BODY, "steps": 30}):
            assert server.post(body, headers=ASYNC).status_code == 202
        assert server.process.wait(60) == 70
    ends = 1
    while told() != ["failed", "succeeded"]:
        with started(tmp_path, "--engine-falls", "1", **faults) as server:
            process = server.process
            eventually(lambda process=process: process.poll() is not None or told() == ["failed", "succeeded"], 60)
            ends += process.poll() is not None
        assert ends < 10
    assert ends == 4


@pytest.mark.slow
def test_work_of_another_version_ends_and_the_server_starts(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="hang") as server:
        location = server.post(BODY, headers=ASYNC).headers["location"]
        server.process.kill()
        server.process.wait()
    with sqlite3.connect(tmp_path / "data" / "history.sqlite3") as history:
        history.execute("UPDATE requests SET work = ?", (b"\x81\xa6params\x80",))
        history.executescript("DROP TABLE replies; CREATE TABLE replies (key); PRAGMA user_version = 0;")
    history.close()
    with running(tmp_path) as server:
        url = f"{server.url}/v1/images/requests/{location.rpartition('/')[2]}"
        eventually(lambda: status(url) == "failed")
        assert httpx.get(url).json()["error"]["code"] == "internal_error"
        key = {"idempotency-key": "the tables are those of this version"}
        assert server.post(BODY, headers=key).content == server.post(BODY, headers=key).content


def test_a_damaged_history_does_not_stop_the_server(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "history.sqlite3").write_bytes(b"this is no database" * 500)
    with running(tmp_path) as server:
        assert server.post(BODY).status_code == 200
        assert "the request history cannot be read" in server.output
    assert list((tmp_path / "data").glob("history.corrupt-*"))


def test_a_later_versions_history_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with contextlib.closing(sqlite3.connect(tmp_path / "data" / "history.sqlite3")) as history:
        history.execute("PRAGMA user_version = 1000")
    with started(tmp_path) as server:
        assert server.process.wait(timeout=60) == 1
        assert "is of a later flux-local" in server.output
    assert not list((tmp_path / "data").glob("history.corrupt-*"))


def test_a_full_disk_costs_urls_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        process = psutil.Process(server.process.pid)
        kept = pictures(server.post({**BODY, "response_format": "b64_json"}))
        limits = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
        assert pictures(server.post({**BODY, "response_format": "b64_json"})) == kept
        with server.client() as client:
            stream = client.images.generate(prompt="x", size="128x128", stream=True, extra_body={"steps": 1})  # type: ignore[call-overload]
            assert [event.type for event in stream] == ["image_generation.completed"]
        full = server.post(BODY)
        assert (full.status_code, full.json()["error"]["code"]) == (507, "storage_full")
        assert full.headers["x-should-retry"] == "false"
        noise = io.BytesIO()
        Image.frombytes("RGB", (640, 640), random.Random(0).randbytes(640 * 640 * 3)).save(noise, "PNG")
        sent = {**BODY, "response_format": "b64_json"}
        form = httpx.post(server.url + "/v1/images/edits", files={"image": ("x.png", noise.getvalue())}, data=sent)
        assert (form.status_code, form.json()["error"]["code"]) == (507, "storage_full")
        assert "as JSON" in form.json()["error"]["message"]
        image = "data:image/png;base64," + base64.b64encode(noise.getvalue()).decode()
        assert len(pictures(server.post({**sent, "image": image}, "/v1/images/edits"))) == 1
        process.rlimit(psutil.RLIMIT_FSIZE, limits)
        assert httpx.get(server.post(BODY).json()["data"][0]["url"]).status_code == 200


@pytest.mark.slow
def test_accepted_work_ends_on_a_full_disk_too(tmp_path: Path) -> None:
    """What cannot be written down yet is told all the same, and deleted."""
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=3 step=0") as server:
        process = psutil.Process(server.process.pid)
        made = [server.post(BODY, headers=ASYNC).headers["location"] for _ in range(2)]
        limits = process.rlimit(psutil.RLIMIT_FSIZE)
        process.rlimit(psutil.RLIMIT_FSIZE, (0, limits[1]))
        for location in made:
            eventually(lambda location=location: status(location) == "failed")
        assert httpx.get(made[0]).json()["error"]["code"] == "storage_full"
        newest = httpx.get(server.url + "/v1/images/requests").json()["data"]
        assert [entry["status"] for entry in newest] == ["failed", "failed"]
        assert httpx.delete(made[0]).status_code == 507
        assert httpx.get(made[0]).json()["status"] == "failed", "and stays so where it cannot be deleted"
        process.rlimit(psutil.RLIMIT_FSIZE, limits)
        assert httpx.delete(made[0]).json()["status"] == "failed"
        assert httpx.get(made[0]).status_code == 404
    with running(tmp_path) as server:
        entry = httpx.get(server.url + httpx.URL(made[1]).path).json()
        assert (entry["status"], entry["error"]["code"]) == ("failed", "storage_full"), "what was told stays so"


def test_the_history_has_pages(server: Server) -> None:
    made = [server.post({**BODY, "steps": 1}).json()["id"] for _ in range(3)]
    url = server.url + "/v1/images/requests"
    first = httpx.get(url, params={"limit": 2}).json()
    assert [entry["id"] for entry in first["data"]] == [made[2], made[1]]
    assert first["has_more"] is True
    second = httpx.get(url, params={"limit": 1, "after": made[1]}).json()
    assert [entry["id"] for entry in second["data"]] == [made[0]]
    assert httpx.get(url, params={"after": "req_none"}).status_code == 404
    for limit in ("0", "101", "x", "-1", "1e1"):
        answer = httpx.get(url, params={"limit": limit})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


def test_a_client_may_give_the_server_less_time(tmp_path: Path, server: Server) -> None:
    body, little = {**BODY, "steps": 30}, {"x-request-timeout": "1"}  # no more than a busy machine thinks that it can
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=0.1") as slow:
        streamed = slow.post({**body, "stream": True}, headers=little)
        assert streamed.status_code == 200
        assert "deadline_exceeded" in streamed.text
        newest = httpx.get(slow.url + "/v1/images/requests").json()["data"][0]
        assert (newest["status"], newest["error"]["code"]) == ("failed", "deadline_exceeded")
        late = slow.post(body, headers=little)
        assert (late.status_code, late.json()["error"]["code"]) == (408, "deadline_exceeded")
    for enough in ("60", "30.1234567", "1000000000"):
        assert server.post(BODY, headers={"x-request-timeout": enough}).status_code == 200
    for wrong in ("soon", "0", "-1", "1e3", "nan"):
        answer = server.post(BODY, headers={"x-request-timeout": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "X-Request-Timeout")


def test_the_time_counts_from_when_the_request_arrives(server: Server) -> None:
    """A header that will not do is refused before the picture is sent, and sending one slowly takes of the time."""
    body = json.dumps({**BODY, "image": drawing(), "steps": 1}).encode()

    def sent(timeout: str) -> socket.socket:
        host, port = server.url.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)), timeout=30)
        head = f"POST /v1/images/edits HTTP/1.1\r\nhost: {host}\r\nx-request-timeout: {timeout}\r\n"
        client.sendall(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        return client

    def answer(client: socket.socket) -> str:
        found = b""
        while not found.endswith(b"}}") and (more := client.recv(65536)):
            found += more
        return found.decode()

    with sent("soon") as client:
        assert '"param":"X-Request-Timeout"' in answer(client)
    with sent("0.2") as client:
        client.sendall(body[:-1])
        time.sleep(0.3)
        client.sendall(body[-1:])
        late = answer(client)
        assert '"code":"deadline_exceeded"' in late
        assert "while it was being sent" in late
        assert "x-should-retry: false" not in late.lower(), "it is no fault of the request's"
