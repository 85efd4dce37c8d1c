"""Decodes one uploaded picture in a process of its own, with little memory, little time, and nothing to lose.

Run as a program: the upload on standard input, a header and plain pixels on standard output. A picture that brings
the decoder down brings down this process only. `SafeDecoder` is the parent's side; it keeps one process started, so
that a request does not wait for an interpreter.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import resource
import signal
import struct
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Literal

from flux_local.errors import InternalError, InvalidImage

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 33_000_000
MEMORY = 2 << 30
CPU_SECONDS = 20
FORMATS = ("PNG", "JPEG", "WEBP")
HEADER = struct.Struct("<BII")
OK, BAD, LARGE, NO_ALPHA = range(4)

Purpose = Literal["image", "mask"]
Decode = Callable[[bytes, Purpose], Awaitable[tuple[int, int, bytes]]]

WORDS = {
    BAD: "This is no PNG, JPEG or WebP picture that can be read. Check the file, or save it again as PNG.",
    LARGE: f"The picture has more than {MAX_PIXELS // 1_000_000} megapixels. Make it smaller.",
    NO_ALPHA: "The mask has no transparency. Send a PNG whose transparent parts are to be repainted.",
}


class SafeDecoder:
    """Gives each upload a fresh process; never more than a few at once, if they are decoded in turn."""

    def __init__(self, at_once: int = 4) -> None:
        self._spare: asyncio.Task[asyncio.subprocess.Process] | None = None
        self._slots = asyncio.Semaphore(at_once)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[Decode]:
        """Waits for one of a few turns, and gives `decode`. A turn is to last until what was decoded is small again: a
        hundred kilobytes may become a hundred megabytes."""
        async with self._slots:
            yield self.decode

    async def decode(self, data: bytes, purpose: Purpose) -> tuple[int, int, bytes]:
        """Width, height and rows: RGB for an image; a byte a pixel, 255 where to repaint, for a mask.

        Raises:
            InvalidImage: not a picture, too large, a mask without alpha, or one that the decoder died of.
            InternalError: no process could be started.
        """
        process = await self._take()
        try:
            async with asyncio.timeout(2 * CPU_SECONDS):
                out, _ = await process.communicate(purpose[:1].encode() + data)
        except TimeoutError:
            out = b""
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        status, width, height = HEADER.unpack_from(out) if len(out) >= HEADER.size else (BAD, 0, 0)
        return checked((status, width, height, out[HEADER.size :]), purpose)

    async def close(self) -> None:
        if self._spare is not None:
            with contextlib.suppress(OSError):  # gone already, or never started
                process = await self._spare
                process.kill()
                await process.communicate()

    async def _take(self) -> asyncio.subprocess.Process:
        """A process of the caller's own. The spare is taken before anything is awaited, so that no two get the same."""
        spare, self._spare = self._spare, None
        process = None
        if spare is not None:
            with contextlib.suppress(OSError):
                process = await spare
        try:
            if process is None or process.returncode is not None:
                process = await self._start()
        except OSError as error:
            raise InternalError("The server cannot start the process that reads pictures. Ask its operator.") from error
        if self._spare is None:
            self._spare = asyncio.create_task(self._start())
        return process

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "flux_local.decoder", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip


def checked(decoded: tuple[int, int, int, bytes], purpose: Purpose) -> tuple[int, int, bytes]:
    """Width, height and rows; raises `InvalidImage` for any status but OK."""
    status, width, height, rows = decoded
    if status != OK:
        raise InvalidImage(WORDS[status], param=purpose)
    return width, height, rows


def decode_own(data: bytes, purpose: Purpose) -> tuple[int, int, bytes]:
    """As `SafeDecoder.decode`, in this process: for files that the user of this process chose."""
    return checked(decode(data, purpose), purpose)


def decode(data: bytes, purpose: Purpose) -> tuple[int, int, int, bytes]:
    """Status, width, height and rows. For a stranger's bytes, run in the child."""
    from PIL import Image, ImageOps

    # Pillow's own guard would only warn; the header decides before a pixel is read.
    Image.MAX_IMAGE_PIXELS = None
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                return LARGE, 0, 0, b""
            opened.load()
            picture: Image.Image = ImageOps.exif_transpose(opened)
            if purpose == "mask":
                picture = in_8_bits(picture)
                if not picture.has_transparency_data:
                    return NO_ALPHA, 0, 0, b""
                alpha = picture.convert("RGBA").getchannel("A")
                return OK, *picture.size, alpha.point([255] * 128 + [0] * 128).tobytes()
            return OK, *picture.size, flattened(picture).tobytes()
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError):
        return BAD, 0, 0, b""


def in_8_bits(picture: Image.Image) -> Image.Image:
    """A grey picture of 16 bits with 8, and what it says is transparent as alpha; any other as it is."""
    from PIL import ImageMath

    if not picture.mode.startswith("I"):
        return picture
    deep, clear = picture.convert("I"), picture.info.get("transparency")
    grey = deep.point(lambda value: value / 257).convert("L")
    grey.info.pop("transparency", None)
    if isinstance(clear, int):
        grey.putalpha(ImageMath.lambda_eval(lambda given: (given["deep"] != clear) * 255, deep=deep).convert("L"))
    return grey


def flattened(picture: Image.Image) -> Image.Image:
    """RGB, transparency on white, 16 bits reduced to 8."""
    from PIL import Image

    picture = in_8_bits(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        page = Image.new("RGBA", picture.size, "white")
        page.alpha_composite(picture)
        picture = page
    return picture.convert("RGB")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # for the server, which ends in order and this with it
        signal.signal(number, signal.SIG_IGN)
    from PIL import JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    purpose, data = sys.stdin.buffer.read(1), sys.stdin.buffer.read()
    if not purpose:
        return  # the parent has gone
    status, width, height, rows = decode(data, "mask" if purpose == b"m" else "image")
    sys.stdout.buffer.write(HEADER.pack(status, width, height) + rows)


if __name__ == "__main__":
    main()
