"""Edits and variations: image to image, inpainting, and every form of upload that clients send."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import errno
import io
import json
import os
import random
import signal
import socket
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from mini.drawings import COLOURS, Scene, Thing, draw
from mini.judge import look
from PIL import Image, ImageChops, ImageColor
from starlette.requests import Request

from flux_local.api import bodies, uploads
from flux_local.decoder import SafeDecoder
from flux_local.errors import InternalError
from flux_local.params import ModelInfo, generation_params
from flux_local.sizes import Size
from tests.servers import Server, pictures, running

SIDE = 192
SCENE = Scene("yellow", (Thing("blue", "circle", "large", (0.5, 0.5), 0.33),))
EDITS = "/v1/images/edits"
FORM, FIELD = "multipart/form-data; boundary=B", b'--B\r\nContent-Disposition: form-data; name="%s\r\n\r\n'


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(saved(picture)).decode()


def opened(data: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    return draw(SCENE, SIDE, SIDE)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    """Transparent, so to be repainted, in the left half."""
    picture = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, SIDE // 2, SIDE))
    return picture


def edited(server: Server, image: bytes, files: dict[str, bytes] | None = None, **fields: Any) -> httpx.Response:
    sent = {"image": ("image.png", image), **{name: (name, data) for name, data in (files or {}).items()}}
    data = {"prompt": "x", "steps": "4", "response_format": "b64_json", "seed": "1", **fields}
    return httpx.post(server.url + EDITS, files=sent, data=data, timeout=60)


def picture_of(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return opened(answer.json()["data"][0]["b64_json"])


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())


def test_the_openai_client_edits(server: Server, drawing: Image.Image) -> None:
    with server.client() as client:
        answer = client.images.edit(
            image=("in.png", saved(drawing), "image/png"), prompt="a large red star on a white background",
            response_format="b64_json", extra_body={"seed": 2, "strength": 1},
        )  # fmt: skip
        assert answer.data
        assert answer.data[0].b64_json
        picture = opened(answer.data[0].b64_json)
    assert picture.size == (SIDE, SIDE)
    background, things = look(picture)
    assert (background, things[0].colour) == ("white", "red")


def test_strength_is_how_far_it_goes(server: Server, drawing: Image.Image) -> None:
    away = [
        distance(drawing, picture_of(edited(server, saved(drawing), prompt="a small red heart on a black background",
                                            strength=str(strength), steps="10")))
        for strength in (0, 0.3, 0.7, 1)
    ]  # fmt: skip
    assert away[0] == 0
    assert away == sorted(away)
    assert away[1] < 0.5 * away[3], away
    assert away[3] > 50, away


def test_a_size_that_is_cropped_from_its_canvas_stays_in_place(server: Server) -> None:
    source = draw(SCENE, 130, 121)
    picture = picture_of(edited(server, saved(source), prompt="a large blue circle on a yellow background",
                                strength="0.1", steps="10"))  # fmt: skip
    assert picture.size == (130, 121)
    assert distance(source, picture) < 0.5 * distance(source, ImageChops.offset(picture, 3, 3))


def test_strength_1_without_a_mask_is_plain_generation(server: Server, drawing: Image.Image) -> None:
    body = {"prompt": "a red heart", "steps": 4, "seed": 1, "size": "192x192", "response_format": "b64_json"}
    plain = server.post(body).json()["data"][0]["b64_json"]
    answer = edited(server, saved(drawing), prompt="a red heart", strength="1")
    assert answer.json()["data"][0]["b64_json"] == plain


def test_the_smallest_strength_is_a_step(server: Server, drawing: Image.Image) -> None:
    answer = edited(server, saved(drawing), strength=str(0.1 + 0.2 - 0.3), steps="10")
    assert distance(picture_of(answer), drawing) > 0


def test_what_a_browser_sends_of_an_empty_field_is_no_mask(server: Server, drawing: Image.Image) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="'
    form = part + b'mask"; filename=""\r\nContent-Type: application/octet-stream\r\n\r\n\r\n'
    form += part + b'prompt"\r\n\r\nx\r\n' + part + b'steps"\r\n\r\n1\r\n'
    form += part + b'image"; filename="a.png"\r\n\r\n' + saved(drawing) + b"\r\n--x--\r\n"
    kind = {"content-type": "multipart/form-data; boundary=x"}
    assert httpx.post(server.url + EDITS, content=form, headers=kind).status_code == 200


def test_only_pictures_may_be_large(server: Server) -> None:
    noise = Image.effect_noise((1100, 1100), 90).convert("RGB")
    url = data_url(noise)
    assert len(url) > 1_000_000
    small = {"prompt": "x", "steps": 1, "size": "64x64"}
    for image in ({"image": url}, {"images": [{"image_url": url}]}):
        assert server.post({**small, **image}, EDITS).status_code == 200
    fields = {"prompt": "x", "steps": "1", "size": "64x64"}
    assert httpx.post(server.url + EDITS, data={**fields, "image": url}, files={"x": b"x"}).status_code == 200
    answer = server.post({**small, "image": url.partition(",")[2]}, EDITS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image"), "no data URL, and no text"
    for answer in (
        server.post({**small, "image": url, "notes": [[]] * 500_000}, EDITS),
        httpx.post(server.url + EDITS, data={**fields, "notes": "n" * 1_000_001}, files={"image": saved(noise)}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("kind", "begin", "enough"),
    [("application/json", b'{"prompt": "', 1_000_000),
     (FORM, FIELD % b'prompt"', 1_000_000),
     (FORM, FIELD % b'prompt"' + b"x" * 500_000 + b"\r\n" + FIELD % b'notes"', 500_000),
     (FORM, FIELD % b'image"; filename="a.png"', 50_000_000)],
)  # fmt: skip
def test_what_may_not_be_so_large_is_counted_while_it_comes(
    server: Server, kind: str, begin: bytes, enough: int
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {EDITS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: 60000000\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + begin + b"a red circle " * (enough // 13 + 100))
        assert b" 413 " in connection.recv(1000).split(b"\r\n")[0], "with megabytes still to come"


def test_files_of_a_form_count_as_long_as_they_are_in_memory() -> None:
    """Each file's beginning is, the rest waits on the disk."""
    part = b'--x\r\ncontent-disposition: form-data; name="%d"; filename="a"\r\n\r\n' + b"a" * 200_000 + b"\r\n"
    body = b"".join(part % number for number in range(50)) + b"--x--\r\n"
    chunks = [body[at : at + 30_000] for at in range(0, len(body), 30_000)]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

    async def run() -> None:
        scope = {"type": "http", "headers": [(b"content-type", b"multipart/form-data; boundary=x")]}
        before = bodies.MEMORY.taken
        async with contextlib.AsyncExitStack() as stack:
            await uploads.from_multipart(Request(scope, receive), stack)
            assert 50 * 30_000 < bodies.MEMORY.taken - before <= 50 * uploads.Parts.spool_max_size
        assert bodies.MEMORY.taken == before

    asyncio.run(run())


def test_a_picture_is_known_in_however_many_parts_it_comes() -> None:
    rng = random.Random(0)
    kinds = (
        lambda: "data:image/png;base64," + "A/b+" * rng.randint(0, 800),
        lambda: "Qz9=" * rng.randint(256, 500),
        lambda: 'say "data:" \\ dé ' * rng.randint(0, 30),
        lambda: [1, {"a": "b"}],
    )
    for _ in range(300):
        body = json.dumps({f"{i}": rng.choice(kinds)() for i in range(rng.randint(1, 6))}).encode()
        text, at = bodies.Text(), 0
        while at < len(body):
            size = rng.choice((1, 3, 50, 700, 4000))
            text(body[at : at + size])
            at += size
        assert text.size == len(bodies.PICTURE.sub(b"", body))


def test_strength_0_is_the_input_and_takes_no_step(server: Server, drawing: Image.Image) -> None:
    answer = edited(server, saved(drawing), strength="0")
    assert distance(picture_of(answer), drawing) == 0
    assert answer.json()["timings"]["denoise_s"] == 0


@pytest.mark.parametrize(
    ("steps", "strength", "run"),
    [(10, 0.7, 7), (28, 0.25, 7), (28, 0.8, 23), (10, 0.01, 1), (3, 0.999, 3), (5, 0, 0), (10, 0.1 + 0.2 - 0.3, 1)],
)
def test_steps_run(steps: int, strength: float, run: int, mini: ModelInfo) -> None:
    raw = {"prompt": "", "steps": steps, "strength": strength}
    assert generation_params(raw, mini, route="edits", image=Size(64, 64)).steps_run == run


@pytest.mark.parametrize("size", ["128x128", "130x121", "192x192", "300x200"])
def test_a_mask_keeps_pixels_exactly(server: Server, drawing: Image.Image, mask: Image.Image, size: str) -> None:
    width, height = map(int, size.split("x"))
    source = draw(SCENE, width, height)
    cut = mask.resize((width, height), Image.Resampling.NEAREST)
    picture = picture_of(edited(server, saved(source), {"mask": saved(cut)}, strength="1"))
    kept = np.asarray(cut)[..., 3] >= 128
    assert kept.any()
    assert (np.asarray(picture)[kept] == np.asarray(source)[kept]).all()
    assert (np.asarray(picture)[~kept] != np.asarray(source)[~kept]).any()


def test_a_mask_repaints_what_is_more_transparent_than_not(server: Server, drawing: Image.Image) -> None:
    halves = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 128))
    halves.paste((0, 0, 0, 127), (0, 0, SIDE // 2, SIDE))
    picture = picture_of(edited(server, saved(drawing), {"mask": saved(halves)}, strength="1"))
    changed = (np.asarray(picture) != np.asarray(drawing)).any(axis=2)
    assert changed[:, : SIDE // 2].any()
    assert not changed[:, SIDE // 2 :].any()


def test_what_is_masked_is_repainted_to_fit(server: Server, drawing: Image.Image) -> None:
    """The circle is masked away with room around it: the rest of the page must stay the page's colour."""
    hole = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (16, 16, SIDE - 16, SIDE - 16))
    prompt = "a large red star on a yellow background"
    picture = picture_of(edited(server, saved(drawing), {"mask": saved(hole)}, prompt=prompt, strength="1", steps="12"))
    background, things = look(picture)
    assert background == "yellow"
    assert things[0].colour == "red"


def rotated() -> bytes:
    """A JPEG that is to be shown turned by 90 degrees."""
    picture = Image.new("RGB", (120, 60), COLOURS["red"])
    picture.paste(COLOURS["blue"], (0, 0, 60, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture, "JPEG", exif=exif, quality=95)


def test_exif_rotation_is_honoured(server: Server) -> None:
    picture = picture_of(edited(server, rotated(), strength="0"))
    assert picture.size == (60, 120)
    assert look(picture.crop((0, 0, 60, 50)))[0] == "blue"
    assert look(picture.crop((0, 70, 60, 120)))[0] == "red"


def test_transparency_becomes_white(server: Server) -> None:
    picture = picture_of(edited(server, saved(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), strength="0"))
    assert picture.convert("RGB").getpixel((9, 9)) == (255, 255, 255)


def test_what_16_bits_say_is_transparent_becomes_white_and_nothing_else(server: Server) -> None:
    grey = np.full((32, 64), 4096, np.uint16)
    grey[:, 32:] = 0  # which 4096 is, of 8 bits
    data = saved(Image.fromarray(grey), transparency=4096)
    picture = picture_of(edited(server, data, strength="0")).convert("RGB")
    assert (picture.getpixel((9, 9)), picture.getpixel((50, 9))) == ((255, 255, 255), (0, 0, 0))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", mode) for mode in ("RGB", "L", "RGBA", "P", "I;16", "LA", "1")]
    + [("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    + [("WEBP", mode) for mode in ("RGB", "RGBA")],
)
def test_every_kind_of_picture(server: Server, kind: str, mode: str) -> None:
    value = {"I;16": 128 * 257, "1": 1}.get(mode)
    size = (48, 40)
    picture = Image.new("L", size, 128).convert(mode) if value is None else Image.new(mode, size, value)
    got = picture_of(edited(server, saved(picture, kind), strength="0")).convert("RGB").getpixel((20, 20))
    assert isinstance(got, tuple)
    expected = 255 if mode == "1" else 128
    assert all(abs(channel - expected) < 8 for channel in got), got


def test_sizes_of_edits(server: Server, drawing: Image.Image) -> None:
    wide = draw(SCENE, 250, 130)
    assert picture_of(edited(server, saved(wide))).size == (250, 130)
    assert picture_of(edited(server, saved(wide), size="auto")).size == (250, 130)
    assert picture_of(edited(server, saved(wide), size="128x144", strength="0")).size == (128, 144)
    assert picture_of(edited(server, saved(wide), aspect_ratio="9:16", resolution="0.5K", strength="0")).size == (
        384, 683,
    )  # fmt: skip


def test_edits_at_once_each_get_their_own(server: Server) -> None:
    colours = ["red", "green", "blue", "white", "black", "purple"]
    with concurrent.futures.ThreadPoolExecutor(len(colours)) as pool:
        sent = [pool.submit(edited, server, saved(Image.new("RGB", (96, 96), c)), strength="0") for c in colours]
        found = [picture_of(answer.result()).getpixel((48, 48)) for answer in sent]
    assert found == [ImageColor.getrgb(colour) for colour in colours]


@pytest.mark.slow
def test_large_pictures_at_once_have_only_so_much_memory(tmp_path: Path) -> None:
    """Forty of 12 megapixels with masks, 50 kilobytes each as files: as many are in memory as are being decoded."""
    large = saved(Image.new("RGB", (4000, 3000), "red"))
    mask = {"mask": saved(Image.new("RGBA", (4000, 3000), (0, 0, 0, 0)))}
    with running(tmp_path) as server:
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            sent = [pool.submit(edited, server, large, mask, strength="0", size="128x128") for _ in range(40)]
            assert {answer.result().status_code for answer in sent} == {200}
        status = Path(f"/proc/{server.process.pid}/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    assert peak < 1_000_000, f"{peak} kB"


def test_what_ends_the_server_does_not_end_its_decoders(drawing: Image.Image) -> None:
    """They get the same signals, from a terminal or a service manager, while uploads are still answered."""

    async def upload() -> None:
        decoder = SafeDecoder()
        process = await decoder._take()
        deaf = (1 << (signal.SIGINT - 1)) | (1 << (signal.SIGTERM - 1))
        while int(Path(f"/proc/{process.pid}/status").read_text().split("SigIgn:")[1].split()[0], 16) & deaf != deaf:
            await asyncio.sleep(0.01)
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        out, _ = await process.communicate(b"i" + saved(drawing))
        assert process.returncode == 0
        assert len(out) > 3 * drawing.width * drawing.height
        assert os.getsid(0) != os.getsid((await decoder._take()).pid)
        await decoder.close()

    asyncio.run(asyncio.wait_for(upload(), 60))


def test_a_decoder_that_cannot_be_started_costs_one_request(
    drawing: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def upload() -> None:
        decoder, start = SafeDecoder(), SafeDecoder._start
        with monkeypatch.context() as patched:
            patched.setattr(SafeDecoder, "_start", no_process)
            with pytest.raises(InternalError):
                await decoder.decode(saved(drawing), "image")
        assert SafeDecoder._start is start
        assert (await decoder.decode(saved(drawing), "image"))[:2] == drawing.size
        await decoder.close()

    async def no_process(_: SafeDecoder) -> Any:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    asyncio.run(upload())


class TestForms:
    """One image, however it is sent."""

    def check(self, answer: httpx.Response) -> None:
        assert picture_of(answer).size == (SIDE, SIDE)

    @pytest.mark.parametrize("name", ["image", "image[]"])
    def test_multipart_names(self, server: Server, drawing: Image.Image, name: str) -> None:
        data = {"prompt": "x", "n": "1", "steps": "1", "response_format": "b64_json", "go_fast": "false"}
        self.check(httpx.post(server.url + EDITS, files={name: ("a.png", saved(drawing))}, data=data))

    def test_a_file_that_nobody_reads_is_told(self, server: Server, drawing: Image.Image) -> None:
        answer = edited(server, saved(drawing), {"markup": saved(drawing)}, steps="1")
        self.check(answer)
        assert answer.headers["x-flux-ignored-params"] == "markup"

    def test_a_data_url_in_a_field(self, server: Server, drawing: Image.Image) -> None:
        data = {"prompt": "x", "steps": "1", "response_format": "b64_json", "image": data_url(drawing)}
        self.check(httpx.post(server.url + EDITS, files={"nothing": b""}, data=data))

    def test_the_clients_list_of_one(self, server: Server, drawing: Image.Image) -> None:
        with server.client() as client:
            answer = client.images.edit(image=[saved(drawing)], prompt="x", extra_body={"steps": 1}, size="auto")
        assert answer.size == "192x192"

    @pytest.mark.parametrize("shape", ["string", "list", "images", "nested"])
    def test_json(self, server: Server, drawing: Image.Image, shape: str) -> None:
        url = data_url(drawing)
        body: dict[str, Any] = {"prompt": "x", "steps": 1, "response_format": "b64_json"}
        body |= {
            "string": {"image": url},
            "list": {"image": [url]},
            "images": {"images": [{"image_url": url}]},
            "nested": {"images": [{"type": "image_url", "image_url": {"url": url}}]},
        }[shape]
        self.check(server.post(body, EDITS))

    def test_text_is_utf_8_whatever_the_form_says_of_it(self, server: Server, drawing: Image.Image) -> None:
        def sent(text: bytes, charset: str) -> httpx.Response:
            parts = {b"prompt": text, b"steps": b"1", b"strength": b"0.5", b"response_format": b"b64_json"}
            fields = [b'--B\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s' % part for part in parts.items()]
            image = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + saved(drawing)
            kind = f"multipart/form-data; boundary=B{charset}"
            body = b"\r\n".join([*fields, image, b"--B--\r\n"])
            return httpx.post(server.url + EDITS, content=body, headers={"content-type": kind}, timeout=20)

        for charset in ("", "; charset=utf-8", "; charset=utf-16", "; charset=punycode", "; charset=nonsense"):
            answer = sent("ein großer Stern".encode(), charset)
            self.check(answer)
            assert answer.json()["data"][0]["revised_prompt"] == "ein großer Stern"
        slow = b"a" * 29_000 + b"-" + b"A" * 2_000  # minutes, for the codec that the header asks for
        assert sent(slow, "; charset=punycode").status_code == 200
        bad = sent(b"ein gro\xdfer Stern", "")
        assert (bad.status_code, bad.json()["error"]["message"]) == (400, "The form's text must be UTF-8.")

    def test_a_form_without_its_boundary_is_told_so(self, server: Server) -> None:
        answer = httpx.post(server.url + EDITS, content=b"x", headers={"content-type": "multipart/form-data"})
        assert answer.status_code == 400
        assert "boundary" in answer.json()["error"]["message"]

    def test_json_mask(self, server: Server, drawing: Image.Image, mask: Image.Image) -> None:
        body = {"prompt": "x", "steps": 1, "response_format": "b64_json", "image": data_url(drawing)}
        self.check(server.post({**body, "mask": data_url(mask)}, EDITS))
        self.check(server.post({**body, "mask": {"image_url": data_url(mask)}}, EDITS))


def test_variations(server: Server, drawing: Image.Image) -> None:
    with server.client() as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        answer = client.images.create_variation(
            image=("in.png", saved(drawing)), n=2, response_format="b64_json", extra_body={"steps": 4}
        )
    assert answer.data
    assert len(answer.data) == 2
    assert answer.data[0].b64_json != answer.data[1].b64_json


def test_a_variation_is_an_edit_without_words_at_its_own_strength(
    server: Server, drawing: Image.Image, mask: Image.Image
) -> None:
    body = {"steps": 4, "seed": 5, "response_format": "b64_json", "image": data_url(drawing)}
    made = server.post({**body, "mask": data_url(mask)}, "/v1/images/variations")
    assert made.headers["x-flux-ignored-params"] == "mask"
    assert pictures(made) == pictures(server.post({**body, "prompt": "", "strength": 0.6}, EDITS))
    assert pictures(made) != pictures(server.post({**body, "prompt": "", "strength": 0.8}, EDITS))


class TestRefusals:
    def check(self, answer: httpx.Response, code: str, param: str | None, status: int = 400) -> None:
        assert answer.status_code == status, answer.text
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)
        assert len(answer.content) < 1000
        assert "0x" not in answer.text

    def test_pictures_that_are_none(self, server: Server, drawing: Image.Image) -> None:
        png = saved(drawing)
        bad = [b"", b"x", b"hello world" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4",
               b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png[: len(png) // 2], png[:40],
               saved(drawing, "TIFF"), saved(drawing, "BMP"), saved(drawing.convert("P"), "GIF")]  # fmt: skip
        for data in bad:
            self.check(edited(server, data), "invalid_image", "image")

    def test_a_picture_that_unpacks_to_too_much(self, server: Server) -> None:
        bomb = saved(Image.new("1", (14142, 14142)), compress_level=9)
        assert len(bomb) < 1_000_000
        self.check(edited(server, bomb), "invalid_image", "image")

    def test_masks(self, server: Server, drawing: Image.Image, mask: Image.Image) -> None:
        self.check(edited(server, saved(drawing), {"mask": saved(drawing)}), "invalid_image", "mask")
        small = mask.resize((64, 64))
        self.check(edited(server, saved(drawing), {"mask": saved(small)}), "invalid_image", "mask")

    def test_what_no_number_can_be(self, server: Server, drawing: Image.Image) -> None:
        huge = '[{"path": "a", "scale": ' + "9" * 400 + "}]"
        half = '[{"path": "\\ud800"}]'
        for loras in (huge, half):
            self.check(edited(server, saved(drawing), loras=loras), "invalid_value", "loras")

    def test_one_image_exactly(self, server: Server, drawing: Image.Image) -> None:
        two = [("image[]", ("a.png", saved(drawing))), ("image[]", ("b.png", saved(drawing)))]
        answer = httpx.post(server.url + EDITS, files=two, data={"prompt": "x"})
        self.check(answer, "invalid_value", "image")
        assert "one image" in answer.json()["error"]["message"]
        with server.client() as client, pytest.raises(openai.BadRequestError):
            client.images.edit(image=[saved(drawing), saved(drawing)], prompt="x")
        none = httpx.post(server.url + EDITS, files={"other": b"x"}, data={"prompt": "x"})
        self.check(none, "missing_required_parameter", "image")

    @pytest.mark.parametrize(
        "url", ["http://127.0.0.1:1/x.png", "https://example.org/x.png", "file:///etc/passwd", "data:image/png,abc",
                "data:image/png;base64,!!!", "x", ""],
    )  # fmt: skip
    def test_no_url_is_fetched(self, server: Server, url: str) -> None:
        for body in ({"image": url}, {"images": [{"image_url": url}]}):
            self.check(server.post({"prompt": "x", **body}, EDITS), "invalid_value", "image")

    @pytest.mark.parametrize(
        ("name", "value"), [("strength", "2"), ("strength", "much"), ("n", "1.5"), ("n", "0"), ("go_fast", "perhaps"),
                            ("steps", "1e9"), ("size", "x"), ("seed", "-1")],
    )  # fmt: skip
    def test_values(self, server: Server, drawing: Image.Image, name: str, value: str) -> None:
        data = {"prompt": "x", name: value}
        answer = httpx.post(server.url + EDITS, files={"image": saved(drawing)}, data=data)
        self.check(answer, "invalid_value", name)

    def test_a_parameter_that_comes_as_a_file(self, server: Server, drawing: Image.Image) -> None:
        files = {"image": saved(drawing), "strength": b"0.3"}
        answer = httpx.post(server.url + EDITS, files=files, data={"prompt": "x"})
        self.check(answer, "invalid_value", "strength")

    def test_a_form_cut_short_and_a_form_without_end(self, server: Server) -> None:
        head = {"content-type": "multipart/form-data; boundary=B"}
        whole = "".join(
            f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in {"image": data_url(Image.new("RGB", (128, 128))), "prompt": "x", "steps": "1"}.items()
        ).encode()
        assert httpx.post(server.url + EDITS, content=whole + b"--B--", headers=head, timeout=60).status_code == 200
        for body in (whole, b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx', b"junk", b""):
            answer = httpx.post(server.url + EDITS, content=body, headers=head)
            assert answer.status_code == 400, answer.text
        many = b"".join(b'--B\r\nContent-Disposition: form-data; name="f%d"\r\n\r\nx\r\n' % i for i in range(500))
        answer = httpx.post(server.url + EDITS, content=many + b"--B--\r\n", headers=head)
        assert answer.status_code == 400

    def test_too_large(self, server: Server) -> None:
        answer = httpx.post(server.url + EDITS, files={"image": b"\x00" * 51_000_000}, data={"prompt": "x"}, timeout=60)
        self.check(answer, "request_too_large", "image", 413)
        try:
            answer = httpx.post(server.url + EDITS, files={"image": b"\x00" * 66_000_000}, data={"prompt": "x"})
            assert answer.status_code == 413
        except httpx.TransportError:
            pass  # the server has answered and closed while the client was still sending
        assert httpx.get(server.url + "/health").status_code == 200
