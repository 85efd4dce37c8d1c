"""From `size`, `aspect_ratio`, `resolution` to the picture delivered and the canvas it is denoised on.

Plain arithmetic on integers; knows neither requests nor models beyond a canvas range in pixels.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from flux_local.errors import InvalidValue

GRID = 16
"""Pixels that one token covers along a side: the autoencoder's 8, times packing's 2."""

MAX_SIDE = 14142
MAX_PIXELS = 2048 * 2048
"""Of a delivered picture, unless the server is set otherwise."""
CANVAS_RATIO = 4
"""Width to height, or height to width, that a canvas may have at most."""


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height

    @property
    def tokens(self) -> int:
        """Of a canvas: one for each square of GRID by GRID pixels."""
        return self.area // GRID**2

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


RATIOS: dict[str, Size] = {
    "1:1": Size(1024, 1024),
    "4:3": Size(1183, 887),
    "3:4": Size(887, 1182),
    "5:4": Size(1145, 916),
    "4:5": Size(916, 1145),
    "3:2": Size(1254, 836),
    "2:3": Size(836, 1254),
    "16:9": Size(1365, 768),
    "9:16": Size(768, 1365),
    "21:9": Size(1563, 670),
    "9:21": Size(670, 1564),
}
"""The delivered sizes of the 1K tier."""

TIERS: dict[str, float] = {"0.5K": 0.25, "1K": 1.0}
"""Tier → its share of the 1K tier's area."""


NUMBER = r"(?:[1-9][0-9]{0,8}(?:\.[0-9]{1,12})?|0\.[0-9]{0,11}[1-9][0-9]{0,11})"
"""A positive decimal number."""
SIDE = r"(?:[1-9][0-9]{0,3}|1[0-3][0-9]{3}|140[0-9]{2}|141[0-3][0-9]|1414[0-2])"
"""1 … MAX_SIDE."""
RATIO_FORM = rf"{NUMBER}:{NUMBER}"
SIZE_FORM = rf"(?:auto|{SIDE}x{SIDE}|{RATIO_FORM})"
RESOLUTION_FORM = rf"{NUMBER}[kK]?"


@dataclass(frozen=True)
class CanvasRange:
    """The areas, in pixels, that a model was trained to compose.

    Raises:
        ValueError: no canvas has such an area.
    """

    min_area: int
    max_area: int

    def __post_init__(self) -> None:
        if not any(self.columns(rows) for rows in self.rows()):
            raise ValueError(f"no canvas has between {self.min_area} and {self.max_area} pixels")

    def rows(self) -> range:
        """Heights, in units of GRID, that a canvas may have."""
        return range(1, math.isqrt(CANVAS_RATIO * self.max_area // GRID**2) + 1)

    def columns(self, rows: int) -> range:
        """Widths, in units of GRID, that a canvas of such a height may have."""
        least = max(-(-self.min_area // (GRID**2 * rows)), -(-rows // CANVAS_RATIO))
        most = min(self.max_area // (GRID**2 * rows), CANVAS_RATIO * rows)
        return range(least, most + 1)


def parse_size(text: str) -> Size | str | None:
    """`WxH` → Size; `W:H` → the ratio as given; `auto` → None.

    Raises:
        InvalidValue: not one of these forms, or a side outside 1 … 14142.
    """
    if text.lower() == "auto":
        return None
    if match := re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", text):
        size = Size(int(match[1]), int(match[2]))
        if not re.fullmatch(SIZE_FORM, text.lower()):
            raise InvalidValue(f"Each side of 'size' must be between 1 and {MAX_SIDE} pixels.", param="size")
        return size
    if ":" in text:
        parse_ratio(text, param="size")
        return text
    raise InvalidValue(
        "'size' must be like '1024x1024' (pixels), '16:9' (a ratio) or 'auto'.", param="size"
    )  # fmt: skip


def parse_ratio(text: str, param: str = "aspect_ratio") -> float:
    """`W:H` → W/H.

    Raises:
        InvalidValue: not two positive numbers with a colon between.
    """
    if not re.fullmatch(RATIO_FORM, text):
        raise InvalidValue(f"'{param}' must be like '16:9': two positive numbers with a colon between.", param=param)
    width, _, height = text.partition(":")
    return float(width) / float(height)


def parse_resolution(value: str | float) -> float:
    """`1K`, `0.5K`, `4K` …, or a number of megapixels → area as a share of the 1K tier's.

    Raises:
        InvalidValue: neither, or not positive.
    """
    if not isinstance(value, str):
        if value > 0:
            return float(value)
    elif re.fullmatch(RESOLUTION_FORM, value):
        number = float(value.rstrip("kK"))
        return number if value == value.rstrip("kK") else number**2
    raise InvalidValue(
        "'resolution' must be a tier like '0.5K', '1K' or '4K', or a number of megapixels like 0.25 or 1.",
        param="resolution",
    )


def nearest_ratio(ratio: float) -> str:
    """The table's entry nearest to W/H by its logarithm."""
    return min(RATIOS, key=lambda name: abs(math.log(ratio / parse_ratio(name))))


def nearest_tier(area: float) -> str:
    """The tier nearest by the logarithm of the area; ties go upwards."""
    return min(TIERS, key=lambda name: (abs(math.log(area / TIERS[name])), -TIERS[name]))


def table_size(ratio: str, tier: str) -> Size:
    """The delivered size of a ratio at a tier; half sides are rounded up."""
    full = RATIOS[ratio]
    scale = math.sqrt(TIERS[tier])
    if scale == 1:
        return full
    return Size(math.ceil(full.width * scale), math.ceil(full.height * scale))


def clamp(size: Size, max_pixels: int) -> Size:
    """The size itself if it fits into `max_pixels` and MAX_SIDE, else the largest with the same ratio that does."""
    scale = min(1.0, math.sqrt(max_pixels / size.area), MAX_SIDE / max(size))
    if scale == 1:
        return size
    if size.width <= size.height:
        width = max(1, math.floor(size.width * scale))
        return Size(width, min(max(1, round(size.height * scale)), max_pixels // width, MAX_SIDE))
    height = max(1, math.floor(size.height * scale))
    return Size(min(max(1, round(size.width * scale)), max_pixels // height, MAX_SIDE), height)


def delivered_size(
    size: str | None = None,
    aspect_ratio: str | None = None,
    resolution: str | float | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Size:
    """The pixels of the answer. `size` as `WxH` wins, then ratio and tier; what is not given is 1:1 at 1K.

    Raises:
        InvalidValue: a malformed value, named in `param`, or a `size` that is another ratio than `aspect_ratio`.
    """
    asked = parse_size(size) if size is not None else None
    ratio = parse_ratio(aspect_ratio) if aspect_ratio is not None else 1.0
    area = parse_resolution(resolution) if resolution is not None else 1.0
    if isinstance(asked, Size):
        return clamp(asked, max_pixels)
    if isinstance(asked, str):
        own = parse_ratio(asked, param="size")
        if aspect_ratio is not None and nearest_ratio(own) != nearest_ratio(ratio):
            raise InvalidValue("'size' and 'aspect_ratio' are different ratios; send one of them.", param="size")
        ratio = own
    return clamp(table_size(nearest_ratio(ratio), nearest_tier(area)), max_pixels)


def canvas_for(delivered: Size, model: CanvasRange) -> Size:
    """The canvas, a multiple of 16 a side, that a delivered size is denoised on.

    It is the delivered size rounded up, if that lies in the model's range (or up to 5% over) and between 1:4 and
    4:1; else the nearest canvas inside range and ratio.
    """
    rounded = Size(*(-(-side // GRID) * GRID for side in delivered))
    in_range = model.min_area <= rounded.area <= model.max_area * 1.05
    if in_range and max(rounded) <= CANVAS_RATIO * min(rounded):
        return rounded
    ratio = min(max(delivered.width / delivered.height, 1 / CANVAS_RATIO), CANVAS_RATIO)
    area = min(max(delivered.area, model.min_area), model.max_area)
    return nearest_canvas(ratio, area, model)


def nearest_canvas(ratio: float, area: float, model: CanvasRange) -> Size:
    """The canvas inside the model's range nearest to a ratio and an area; an error in the ratio counts twice."""
    candidates = []
    for rows in model.rows():
        columns = model.columns(rows)
        for wanted in (math.floor(rows * ratio), math.ceil(rows * ratio)) if columns else ():
            size = Size(min(max(wanted, columns[0]), columns[-1]) * GRID, rows * GRID)
            off_ratio = abs(math.log(size.width / size.height / ratio))
            off_area = abs(math.log(size.area / area))
            candidates.append((off_ratio + 0.5 * off_area, size))
    return min(candidates)[1]
