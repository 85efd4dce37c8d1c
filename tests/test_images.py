"""Between the canvas and the picture delivered."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_local.images import delivered, on_canvas
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
