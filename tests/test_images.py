"""Between the canvas and the picture delivered."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_local.images import covering, delivered, on_canvas
from flux_local.sizes import Size, canvas_for
from flux_local.weights import KREA

side = st.integers(400, 1400)


@given(side, side, st.integers(0, 2**32 - 1))
def test_what_is_cropped_off_is_what_was_put_around(width: int, height: int, seed: int) -> None:
    size = Size(width, height)
    canvas = canvas_for(size, KREA.canvas)
    assert 0 <= canvas.width - width < 16
    assert 0 <= canvas.height - height < 16
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    around = on_canvas(Image.fromarray(noise), canvas, size)
    assert around.size == canvas
    assert np.array_equal(np.asarray(delivered(around.tobytes(), canvas, size)), noise)


@given(st.integers(60, 400), st.integers(60, 400), st.integers(6, 20), st.integers(6, 20))
def test_what_is_put_onto_another_canvas_comes_back_where_it_was(
    width: int, height: int, columns: int, rows: int
) -> None:
    """A slope across and one down: each pixel says where it came from."""
    size, canvas = Size(width, height), Size(16 * columns, 16 * rows)
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    slopes = np.stack([across, down, across], axis=-1).round().astype(np.uint8)
    put = on_canvas(Image.fromarray(slopes), canvas, size)
    assert put.size == canvas
    back = np.asarray(delivered(put.tobytes(), canvas, size), float)
    inside = np.s_[height // 8 : -height // 8, width // 8 : -width // 8]
    assert np.abs(back[inside] - slopes[inside]).max() < 6
    mask = Image.fromarray(np.where(slopes[..., 0] > 127, 255, 0).astype(np.uint8))
    again = np.asarray(on_canvas(mask, canvas, size))
    assert set(np.unique(again)) <= {0, 255}
    assert abs((again > 0).mean(axis=1).max() - 0.5) < 0.05, "the mask lies on what it lay on"


def thirds(width: int, height: int) -> Image.Image:
    """Red, green and blue, side by side."""
    picture = Image.new("RGB", (width, height), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, width // 3, height))
    picture.paste((0, 0, 255), (width - width // 3, 0, width, height))
    return picture


def test_it_is_the_middle_that_is_kept() -> None:
    wide = thirds(200, 100)
    for middle in (covering(wide, Size(60, 100)), delivered(wide.tobytes(), Size(200, 100), Size(60, 100))):
        assert middle.size == (60, 100)
        assert (np.asarray(middle) == (0, 255, 0)).all()
    canvas = Image.new("RGB", (112, 96), (0, 0, 0))
    canvas.paste((255, 255, 255), (5, 3, 107, 93))
    assert (np.asarray(delivered(canvas.tobytes(), Size(112, 96), Size(102, 90))) == 255).all(), "cropped at the centre"
