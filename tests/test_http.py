"""The main job through the front door: a real server, the official client, and pictures that show what was asked."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from mini.judge import look
from PIL import Image

from flux_local.api import bodies
from flux_local.errors import RequestTooLarge, TryLater
from tests.servers import MODEL, ROOT, Server, eventually, leaving_after, pictures, running

PROMPT = "a large red star on a blue background"
GENERATIONS = "/v1/images/generations"


def opened(data: str | bytes | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def test_the_openai_client_gets_a_picture_of_what_the_prompt_says(server: Server) -> None:
    with server.client() as client:
        answer = client.images.generate(
            model="flux.1-krea-dev", prompt=PROMPT, size="192x192", response_format="b64_json",
            extra_body={"seed": 1},
        )  # fmt: skip
    assert answer.data
    picture = opened(answer.data[0].b64_json)
    assert picture.format == "PNG"
    assert picture.size == (192, 192)
    background, things = look(picture)
    assert background == "blue"
    assert (things[0].colour, things[0].shape) == ("red", "star")
    assert answer.size == "192x192"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert abs(answer.created - time.time()) < 60
    assert answer.data[0].revised_prompt == PROMPT


def test_the_default_answer_is_a_url_that_serves_the_file(server: Server) -> None:
    with server.client() as client:
        answer = client.images.generate(model="dall-e-3", prompt=PROMPT, extra_body={"steps": 2})
    assert answer.data
    url = answer.data[0].url
    assert url is not None
    assert url.startswith(server.url + "/v1/images/files/")
    assert answer.data[0].b64_json is None
    file = httpx.get(url)
    assert file.headers["content-type"] == "image/png"
    assert file.headers["x-content-type-options"] == "nosniff"
    assert opened(file.content).size == (1024, 1024)
    known = httpx.get(url, headers={"if-none-match": file.headers["etag"]})
    assert (known.status_code, known.content) == (304, b"")
    assert httpx.get(url.replace("/v1/images/files/", "/v1/images/files/x")).status_code == 404


def test_the_readmes_curl_line_works(server: Server) -> None:
    readme = (ROOT / "README.md").read_text()
    line = re.search(r"curl -s (\S+)/v1/images/generations .*?-d '(\{.*?\})'", readme, re.DOTALL)
    assert line, "the README has lost its curl line"
    answer = server.post(json.loads(line[2]))
    assert answer.status_code == 200
    assert answer.json()["data"][0]["url"].startswith(server.url)


@pytest.mark.parametrize("base", ["/v1", "/openai/v1", ""])
def test_every_base_url_in_use_works(server: Server, base: str) -> None:
    client = openai.OpenAI(base_url=server.url + base, api_key="x", max_retries=0)
    with client:
        assert [m.id for m in client.models.list()] == ["flux.1-krea-dev", "flux-krea-mini"]
        assert client.models.retrieve("gpt-image-1").object == "model"
        answer = client.images.generate(prompt="", size="128x128", extra_body={"steps": 1})
    assert answer.data
    assert answer.data[0].url


def test_n_pictures_have_seeds_that_count_up_and_are_those_of_single_requests(server: Server) -> None:
    body = {"prompt": PROMPT, "size": "128x128", "steps": 3, "response_format": "b64_json"}
    together = server.post({**body, "n": 3, "seed": 40})
    assert together.headers["x-flux-seed"] == "40,41,42"
    for offset, item in enumerate(together.json()["data"]):
        assert item["seed"] == 40 + offset
        alone = server.post({**body, "seed": 40 + offset}).json()["data"][0]
        assert alone["b64_json"] == item["b64_json"]


def test_the_same_request_gives_the_same_bytes_in_company_too(server: Server) -> None:
    body = {"prompt": PROMPT, "size": "160x128", "steps": 4, "seed": 9, "response_format": "b64_json"}
    alone = server.post(body).json()["data"][0]["b64_json"]
    others = [{"prompt": f"a small heart {i}", "size": size, "steps": 3 + i, "cfg_scale": 2 + i}
              for i, size in enumerate(["128x128", "160x128", "192x192", "160x128"])]  # fmt: skip
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        company = [pool.submit(server.post, other) for other in others]
        mine = [pool.submit(server.post, body) for _ in range(2)]
        assert {m.result().json()["data"][0]["b64_json"] for m in mine} == {alone}
        assert all(c.result().status_code == 200 for c in company)


def test_seeds_are_random_unless_given_and_zero_is_a_seed(server: Server) -> None:
    body = {"prompt": "x", "size": "128x128", "steps": 1}
    seeds = {server.post(body).json()["data"][0]["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert server.post({**body, "seed": 0}).json()["data"][0]["seed"] == 0
    assert server.post({**body, "seed": 2**63 - 1}).json()["data"][0]["seed"] == 2**63 - 1


@pytest.mark.parametrize(
    ("asked", "size"),
    [({"size": "333x201"}, (333, 201)), ({"size": "16:9"}, (1365, 768)), ({"size": "auto"}, (1024, 1024)),
     ({"aspect_ratio": "9:21", "resolution": "0.5K"}, (335, 782)), ({"megapixels": "0.25"}, (512, 512)),
     ({"size": "1x1"}, (1, 1)), ({"size": "130x121"}, (130, 121)), ({"size": "150x130"}, (150, 130)),
     ({"size": "4096x4096"}, (2048, 2048))],
)  # fmt: skip
def test_exactly_the_pixels_asked_for(server: Server, asked: dict[str, str], size: tuple[int, int]) -> None:
    answer = server.post({"prompt": "x", "steps": 1, "response_format": "b64_json", **asked}).json()
    assert opened(answer["data"][0]["b64_json"]).size == size
    assert answer["size"] == f"{size[0]}x{size[1]}"


@pytest.mark.parametrize("name", ["png", "jpeg", "jpg", "webp", "gif", "avif"])
def test_output_formats(server: Server, name: str) -> None:
    answer = server.post({"prompt": PROMPT, "size": "128x128", "steps": 1, "output_format": name}).json()
    real = {"jpg": "jpeg"}.get(name, name)
    assert answer["output_format"] == real
    file = httpx.get(answer["data"][0]["url"])
    assert file.headers["content-type"] == f"image/{real}"
    assert opened(file.content).format == real.upper()


@pytest.mark.parametrize("name", ["jpeg", "webp", "avif"])
@pytest.mark.parametrize("parameter", ["output_quality", "output_compression"])
def test_a_lower_quality_is_a_smaller_file(server: Server, name: str, parameter: str) -> None:
    body = {"prompt": PROMPT, "size": "192x192", "steps": 2, "seed": 1, "output_format": name,
            "response_format": "b64_json"}  # fmt: skip
    low, high = (len(server.post({**body, parameter: level}).json()["data"][0]["b64_json"]) for level in (10, 95))
    assert low < 0.8 * high


def test_a_png_carries_prompt_and_parameters_and_no_id(server: Server) -> None:
    body = {"prompt": PROMPT, "size": "128x128", "steps": 2, "seed": 3, "response_format": "b64_json"}
    first, second = (server.post(body).json() for _ in range(2))
    text = opened(first["data"][0]["b64_json"]).info["parameters"]
    assert text.startswith(PROMPT + "\nSteps: 2,")
    assert "Seed: 3," in text
    guided = server.post({**body, "negative_prompt": "red", "true_cfg_scale": 2}).json()
    text = opened(guided["data"][0]["b64_json"]).info["parameters"]
    assert text.startswith(PROMPT + "\nNegative prompt: red\nSteps: 2,")
    assert "True CFG scale: 2" in text
    assert first["id"] != second["id"]
    assert first["data"] == second["data"]
    nul = server.post({**body, "prompt": "a\0b"}).json()
    assert "\0" not in opened(nul["data"][0]["b64_json"]).info["parameters"]


def test_sync_mode_answers_a_data_uri(server: Server) -> None:
    answer = server.post({"prompt": "x", "size": "128x128", "steps": 1, "sync_mode": True}).json()
    kind, _, data = answer["data"][0]["url"].partition(",")
    assert kind == "data:image/png;base64"
    assert opened(data).size == (128, 128)


def test_the_second_encoder_reads_its_own_prompt(server: Server) -> None:
    body = {"prompt": PROMPT, "size": "128x128", "steps": 4, "seed": 1, "response_format": "b64_json"}
    plain, same, other, short = (
        server.post({**body, **more}).json()["data"][0]
        for more in ({}, {"prompt_2": PROMPT}, {"prompt_2": "a small white heart"}, {"max_sequence_length": 5})
    )
    pixels = [opened(item["b64_json"]).tobytes() for item in (plain, same, other, short)]
    assert pixels[0] == pixels[1], "though their metadata differ"
    assert len(set(pixels)) == 3
    assert other["revised_prompt"] == "a small white heart"
    assert PROMPT.startswith(short["revised_prompt"])
    assert short["revised_prompt"] != PROMPT
    own = httpx.get(server.url + "/v1/models/flux.1-krea-dev?schema=true").json()["parameters"]
    defaults = {row["name"]: row["default"] for row in own}
    some = ("n", "go_fast", "strength", "stream", "size", "output_format", "num_inference_steps", "prompt")
    assert [defaults[name] for name in some] == [1, None, 0.8, False, None, "png", 8, None]
    length = defaults["max_sequence_length"]
    assert pictures(server.post({**body, "max_sequence_length": length})) == [plain["b64_json"]]
    refused = server.post({**body, "max_sequence_length": length + 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "max_sequence_length")


def test_heads(server: Server) -> None:
    url = server.post({"prompt": "x", "size": "128x128", "steps": 1}).json()["data"][0]["url"]
    for address in (server.url + "/health", server.url + "/ready", url):
        head, whole = httpx.head(address), httpx.get(address)
        assert head.status_code == 200
        assert head.content == b""
        assert head.headers["content-length"] == str(len(whole.content))


def test_what_is_unknown_is_ignored_and_listed(server: Server) -> None:
    answer = server.post({"prompt": "x", "size": "128x128", "steps": 1, "wibble": 1, "strength": 0.3})
    assert answer.status_code == 200
    assert answer.headers["x-flux-ignored-params"] == "strength,wibble"
    assert answer.headers["x-flux-precision"] == "fp32"
    names = [" first", "last ", " ", "é", "a" * 63 + " b", *(f"{i:04} {'c' * 57}" for i in range(40))]
    answer = server.post({"prompt": "x", "size": "128x128", "steps": 1, **dict.fromkeys(names, 1)})
    assert answer.status_code == 200
    listed = answer.headers["x-flux-ignored-params"]
    assert listed.startswith("first,0000 ccc")
    assert 950 < len(listed) <= 1000


def test_a_prompt_that_is_too_long_is_cut_and_says_so(server: Server) -> None:
    prompt = "a large red star on a blue background and " * 20
    answer = server.post({"prompt": prompt, "size": "128x128", "steps": 1})
    assert answer.headers["x-flux-prompt-truncated"] == "true"
    read = answer.json()["data"][0]["revised_prompt"]
    assert prompt.startswith(read)
    assert len(read) < len(prompt)
    body = {"size": "128x128", "steps": 1}
    assert "x-flux-prompt-truncated" not in server.post({**body, "prompt": PROMPT}).headers
    for more in (
        {"prompt": prompt, "prompt_2": PROMPT}, {"prompt": PROMPT, "prompt_2": prompt},
        {"prompt": PROMPT, "negative_prompt": prompt, "true_cfg_scale": 2},
    ):  # fmt: skip
        assert server.post({**body, **more}).headers["x-flux-prompt-truncated"] == "true", more


def test_a_model_s_folder_may_say_how_much_it_reads(tmp_path: Path) -> None:
    """Less than the tokenizer's own limit; what a request may ask for ends there too."""
    shutil.copytree(MODEL, model := tmp_path / "model")
    info = model / "flux-local.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "text_length": 7}))
    body = {"prompt": PROMPT, "size": "128x128", "steps": 1}
    with running(tmp_path, "--model", str(model)) as server:
        for more in ({}, {"max_sequence_length": 7}):
            answer = server.post({**body, **more})
            assert answer.headers["x-flux-prompt-truncated"] == "true"
            assert answer.json()["usage"]["input_tokens"] == 7
        assert server.post({**body, "max_sequence_length": 8}).status_code == 400


def test_answers_have_no_nulls_and_whole_timings(server: Server) -> None:
    answer = server.post({"prompt": "x", "size": "128x128", "steps": 2}).json()
    assert "null" not in json.dumps(answer)
    stages = answer["timings"]
    assert set(stages) == {"queue_s", "encode_s", "denoise_s", "decode_s", "total_s"}
    assert all(isinstance(seconds, float) and 0 <= seconds < 30 for seconds in stages.values())
    assert stages["total_s"] >= stages["denoise_s"] > 0


class TestErrors:
    """Bad input of any kind: an error in OpenAI's form, under a kilobyte, no echo."""

    CANARY = "canary-5b1c"

    @pytest.mark.parametrize(
        ("body", "status", "code", "param"),
        [
            ({}, 400, "missing_required_parameter", "prompt"),
            ({"prompt": 1}, 400, "invalid_value", "prompt"),
            ({"prompt": "x", "n": 11}, 400, "invalid_value", "n"),
            ({"prompt": "x", "n": "canary-5b1c"}, 400, "invalid_value", "n"),
            ({"prompt": "x", "size": "canary-5b1c"}, 400, "invalid_value", "size"),
            ({"prompt": "x", "model": "canary-5b1c"}, 404, "model_not_found", "model"),
            ({"prompt": "x", "enable_safety_checker": True}, 400, "not_available", "enable_safety_checker"),
            ({"prompt": "x", "steps": 3, "num_inference_steps": 4}, 400, "invalid_value", "num_inference_steps"),
        ],
    )
    def test_refused_requests(self, server: Server, body: object, status: int, code: str, param: str) -> None:
        answer = server.post(body)
        self.check(answer, status, code)
        assert answer.json()["error"]["param"] == param

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"null", b"[]", b'"x"', b"NaN",
            b'{"prompt": "x", "cfg_scale": NaN}', b'{"prompt": "x", "cfg_scale": Infinity}',
            b'{"prompt": "x", "cfg_scale": -Infinity}', b'{"prompt": "x", "cfg_scale": 1e400}',
            b'{"prompt": "\\ud800"}', b'{"\\ud800": "x", "prompt": "x"}', b'{"prompt": "x", "prompt": "y"}',
            b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", b"[" * 100_000, b'{"a":' * 100_000,
            '{"prompt": "x"}'.encode("utf-16"), b'{"prompt": "\xff"}', b"\x00" * 100,
        ],
    )  # fmt: skip
    def test_bodies_that_are_no_json(self, server: Server, body: bytes) -> None:
        answer = httpx.post(server.url + GENERATIONS, content=body, headers={"content-type": "application/json"})
        self.check(answer, 400, "invalid_json")

    def test_other_refusals(self, server: Server) -> None:
        self.check(httpx.get(server.url + "/v1/nothing"), 404, "not_found")
        self.check(server.post({"prompt": "x"}, "/v1/images/generations/"), 404, "not_found")
        stranger = {"host": "evil.example"}
        self.check(server.post({"prompt": "x"}, headers=stranger), 400, "invalid_value")
        self.check(httpx.get(server.url + GENERATIONS), 405, "method_not_allowed")
        self.check(httpx.post(server.url + GENERATIONS, data={"prompt": "x"}), 415, "unsupported_media_type")
        self.check(server.post({"prompt": "x" * 1_100_000}), 413, "request_too_large")
        for name in ("nothing", "makers/Model", "makers%2FModel"):
            self.check(httpx.get(f"{server.url}/v1/models/{name}"), 404, "model_not_found")
        for name in ("..%2f..%2fetc%2fpasswd", "%00", "x" * 5000, "a" * 32 + ".png", "." + "a" * 31 + ".png"):
            self.check(httpx.get(f"{server.url}/v1/images/files/{name}"), 404, "not_found")

    def test_the_client_raises_its_own_errors(self, server: Server) -> None:
        with server.client() as client:
            with pytest.raises(openai.BadRequestError) as bad:
                client.images.generate(prompt="x", n=99)
            assert (bad.value.param, bad.value.code) == ("n", "invalid_value")
            with pytest.raises(openai.NotFoundError) as missing:
                client.images.generate(prompt="x", model="sdxl")
            assert missing.value.code == "model_not_found"

    def check(self, answer: httpx.Response, status: int, code: str) -> None:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == code
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert len(answer.content) < 1000
        assert self.CANARY not in answer.text
        assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])


def test_live_and_ready(server: Server) -> None:
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    ready = httpx.get(server.url + "/ready").json()
    assert (ready["model"], ready["device"], ready["precision"]) == ("flux-krea-mini", "cpu", "fp32")
    assert ready["warm_up_seconds"] > ready["step_seconds"] > 0


def test_what_is_no_http_is_told_so_in_the_form_of_all_errors(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nno colon here\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert re.search(rb"x-request-id: req_[0-9a-f]{24}", head)
    assert json.loads(body)["error"]["code"] == "invalid_value"


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_closed(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for said in (b"", b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\n"):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(said)
            began = time.monotonic()
            assert connection.recv(100) == b""
            assert 5 < time.monotonic() - began < 15


def test_a_body_that_comes_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late() -> None:
        async with bodies.arriving(100) as count:
            count(10)
            await asyncio.sleep(5)

    async def large() -> None:
        async with bodies.arriving(100) as count:
            count(60)
            count(60)

    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.05)
    with pytest.raises(TryLater):
        asyncio.run(late())
    with pytest.raises(RequestTooLarge):
        asyncio.run(large())


@pytest.mark.slow
def test_large_bodies_have_only_so_much_memory(tmp_path: Path) -> None:
    """Ten bodies of 60 MB that never end: the ninth is told to come later, what is small goes on, all is given back."""
    with running(tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        head = b"POST /v1/images/edits HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        part = b'{"image": "data:image/png;base64,' + b"A" * 60_000_000
        with contextlib.ExitStack() as stack:
            for index in range(9):
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
                with contextlib.suppress(ConnectionError):  # the ninth is answered, and closed, before its end
                    connection.sendall(head + b"content-length: 60000100\r\n\r\n" + part)
                if index < 8:
                    continue
                answer = connection.recv(1000)
                assert b" 429 " in answer.split(b"\r\n")[0]
                assert b"retry-after: 5" in answer.lower()
            assert server.post({"prompt": "a red circle", "size": "128x128", "steps": 1}).status_code == 200
            assert psutil.Process(server.process.pid).memory_info().rss < 1_000_000_000
        image = base64.b64encode(b"x" * 2_000_000).decode()
        body = {"prompt": "x", "image": f"data:image/png;base64,{image}"}
        eventually(lambda: server.post(body, "/v1/images/edits").status_code == 400)  # read, and no picture


@pytest.mark.parametrize("tail", [b"", b"\r\n", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_a_client_that_leaves_frees_its_place(server: Server, tail: bytes) -> None:
    def newest() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(server.url + "/v1/images/requests", params={"limit": 1}).json()["data"][0]
        return found

    body = {"prompt": f"left {tail!r}", "n": 10, "steps": 100}
    leaving_after(server, body, lambda: newest()["params"]["prompt"] == body["prompt"], tail=tail)
    eventually(lambda: newest()["status"] == "cancelled")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [("PUT", "/v1/images/requests/req_x", "GET, HEAD, DELETE"), ("GET", "/v1/images/edits", "POST"),
     ("DELETE", "/health", "GET, HEAD"), ("POST", "/v1/models", "GET, HEAD")],
)  # fmt: skip
def test_a_wrong_method_is_told_the_right_ones(server: Server, method: str, path: str, allow: str) -> None:
    answer = httpx.request(method, server.url + path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allow
    assert answer.json()["error"]["code"] == "method_not_allowed"
