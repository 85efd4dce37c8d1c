"""The web page, used by a real browser as a person would."""

from __future__ import annotations

import io
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.servers import Server, eventually, running

pytestmark = pytest.mark.slow

PATIENCE = 20_000  # milliseconds: two tests share the machine
STAR = "a large red star on a blue background"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "No Chromium: `make test-all` installs it where it can; else install the package chromium."
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    faults = "slow prompt=snail seconds=0.4"
    with running(tmp_path_factory.mktemp("browser"), FLUX_LOCAL_FAULTS=faults) as server:
        yield server


@pytest.fixture
def page(browser: Any, own: Server) -> Iterator[Any]:
    """The page of a server without pictures. Nothing may be logged as an error, and nothing asked of others."""
    for entry in httpx.get(own.url + "/v1/images/requests").json()["data"]:
        httpx.delete(f"{own.url}/v1/images/requests/{entry['id']}")
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "warning" else None)
    page.on("request", lambda request: request.url.startswith((own.url, "data:", "blob:")) or wrong.append(request.url))
    opened(page, own)
    yield page
    context.close()
    assert not wrong


def opened(page: Any, server: Server) -> None:
    page.goto(server.url)
    page.wait_for_selector("#main-fields label")


def draw(page: Any, prompt: str, **fields: str) -> None:
    page.fill("[name=prompt]", prompt)
    for name, value in fields.items():
        field = page.locator(f"[name={name}]")
        if field.evaluate("field => field.closest('details')?.open === false"):
            page.click("summary")
        if field.evaluate("field => field.tagName") == "SELECT":
            field.select_option(value)
        else:
            field.fill(value)
    page.click("#form button[type=submit]")


def wait(page: Any, selector: str, count: int) -> None:
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_have_count(count, timeout=PATIENCE)


def stored(page: Any, index: int = 0) -> Any:
    """The pixels of a picture of the gallery, as the server has it."""
    source = page.locator(".card.done .picture img").nth(index).get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(httpx.get(source).content)).convert("RGB"), float)


def test_a_picture_is_drawn_and_is_there_again_later(page: Any, own: Server) -> None:
    page.fill("[name=prompt]", STAR)
    page.fill("[name=seed]", "4")
    page.keyboard.press("Control+Enter")
    wait(page, ".card.done .picture img", 1)
    assert "seed 4" in page.inner_text(".card .note")
    pixels = stored(page)
    assert pixels.shape == (1024, 1024, 3)
    assert np.abs(pixels[512, 512] - (214, 40, 40)).max() < 40, "the star is red"
    assert np.abs(pixels[20, 20] - (36, 86, 214)).max() < 40, "on blue"
    opened(page, own)
    wait(page, ".card.done .picture img", 1)
    assert (stored(page) == pixels).all()


def test_previews_and_progress_are_shown_while_it_draws(page: Any) -> None:
    draw(page, "a snail", size="128x128")
    wait(page, ".card.running .picture img[src^='data:image/png']", 1)
    page.wait_for_selector("text=/step \\d of 8/")
    assert 0 < page.locator(".card progress").evaluate("bar => bar.value") < 1
    wait(page, ".card.done", 1)


def test_several_at_once_each_with_its_own_pictures(page: Any) -> None:
    draw(page, STAR, n="2", size="128x128")
    draw(page, "a small yellow circle on a black background", n="", size="128x128")
    wait(page, ".card", 2)
    wait(page, ".card.done .picture img", 3)
    assert "yellow" in page.inner_text(".card >> nth=0")


def test_more_at_once_than_a_browser_has_connections(page: Any, own: Server) -> None:
    """The first are streamed, the others promised: all progress is seen, and one that waits can be cancelled."""
    for _ in range(9):
        draw(page, "a snail", size="128x128", num_inference_steps="3", seed="1")
    wait(page, ".card", 9)
    page.wait_for_selector("text=/\\d before it/")
    page.locator(".card.running:has-text('before it')").first.get_by_text("Cancel").click()
    wait(page, ".card.failed", 1)
    wait(page, ".card.done .picture img", 8)
    assert len({page.locator(".card.done .picture img").nth(i).get_attribute("src") for i in range(8)}) == 8


def test_cancel_ends_the_work(page: Any, own: Server) -> None:
    draw(page, "a snail", size="128x128", num_inference_steps="50")
    page.wait_for_selector("text=/step \\d+ of 50/")
    page.click("text=Cancel")
    wait(page, ".card.failed", 1)
    assert page.inner_text(".card .note") == "Cancelled."
    eventually(lambda: "flux_pictures_running 0.0" in httpx.get(own.url + "/metrics").text)
    page.click(".card >> text=Remove")
    wait(page, ".card", 0)
    assert httpx.get(own.url + "/v1/images/requests").json()["data"] == []


def test_a_promise_made_elsewhere_is_followed_to_its_end(page: Any, own: Server) -> None:
    own.post({"prompt": "a snail", "size": "128x128", "steps": 6}, headers={"Prefer": "respond-async"})
    opened(page, own)
    wait(page, ".card.running", 1)
    wait(page, ".card.done .picture img", 1)


def test_what_is_wrong_is_said_beside_its_field(page: Any) -> None:
    draw(page, STAR, size="0x9")
    alert = page.locator("#problem")
    alert.wait_for()
    assert "size" in alert.inner_text().lower()
    assert page.get_attribute("[name=size]", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.name") == "size"
    wait(page, ".card", 0)
    draw(page, STAR, size="128x128", num_inference_steps="1000")
    assert "Steps" in alert.inner_text()
    draw(page, STAR, num_inference_steps="2")
    wait(page, ".card.done", 1)
    assert alert.is_hidden()


def test_painting_a_mask_keeps_all_else(page: Any, tmp_path: Path) -> None:
    draw(page, STAR, seed="4", size="256x256")
    wait(page, ".card.done .picture img", 1)
    before = stored(page)
    page.click(".card .picture")
    page.click("#edit")
    page.locator("#editor").wait_for()
    box = page.locator("#mask").bounding_box()
    for y in (0.6, 0.7, 0.8, 0.9):
        page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + y * box["height"])
        page.mouse.down()
        page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + y * box["height"], steps=4)
        page.mouse.up()
    draw(page, "a small yellow circle on a blue background", strength="1", size="")
    wait(page, ".card.done", 2)
    after = stored(page)
    assert after.shape == before.shape
    assert (after[:128, :128] == before[:128, :128]).all()
    assert np.abs(after[160:240, 150:240] - before[160:240, 150:240]).max() > 30
    page.click("#remove-image")
    assert page.locator("#drop").is_visible()


def painted(page: Any) -> Any:
    """Where the mask is painted, [height, width]."""
    code = """canvas => {
        const { width, height } = canvas;
        const pen = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
        pen.drawImage(canvas, 0, 0);
        return [width, height, [...pen.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 == 3)]];
    }"""
    width, height, alpha = page.locator("#mask").evaluate(code)
    return np.array(alpha).reshape(height, width) > 127


def test_a_mask_can_be_painted_with_keys_and_taken_back(page: Any) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (192, 128), "navy").save(picture, "PNG")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture.getvalue()})
    page.locator("#editor").wait_for()
    page.focus("#mask")
    assert page.locator("#ring").is_visible()
    page.keyboard.press("ArrowDown")
    assert not painted(page).any()
    for key in ("Space", "Shift+ArrowRight", "Shift+ArrowRight", "Space", "Shift+ArrowUp"):
        page.keyboard.press(key)
    once = painted(page)
    assert once[66, 96:134].all()
    assert not once[:50].any()
    assert not once[:, :80].any()
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    assert painted(page).sum() > once.sum()
    page.keyboard.press("Control+z")
    assert (painted(page) == once).all()
    page.click("#undo-mask")
    assert not painted(page).any()
    page.focus("#mask")
    page.keyboard.press("Space")
    for _ in range(30):
        page.keyboard.press("Shift+ArrowLeft")
    page.keyboard.press("Tab")
    page.focus("#mask")
    page.keyboard.press("Shift+ArrowUp")
    assert page.locator("#mask").evaluate("canvas => document.activeElement === canvas")
    row = painted(page)
    assert row[47, 0]
    assert not row[20, 0]
    page.click("#clear-mask")
    assert not painted(page).any()
    page.focus("#mask")
    page.keyboard.press("Space")
    once, box = painted(page), page.locator("#mask").bounding_box()
    for x in (5, 50):
        page.mouse.move(box["x"] + x, box["y"] + 5)
    assert (painted(page) == once).all(), "the pointer alone paints nothing"


def test_settings_are_taken_over_and_a_picture_deleted(page: Any, own: Server) -> None:
    fields = {"seed": "9", "size": "144x112", "num_inference_steps": "5", "cfg_scale": "3.5", "output_format": "webp"}
    draw(page, STAR, **fields)
    wait(page, ".card.done .picture img", 1)
    source = page.get_attribute(".card .picture img", "src")
    opened(page, own)
    page.click(".card .picture")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "flux-9.webp", "not the name that opens it"
    assert "144x112" in page.inner_text("#viewed-facts")
    page.click("#reuse")
    assert page.input_value("[name=prompt]") == STAR
    for name, value in fields.items():
        assert page.input_value(f"[name={name}]") == value
    page.select_option("[name=aspect_ratio]", "16:9")
    assert page.input_value("[name=size]") == "", "what is chosen later is what counts"
    page.click(".card .picture")
    page.click("#delete")
    wait(page, ".card", 0)
    eventually(lambda: httpx.get(source).status_code == 404)


@pytest.mark.parametrize("kind", ["gif", "avif"])
def test_a_picture_can_be_started_from_whatever_its_format(page: Any, kind: str) -> None:
    draw(page, STAR, seed="9", size="128x128", num_inference_steps="2", output_format=kind, n="2")
    wait(page, ".card.done .picture img", 2)
    page.click(".card .picture")
    assert page.inner_text("#delete") == "Delete all 2"
    page.click("#edit")
    page.locator("#editor").wait_for()
    draw(page, "a small yellow circle on a blue background", n="")
    wait(page, ".card.done", 2)


def test_a_picture_can_be_pasted_and_text_stays_text(page: Any) -> None:
    """Office programs put a picture of the text beside it."""
    paste = """async (text) => {
      const blob = await new Promise((done) => document.createElement("canvas").toBlob(done));
      const clipboardData = new DataTransfer();
      clipboardData.items.add(new File([blob], "pasted.png", { type: "image/png" }));
      for (const type of text ? ["text/plain", "text/html"] : []) clipboardData.setData(type, text);
      document.dispatchEvent(new ClipboardEvent("paste", { clipboardData }));
    }"""
    page.evaluate(paste, "")
    page.wait_for_selector("#editor:not([hidden])")
    page.click("#remove-image")
    page.evaluate(paste, "a red star")
    page.evaluate("new Promise((done) => setTimeout(done, 300))")
    assert page.locator("#drop").is_visible()


def test_a_server_that_comes_back_is_found_and_what_was_written_kept(page: Any) -> None:
    page.fill("[name=prompt]", STAR)
    page.route("**/v1/models*", lambda route: route.abort())
    page.reload()
    page.wait_for_selector("#problem:not([hidden])")
    assert page.input_value("[name=prompt]") == STAR
    page.unroute("**/v1/models*")
    page.wait_for_selector("#main-fields label")
    assert page.locator("#problem").is_hidden()
    page.click("#form .go")
    wait(page, ".card.done .picture img", 1)


def test_what_was_written_is_shown_and_never_run(page: Any, own: Server) -> None:
    text = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    draw(page, text, size="128x128", num_inference_steps="2")
    wait(page, ".card.done .picture img", 1)
    opened(page, own)
    wait(page, ".card.done .picture img", 1)
    assert page.inner_text(".card .prompt") == text
    page.click(".card .picture")
    assert page.title() == "flux-local"


def test_the_curl_line_draws_the_same(page: Any, own: Server) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    draw(page, 'a star that\'s "red"', seed="3", size="128x128", num_inference_steps="2")
    wait(page, ".card.done .picture img", 1)
    page.click("#curl")
    page.wait_for_selector("text=Copied")
    line = page.evaluate("navigator.clipboard.readText()")
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    url = httpx.Response(200, text=answer).json()["data"][0]["url"]
    pixels = np.asarray(Image.open(io.BytesIO(httpx.get(url).content)).convert("RGB"), float)
    assert (pixels == stored(page)).all()


def test_where_a_page_may_not_copy_the_curl_line_is_shown(page: Any) -> None:
    page.evaluate("navigator.clipboard.writeText = () => Promise.reject(new Error('no')); null")
    page.fill("[name=prompt]", STAR)
    page.click("#curl")
    page.locator("#curl-dialog").wait_for()
    assert STAR in page.input_value("#curl-line")
    assert page.evaluate("document.activeElement.id") == "curl-line"
    assert page.evaluate("document.activeElement.selectionEnd") > 50


def test_what_had_no_effect_is_said(page: Any) -> None:
    draw(page, "star " * 700, size="128x128", num_inference_steps="2", negative_prompt="blue")
    wait(page, ".card.done .picture img", 1)
    note = page.inner_text(".card .note")
    assert "without effect: negative prompt" in note
    assert "the prompt was too long" in note


def test_a_promise_can_be_cancelled_before_it_is_made(page: Any, own: Server) -> None:
    for _ in range(3):
        draw(page, "a snail", size="128x128", num_inference_steps="30")
    wait(page, ".card.running", 3)
    page.wait_for_selector("text=/step \\d+ of 30/")
    sent: list[Any] = []
    page.route("**/generations", lambda route: sent.append(route))
    draw(page, "a snail that nobody wants", size="128x128", num_inference_steps="30")
    page.locator(".card:has-text('nobody wants')").get_by_text("Cancel").click()
    page.wait_for_selector("text=cancelling")
    sent[0].continue_()
    wait(page, ".card.failed", 1)
    for entry in httpx.get(own.url + "/v1/images/requests").json()["data"]:
        assert "nobody wants" not in entry["params"]["prompt"]
    while (cancel := page.locator(".card.running >> text=Cancel")).count():
        cancel.first.click()


def test_older_pictures_come_though_the_last_shown_has_gone(page: Any, own: Server) -> None:
    body = {"prompt": STAR, "size": "128x128", "num_inference_steps": 1}
    for seed in range(26):
        own.post({**body, "seed": seed})
    opened(page, own)
    wait(page, ".card.done .picture img", 24)
    last = page.locator(".card").last.get_attribute("data-id")
    httpx.delete(f"{own.url}/v1/images/requests/{last}").raise_for_status()
    page.click("#older")
    wait(page, ".card.done .picture img", 26)


def test_a_small_screen_has_room_for_all_of_it(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    names = page.locator("#form :is(input, select, textarea, button):visible")
    for i in range(names.count()):
        assert names.nth(i).evaluate("field => Boolean(field.labels?.length || field.textContent.trim())")


def test_with_keys_it_asks_for_one(browser: Any, tmp_path: Path) -> None:
    with running(tmp_path, FLUX_LOCAL_API_KEYS="key-of-mine") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#key-dialog[open]")
        page.keyboard.press("Escape")
        page.wait_for_selector("#key-dialog", state="hidden")
        assert page.locator("#problem").is_visible()
        page.click("#key")
        for key in ("wrong", "key-of-mine"):
            page.fill("#key-value", key)
            with page.expect_navigation():
                page.click("#key-dialog button")
        page.wait_for_selector("#main-fields label")
        draw(page, STAR, size="128x128")
        wait(page, ".card.done .picture img", 1)
        assert page.locator("#docs").is_hidden()
        assert page.evaluate("localStorage.length") == 0
        context.close()
