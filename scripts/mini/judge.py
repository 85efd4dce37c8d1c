"""Says what a picture shows, by plain measurement: nearest palette colour, best template by overlap.

Knows the palette and the outlines, nothing of models. `judge` compares what it sees with the scene that was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .drawings import COLOURS, RADII, SHAPES, Scene, outline

NAMES = list(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], dtype=np.float32)
TEMPLATE = 48
SMALL_OR_LARGE = 0.5 * (RADII["single"]["small"][1] + RADII["single"]["large"][0])


@dataclass(frozen=True)
class Seen:
    """One thing in a picture. Centre in pixels; `radius`, a fraction of the short side, is estimated from the area."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What was right. `size` and `relation` are None where the sentence did not ask for them."""

    background: bool
    colour: bool
    shape: bool
    size: bool | None
    relation: bool | None


def mask_of(shape: str) -> np.ndarray:
    """The shape filling a square of TEMPLATE pixels."""
    picture = Image.new("L", (4 * TEMPLATE, 4 * TEMPLATE))
    points = np.array(outline(shape, 0.0, 0.0, 1.0))
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / (high - low) * (4 * TEMPLATE - 1)
    ImageDraw.Draw(picture).polygon([tuple(p) for p in scaled], fill=255)
    return np.asarray(picture.resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)) > 127


TEMPLATES = {shape: mask_of(shape) for shape in SHAPES}
# A shape's area over the square of its radius, to get the radius back from the area.
AREA = {}
for _shape in SHAPES:
    _points = np.array(outline(_shape, 0.0, 0.0, 1.0))
    _x, _y = _points[:, 0], _points[:, 1]
    AREA[_shape] = 0.5 * abs(np.dot(_x, np.roll(_y, 1)) - np.dot(_y, np.roll(_x, 1)))


def nearest_colours(pixels: np.ndarray) -> np.ndarray:
    """[..., 3] → index of the nearest palette colour."""
    distance = ((pixels[..., None, :].astype(np.float32) - PALETTE) ** 2).sum(axis=-1)
    nearest: np.ndarray = distance.argmin(axis=-1)
    return nearest


def background_of(pixels: np.ndarray) -> int:
    """The commonest colour along the border."""
    border = np.concatenate([pixels[:3].reshape(-1, 3), pixels[-3:].reshape(-1, 3),
                             pixels[:, :3].reshape(-1, 3), pixels[:, -3:].reshape(-1, 3)])  # fmt: skip
    return int(np.bincount(nearest_colours(border), minlength=len(NAMES)).argmax())


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions of at least 0.4% of the picture, the largest first: runs of rows, joined where they touch."""
    parent: list[int] = []
    runs: list[tuple[int, int, int]] = []  # row, first column, column after the last; the run's label is its index

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    above = range(0)
    for y, row in enumerate(mask):
        turns = np.flatnonzero(np.diff(row.astype(np.int8), prepend=0, append=0)).tolist()
        here = range(len(runs), len(runs) + len(turns) // 2)
        for label, start, end in zip(here, turns[::2], turns[1::2], strict=True):
            parent.append(label)
            runs.append((y, start, end))
            for other in above:
                if runs[other][1] < end and start < runs[other][2]:
                    a, b = sorted((root(label), root(other)))
                    parent[b] = a
        above = here
    regions: dict[int, np.ndarray] = {}
    for label, (y, start, end) in enumerate(runs):
        regions.setdefault(root(label), np.zeros_like(mask))[y, start:end] = True
    large = [region for region in regions.values() if region.sum() >= 0.004 * mask.size]
    return sorted(large, key=np.sum, reverse=True)


def look(picture: Image.Image) -> tuple[str, list[Seen]]:
    """The background's colour and the things on it, the largest first."""
    pixels = np.asarray(picture.convert("RGB"))
    background = background_of(pixels)
    colours = nearest_colours(pixels)
    things = []
    # Half-way to the background counts as the thing, so that a blended edge is not a third colour.
    from_background = ((pixels.astype(np.float32) - PALETTE[background]) ** 2).sum(axis=-1)
    for region in components(from_background > 40.0**2):
        inside = np.bincount(colours[region], minlength=len(NAMES))
        inside[background] = 0
        if not inside.any():
            continue
        colour = int(inside.argmax())
        to_thing = ((pixels.astype(np.float32) - PALETTE[colour]) ** 2).sum(axis=-1)
        things.append(measure(region & (to_thing < from_background), NAMES[colour]))
    return NAMES[background], [thing for thing in things if thing is not None]


def measure(mask: np.ndarray, colour: str) -> Seen | None:
    """The shape whose template, stretched to the region's bounding box, overlaps best (intersection over union)."""
    rows, columns = np.nonzero(mask)
    if len(rows) < 12:
        return None
    box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
    cut = Image.fromarray(mask.astype(np.uint8) * 255).crop(box).resize((TEMPLATE, TEMPLATE), Image.Resampling.BOX)
    cut_mask = np.asarray(cut) > 127
    overlap = {s: float((cut_mask & t).sum() / max(1, (cut_mask | t).sum())) for s, t in TEMPLATES.items()}
    shape = max(overlap, key=overlap.__getitem__)
    radius = float(np.sqrt(mask.sum() / AREA[shape])) / min(mask.shape)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    return Seen(colour, shape, centre, radius, overlap[shape])


def in_relation(first: Seen, second: Seen, relation: str) -> bool:
    (x1, y1), (x2, y2) = first.centre, second.centre
    return {"left of": x1 < x2, "right of": x1 > x2, "above": y1 < y2, "below": y1 > y2}[relation]


def judge(picture: Image.Image, scene: Scene, mentions_size: bool = True) -> Verdict:
    """Whether the picture shows the scene. With two things, each must be there, and where the relation says."""
    background, things = look(picture)
    right_background = background == scene.background
    if scene.relation is None:
        asked = scene.things[0]
        seen = things[0] if things else None
        size = None
        if mentions_size:
            size = seen is not None and (seen.radius > SMALL_OR_LARGE) == (asked.size == "large")
        return Verdict(
            right_background,
            seen is not None and seen.colour == asked.colour,
            seen is not None and seen.shape == asked.shape,
            size,
            None,
        )
    by_colour = [next((t for t in things if t.colour == asked.colour), None) for asked in scene.things]
    colour = all(t is not None for t in by_colour)
    shape = all(t is not None and t.shape == asked.shape for t, asked in zip(by_colour, scene.things, strict=True))
    first, second = by_colour
    placed = first is not None and second is not None and in_relation(first, second, scene.relation)
    return Verdict(right_background, colour, shape, None, placed and shape)
