"""The PNG files that are delivered: Pillow reads from them what was written."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from flux_local import png

side = st.integers(1, 40)


def read(file: bytes) -> Image.Image:
    Image.open(io.BytesIO(file)).verify()
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return picture


def written(pixels: np.ndarray) -> bytes:
    return png.encode(Image.fromarray(pixels), PngImagePlugin.PngInfo())


@given(side, side, st.integers(0, 2**32 - 1), st.sampled_from((1, 4, 256)))
def test_pixels_come_back(width: int, height: int, seed: int, values: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, values, (height, width, 3), dtype=np.uint8)
    found = read(written(pixels))
    assert (found.mode, found.size) == ("RGB", (width, height))
    assert np.array_equal(np.asarray(found), pixels)


@pytest.mark.parametrize("rows", [512, 683, 1024])
def test_a_picture_of_several_strips_comes_back(rows: int) -> None:
    """683 rows of 512 pixels are a little more than one."""
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 512, 3), dtype=np.uint8)
    pixels[: rows // 2] //= 64
    file = written(pixels)
    assert np.array_equal(np.asarray(read(file)), pixels)
    assert file == written(pixels), "the same picture, the same file"


@pytest.mark.parametrize("text", ["a red star\nSteps: 8", "ein roter Stern ☆ auf 青"])
def test_texts_come_back(text: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    file = png.encode(Image.new("RGB", (3, 2)), info)
    assert read(file).info["parameters"] == text


def test_flat_and_smooth_pictures_are_about_as_small_as_by_pillow() -> None:
    flat = Image.new("RGB", (512, 512), (20, 90, 200))
    flat.paste((250, 240, 10), (100, 120, 300, 400))
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = coarse.resize((512, 512), Image.Resampling.BICUBIC)
    for picture in (flat, smooth):
        by_pillow = io.BytesIO()
        picture.save(by_pillow, "PNG", compress_level=1)
        assert len(png.encode(picture, PngImagePlugin.PngInfo())) < 1.2 * len(by_pillow.getvalue())
