"""Sizes: what is delivered, and the canvas it is drawn on."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flux_local import weights
from flux_local.errors import InvalidValue
from flux_local.sizes import MAX_SIDE, RATIOS, CanvasRange, Size, canvas_for, clamp, delivered_size, nearest_canvas
from tests.servers import MODEL

KREA = CanvasRange(100_000, 4_200_000)
SOME = CanvasRange(128 * 128, 192 * 192)
EMBEDDED = weights.info(MODEL).canvas
MAX = 2048 * 2048

TABLE = """1:1 1024×1024 · 4:3 1183×887 · 3:4 887×1182 · 5:4 1145×916 · 4:5 916×1145 · 3:2 1254×836 · 2:3 836×1254 ·
16:9 1365×768 · 9:16 768×1365 · 21:9 1563×670 · 9:21 670×1564"""


@pytest.mark.parametrize("row", TABLE.replace("\n", " ").split(" · "))
def test_the_table(row: str) -> None:
    ratio, size = row.split()
    width, height = map(int, size.split("×"))
    assert delivered_size(aspect_ratio=ratio) == (width, height)
    assert delivered_size(size=ratio) == (width, height)
    assert delivered_size(size=f"{width}x{height}") == (width, height)
    half = (math.ceil(width / 2), math.ceil(height / 2))
    assert delivered_size(aspect_ratio=ratio, resolution="0.5K") == half


def test_priority() -> None:
    assert delivered_size("640x480", "16:9", "0.5K") == (640, 480)
    assert delivered_size("4:3", "1.34:1", "1K") == (1183, 887)
    with pytest.raises(InvalidValue, match="'size' and 'aspect_ratio'"):
        delivered_size("4:3", "16:9")
    assert delivered_size("auto", "16:9", "1K") == (1365, 768)
    assert delivered_size(None, "16:9") == (1365, 768)
    assert delivered_size(None, None, "0.5K") == (512, 512)
    assert delivered_size() == (1024, 1024)


@pytest.mark.parametrize(
    ("ratio", "nearest"),
    [("7:1", "21:9"), ("1:7", "9:21"), ("1.9:1", "16:9"), ("1.6:1", "3:2"), ("1000:1001", "1:1"), ("2:1", "16:9")],
)
def test_any_ratio_maps_to_the_nearest_by_logarithm(ratio: str, nearest: str) -> None:
    assert delivered_size(aspect_ratio=ratio) == RATIOS[nearest]


@pytest.mark.parametrize(
    ("tier", "side"),
    [("4K", 1024), ("2K", 1024), ("1k", 1024), ("0.5K", 512), ("0.25K", 512), ("0.25", 512), (0.25, 512), (1, 1024),
     ("0.5", 1024), (0.49, 512), (50, 1024)],
)  # fmt: skip
def test_any_tier_maps_to_the_nearest_by_area_and_ties_go_upwards(tier: str | float, side: int) -> None:
    assert delivered_size(resolution=tier) == (side, side)


@pytest.mark.parametrize(
    "bad",
    ["", "big", "0x0", "-1x5", "1x14143", "99999999999x1", "1024×1024", "1e3x1e3", "1024 x 1024", "10x", "0:1", "1:0",
     "1:1:1", "٣x٣", "1024x1024\n"],
)  # fmt: skip
def test_malformed_sizes_name_the_parameter(bad: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        delivered_size(size=bad)
    assert caught.value.param == "size"


@pytest.mark.parametrize(
    ("name", "value"), [("aspect_ratio", "wide"), ("aspect_ratio", "0:0"), ("resolution", "0"), ("resolution", "xK")]
)
def test_malformed_ratios_and_tiers_name_the_parameter(name: str, value: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        delivered_size(**{name: value})
    assert caught.value.param == name


side = st.integers(1, 14142)


@given(side, side)
def test_any_size_is_delivered_exactly_or_clamped_with_its_ratio(width: int, height: int) -> None:
    got = delivered_size(size=f"{width}x{height}", max_pixels=MAX)
    if width * height <= MAX:
        assert got == (width, height)
        return
    assert got.area <= MAX
    scale = math.sqrt(MAX / (width * height))
    assert abs(got.width - width * scale) <= 1
    assert abs(got.height - height * scale) <= 1


@given(st.integers(1, 33_000_000), st.integers(1, 33_000_000))
def test_no_side_of_a_picture_is_too_long_for_its_file(width: int, height: int) -> None:
    got = clamp(Size(width, height), MAX)
    assert min(got) >= 1
    assert max(got) <= MAX_SIDE
    assert got.area <= MAX


areas = st.integers(16 * 16, 4_200_000)
ranges = st.tuples(areas, st.floats(1.1, 100.0)).map(lambda t: CanvasRange(t[0], 512 + int(t[0] * t[1])))


@example(2100, 1000, EMBEDDED)
@example(1600, 500, EMBEDDED)
@given(side, side, st.sampled_from([KREA, EMBEDDED]) | ranges)
def test_a_canvas_can_always_be_denoised(width: int, height: int, model: CanvasRange) -> None:
    delivered = delivered_size(size=f"{width}x{height}", max_pixels=MAX)
    canvas = canvas_for(delivered, model)
    assert canvas.width % 16 == 0
    assert canvas.height % 16 == 0
    assert model.min_area <= canvas.area <= model.max_area * 1.05
    if canvas.area > model.max_area:
        assert all(0 <= a - b < 16 for a, b in zip(canvas, delivered, strict=True))
    assert max(canvas) <= 4 * min(canvas)


@given(st.integers(500, 1800), st.integers(500, 1800))
def test_a_size_inside_the_range_is_rounded_up_and_no_more(width: int, height: int) -> None:
    canvas = canvas_for(Size(width, height), KREA)
    assert 0 <= canvas.width - width < 16
    assert 0 <= canvas.height - height < 16


@given(side, side, st.sampled_from([KREA, SOME, EMBEDDED]))
def test_no_canvas_of_the_range_is_nearer_in_ratio_and_area(width: int, height: int, model: CanvasRange) -> None:
    ratio = min(max(width / height, 0.25), 4.0)
    area = min(max(width * height, model.min_area), model.max_area)

    def off(size: Size) -> float:
        return abs(math.log(size.width / size.height / ratio)) + 0.5 * abs(math.log(size.area / area))

    possible = [Size(16 * w, 16 * h) for h in range(1, 64) for w in range(1, 64)]
    possible = [s for s in possible if model.min_area <= s.area <= model.max_area and max(s) <= 4 * min(s)]
    found = nearest_canvas(ratio, area, model)
    assert max(found) > 1008 or off(found) <= min(map(off, possible)) + 1e-9


@pytest.mark.parametrize("bounds", [(100, 200), (67 * 256, 67 * 256 + 1), (2000, 1000)])
def test_a_range_without_a_canvas_is_none(bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no canvas"):
        CanvasRange(*bounds)


@pytest.mark.parametrize("ratio", list(RATIOS))
def test_the_embedded_models_canvas_keeps_the_ratio(ratio: str) -> None:
    size = RATIOS[ratio]
    for model, off in ((SOME, 0.12), (EMBEDDED, 0.2)):
        canvas = canvas_for(size, model)
        assert abs(math.log(canvas.width / canvas.height * size.height / size.width)) < off
        assert canvas.area > 0.7 * model.max_area


def test_five_percent_over_the_range_is_still_denoised_as_asked() -> None:
    assert canvas_for(Size(192, 192), SOME) == (192, 192)
    assert canvas_for(Size(208, 176), SOME) == (208, 176)
    assert canvas_for(Size(512, 512), SOME) == (192, 192)
    assert canvas_for(Size(64, 64), SOME) == (128, 128)
