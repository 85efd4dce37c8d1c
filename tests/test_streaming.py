"""Server-sent events, read by the official client and raw."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from mini.drawings import Scene, Thing, draw
from PIL import Image

from tests.servers import Server, eventually, running

BODY: dict[str, Any] = {"prompt": "a large red star on a blue background", "size": "128x128", "steps": 8, "seed": 4}


def events(server: Server, body: dict[str, Any]) -> tuple[httpx.Response, list[tuple[str, dict[str, Any]]]]:
    """Whole events, parsed as strictly as the standard allows."""
    answer = server.post({**body, "stream": True})
    found = []
    for block in answer.text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        lines = block.split("\n")
        assert len(lines) == 2
        assert lines[0].startswith("event: ")
        assert lines[1].startswith("data: ")
        found.append((lines[0][7:], json.loads(lines[1][6:])))
    return answer, found


def pixels(data: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), float)


def test_the_client_iterates_partial_pictures_and_the_last(server: Server) -> None:
    body = {key: value for key, value in BODY.items() if key not in ("prompt", "size")}
    with server.client() as client:
        stream = client.images.generate(
            prompt=BODY["prompt"], size=BODY["size"], stream=True, partial_images=3, extra_body=body
        )
        got = list(stream)
    assert [event.type for event in got] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in got[:3]] == [0, 1, 2]  # type: ignore[union-attr]
    last = got[-1]
    assert last.type == "image_generation.completed"
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    assert (last.size, last.output_format, last.background) == ("128x128", "png", "opaque")
    final = pixels(last.b64_json)
    away = [np.abs(pixels(event.b64_json) - final).mean() for event in got[:3]]
    assert 0 < min(away) <= max(away) < 30, "estimates of this picture, each another"
    assert len({event.b64_json for event in got}) == 4


def test_the_last_picture_is_that_of_a_plain_request(server: Server) -> None:
    plain = server.post({**BODY, "response_format": "b64_json"}).json()["data"][0]
    answer, got = events(server, BODY)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-flux-seed"] == "4"
    ((name, last),) = got
    assert name == last["type"] == "image_generation.completed"
    assert last["b64_json"] == plain["b64_json"]
    assert last["seed"] == 4
    assert "partial_image_index" not in last
    assert "index" not in last


def test_every_event_has_its_fields(server: Server) -> None:
    _, got = events(server, {**BODY, "partial_images": 1})
    common = {"type", "b64_json", "created_at", "size", "quality", "background", "output_format"}
    assert common | {"partial_image_index"} == set(got[0][1])
    assert common | {"usage"} <= set(got[1][1])


def test_each_of_several_pictures_has_its_own_events(server: Server) -> None:
    _, got = events(server, {**BODY, "n": 2, "partial_images": 2})
    for index in (0, 1):
        own = [event for _, event in got if event["index"] == index]
        assert [event.get("partial_image_index") for event in own] == [0, 1, None]


def test_a_picture_that_is_drawn_again_is_told_once(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="nan step=7 times=1") as server:
        _, got = events(server, {**BODY, "partial_images": 3})
        assert "drawing it again" in server.output
    assert [event.get("partial_image_index") for _, event in got] == [0, 1, 2, None]


@pytest.mark.slow
def test_silence_is_kept_alive_by_comments(tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_FAULTS="slow seconds=17 times=1") as server:
        answer, got = events(server, {**BODY, "steps": 1})
    assert answer.text.startswith(": generating\n\n: keep-alive\n\nevent: ")
    assert len(got) == 1


def test_fewer_steps_than_partials(server: Server) -> None:
    _, got = events(server, {**BODY, "steps": 2, "partial_images": 3})
    assert [name for name, _ in got] == ["image_generation.partial_image", "image_generation.completed"]


def test_edits_stream_too(server: Server) -> None:
    out = io.BytesIO()
    draw(Scene("white", (Thing("red", "heart", "large", (0.5, 0.5), 0.3),)), 128, 128).save(out, "PNG")
    with server.client() as client:
        got = list(client.images.edit(image=out.getvalue(), prompt="x", stream=True, partial_images=1,
                                      extra_body={"steps": 4}))  # fmt: skip
    assert [event.type for event in got] == ["image_edit.partial_image", "image_edit.completed"]


def test_every_event_is_one_line_whatever_the_prompt(server: Server) -> None:
    prompt = "a red\u2028circle\u2029on\u0085blue"
    body = {**BODY, "prompt": prompt, "steps": 1, "stream": True}
    with httpx.stream("POST", server.url + "/v1/images/generations", json=body, timeout=60) as answer:
        data = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert [event["type"] for event in data] == ["image_generation.completed"]
    assert data[0]["revised_prompt"] == prompt


def test_bad_input_is_refused_before_the_stream(server: Server) -> None:
    answer = server.post({**BODY, "stream": True, "n": 99})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "n"


def test_a_client_that_leaves_a_stream_stops_the_work(server: Server) -> None:
    body = {**BODY, "steps": 100, "n": 10, "size": "192x192", "stream": True, "partial_images": 3}
    with httpx.stream("POST", server.url + "/v1/images/generations", json=body, timeout=30) as answer:
        assert answer.status_code == 200
        next(answer.iter_bytes())
    history = httpx.get(server.url + "/v1/images/requests").json()["data"]
    assert server.post({**BODY, "steps": 1}).status_code == 200
    url = f"{server.url}/v1/images/requests/{history[0]['id']}"
    eventually(lambda: httpx.get(url).json()["status"] == "cancelled", 10)


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_formats(server: Server, name: str) -> None:
    _, got = events(server, {**BODY, "steps": 2, "partial_images": 1, "output_format": name})
    for _, event in got:
        assert Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))).format == name.upper()
