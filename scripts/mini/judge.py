"""Says what a picture shows, by plain measurement: nearest palette colour, best outline by overlap.

A background has one colour in each row. Knows the palette and the outlines, nothing of models. `judge` compares what it
sees with the scene that was asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import mean

import numpy as np
from PIL import Image, ImageDraw

from .drawings import (
    BACKWARDS,
    BANDS,
    COLOURS,
    FIRST,
    PLACES,
    RADII,
    RELATIONS,
    ROWS,
    SHAPES,
    Rgb,
    Scene,
    World,
    middle_of,
    outline,
    unit,
)

NAMES = list(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], dtype=np.float32)
FINE = 4
"""Subpixels a side of a pixel, of what a thing is compared with."""
LEAST = 0.75
"""Overlap with the best outline under which a thing has no shape."""


@dataclass(frozen=True)
class Seen:
    """One thing in a picture. Centre and radius in pixels, the latter estimated from the area. `shape` may be empty."""

    colour: str
    shape: str
    centre: tuple[float, float]
    radius: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What was right. `size` and `relation` are None where the sentence did not ask for them.

    `outline` is the mean overlap of the things with their best outlines, 0 for one that is not there.
    """

    background: bool
    colour: bool
    shape: bool
    size: bool | None
    relation: bool | None
    place: bool | None = None
    outline: float = 0.0

    @property
    def perfect(self) -> bool:
        """Everything that was asked for is right."""
        return False not in (self.background, self.colour, self.shape, self.size, self.relation, self.place)


MIDDLES = {shape: middle_of(shape) for shape in SHAPES}


def nearest_colours(pixels: np.ndarray, world: World = FIRST) -> np.ndarray:
    """[..., 3] → index of the world's nearest colour."""
    palette = PALETTE[[NAMES.index(name) for name in world.colours]]
    distance = ((pixels[..., None, :].astype(np.float32) - palette) ** 2).sum(axis=-1)
    nearest: np.ndarray = distance.argmin(axis=-1)
    return nearest


def rows_of(pixels: np.ndarray) -> np.ndarray:
    """[rows, 3]: the background's colour in each row, as the picture's left and right edges have it."""
    edges: np.ndarray = np.median(np.concatenate([pixels[:, :4], pixels[:, -4:]], axis=1), axis=1)
    return edges.astype(np.float32)


def background_is(rows: np.ndarray, scene: Scene, world: World = FIRST) -> bool:
    """Whether the rows' colours are the scene's background, its pattern included."""
    seen = [world.colours[i] for i in nearest_colours(rows, world)]
    if scene.second is None:
        return seen.count(scene.background) >= 0.9 * len(seen)
    if scene.pattern == "gradient":
        margin = max(1, len(seen) // 32)
        towards = rows @ (np.array(COLOURS[scene.second]) - np.array(COLOURS[scene.background])).astype(np.float32)
        rises = bool((np.diff(towards[:: max(1, len(rows) // 8)]) > 0).all())
        return {*seen[:margin]} == {scene.background} and {*seen[-margin:]} == {scene.second} and rises
    middles = [seen[int((band + 0.5) * len(seen) / BANDS)] for band in range(BANDS)]
    return middles == [scene.background, scene.second] * (BANDS // 2)


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


def look(picture: Image.Image, world: World = FIRST) -> tuple[str, list[Seen]]:
    """The background's commonest colour and the things on it, the largest first."""
    pixels = np.asarray(picture.convert("RGB"))
    rows = rows_of(pixels)
    counts = np.bincount(nearest_colours(rows, world), minlength=len(world.colours))
    colours = nearest_colours(pixels, world)
    things = []
    # Half-way to the background counts as the thing, so that a blended edge is not a third colour.
    from_background = ((pixels.astype(np.float32) - rows[:, None]) ** 2).sum(axis=-1)
    for region in components(from_background > 40.0**2):
        inside = np.bincount(colours[region & (from_background > 70.0**2)], minlength=len(world.colours))
        if not inside.any():
            continue
        name = world.colours[int(inside.argmax())]
        things.append(measure(np.where(region, cover(pixels, rows, COLOURS[name]), 0.0), name, world))
    return world.colours[int(counts.argmax())], [thing for thing in things if thing is not None]


def cover(pixels: np.ndarray, rows: np.ndarray, colour: Rgb) -> np.ndarray:
    """[height, width]: how much of each pixel is a thing's colour, from 0 for the background's to 1."""
    away = np.array(colour, np.float32) - rows[:, None]
    along = ((pixels.astype(np.float32) - rows[:, None]) * away).sum(axis=-1)
    share: np.ndarray = (along / np.maximum((away**2).sum(axis=-1), 1.0)).clip(0.0, 1.0)
    return share


def softness(picture: Image.Image, scene: Scene) -> float:
    """How wide the edge of a scene's one thing is: pixels neither of its colour nor the background's, by 15% at least,
    over the root of the thing's area, so that size makes no difference. NaN if it is not there.
    """
    pixels = np.asarray(picture.convert("RGB"))
    share = cover(pixels, rows_of(pixels), COLOURS[scene.things[0].colour])
    area = int((share > 0.5).sum())
    return int(((share > 0.15) & (share < 0.85)).sum()) / math.sqrt(area) if area else math.nan


def measure(share: np.ndarray, colour: str, world: World = FIRST) -> Seen | None:
    """The shape whose outline of the same area about the same centre of gravity overlaps best.

    Overlap is intersection over union of how much each pixel is covered: blunt corners and soft edges cost some of it,
    and make no other shape of a thing.
    """
    total = float(share.sum())
    if total < 12:
        return None
    rows, columns = np.nonzero(share > 0)
    left, top = int(columns.min()), int(rows.min())
    cut = share[top : rows.max() + 1, left : columns.max() + 1]
    x = float((cut.sum(axis=0) * (np.arange(cut.shape[1]) + 0.5)).sum()) / total
    y = float((cut.sum(axis=1) * (np.arange(cut.shape[0]) + 0.5)).sum()) / total
    found = []
    for shape in world.shapes:
        area, off_x, off_y = MIDDLES[shape]
        radius = math.sqrt(total / area)
        centre = (x - off_x * radius, y - off_y * radius)
        drawn = covered(shape, centre, radius, cut.shape)
        # What of the outline lies outside the thing's own box is in no pixel of both.
        overlap = float(np.minimum(cut, drawn).sum() / (np.maximum(cut, drawn).sum() + total - drawn.sum()))
        found.append(Seen(colour, shape, (left + centre[0], top + centre[1]), radius, overlap))
    best = max(found, key=lambda seen: seen.overlap)
    return best if best.overlap >= LEAST else replace(best, shape="")


def covered(shape: str, centre: tuple[float, float], radius: float, size: tuple[int, ...]) -> np.ndarray:
    """[height, width]: how much of each pixel an outline covers, which may reach beyond."""
    height, width = size
    picture = Image.new("L", (FINE * width, FINE * height))
    ImageDraw.Draw(picture).polygon(outline(shape, FINE * centre[0], FINE * centre[1], FINE * radius), fill=255)
    return np.asarray(picture.reduce(FINE), dtype=np.float32) / 255


def in_order(things: list[Seen], relation: str) -> bool:
    """Whether things lie as the relation says: of two the first to the second, or three as they are named."""
    axis = 0 if (RELATIONS | ROWS)[relation] == "horizontal" else 1
    along = [thing.centre[axis] for thing in things]
    if relation in BACKWARDS:
        along.reverse()
    return all(a < b for a, b in pairwise(along))


def size_of(seen: Seen, group: str, world: World, pixels: float) -> str:
    """The size whose radii are nearest, in a picture with a `unit` of so many pixels."""
    return min(world.sizes, key=lambda size: abs(mean(RADII[group][size]) - seen.radius / pixels))


def judge(picture: Image.Image, scene: Scene, mentions_size: bool = True, world: World = FIRST) -> Verdict:
    """Whether the picture shows the scene. Of several things each must be there, and where the relation says."""
    things = look(picture, world)[1]
    background = background_is(rows_of(np.asarray(picture.convert("RGB"))), scene, world)
    if scene.relation is None:
        asked = scene.things[0]
        seen = things[0] if things else None
        size = place = None
        if mentions_size:
            group = "single" if scene.place is None else "placed"
            size = seen is not None and size_of(seen, group, world, unit(scene, *picture.size)) == asked.size
        if scene.place is not None:
            at = None if seen is None else (seen.centre[0] / picture.width, seen.centre[1] / picture.height)
            place = at is not None and math.dist(at, PLACES[scene.place]) < 0.15
        right = seen is not None and seen.colour == asked.colour
        shape = seen is not None and seen.shape == asked.shape
        return Verdict(background, right, shape, size, None, place, 0.0 if seen is None else seen.overlap)
    left = list(things)
    found: list[Seen | None] = []
    for asked in scene.things:
        match = next((t for t in left if (t.colour, t.shape) == (asked.colour, asked.shape)), None)
        match = match or next((t for t in left if t.colour == asked.colour), None)
        if match is not None:
            left.remove(match)
        found.append(match)
    there = [seen for seen in found if seen is not None]
    colour = len(there) == len(scene.things)
    shape = colour and all(t.shape == asked.shape for t, asked in zip(there, scene.things, strict=True))
    alike = len({(t.colour, t.shape) for t in scene.things}) == 1
    related = shape and (alike or in_order(there, scene.relation))
    overlap = sum(seen.overlap for seen in there) / len(scene.things)
    return Verdict(background, colour, shape, None, related, None, overlap)
