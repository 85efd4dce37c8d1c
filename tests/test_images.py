"""Between the canvas and the picture delivered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mini.drawings import COLOURS, Scene, Thing, draw
from PIL import Image, ImageOps

from flux_local.images import delivered, on_canvas
from flux_local.sizes import Size, canvas_for
from flux_local.weights import KREA, info
from tests.servers import MODEL

MINI = info(MODEL).canvas

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


@pytest.mark.parametrize("size", [Size(512, 512), Size(1024, 576), Size(400, 1200)])
def test_an_enlargement_has_no_halos_and_is_as_sharp(size: Size) -> None:
    canvas = canvas_for(size, MINI)
    scene = Scene("blue", (Thing("orange", "star", "large", (0.5, 0.5), 0.33),))
    small = draw(scene, *canvas)
    made = np.asarray(delivered(small.tobytes(), canvas, size), dtype=int)
    colours = np.array([COLOURS["blue"], COLOURS["orange"]])
    assert (made >= colours.min(axis=0)).all()
    assert (made <= colours.max(axis=0)).all()
    wanted = np.asarray(draw(scene, *size), dtype=int)
    usual = np.asarray(ImageOps.fit(small, size, method=Image.Resampling.LANCZOS), dtype=int)
    assert ((made - wanted) ** 2).mean() <= ((usual - wanted) ** 2).mean()
