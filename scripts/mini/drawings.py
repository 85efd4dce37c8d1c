"""The worlds of the embedded model: flat drawings.

A `Scene` says what is in a picture; `draw` renders it with Pillow, `random_scene` makes one up. A `World` says which
colours, shapes, sizes, backgrounds and arrangements there are: FIRST is small, WHOLE has it all. Knows nothing of words
(`sentences` does), models, latents or training.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (247, 137, 22),
    "yellow": (250, 218, 56),
    "green": (42, 157, 74),
    "blue": (38, 84, 214),
    "purple": (132, 52, 168),
    "white": (250, 250, 248),
    "black": (24, 24, 28),
    "pink": (244, 143, 190),
    "brown": (121, 74, 38),
    "cyan": (48, 190, 196),
    "grey": (142, 142, 146),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "arrow", "moon", "hourglass")
RELATIONS = {"left of": "horizontal", "right of": "horizontal", "above": "vertical", "below": "vertical"}
BACKWARDS = ("right of", "below")  # the relations that name the second place first
ROWS = {"from left to right": "horizontal", "from top to bottom": "vertical"}  # of three things
PATTERNS = ("plain", "striped", "gradient")  # bands of two colours; from one at the top to another at the bottom
BANDS = 8
PLACES: dict[str, tuple[float, float]] = {
    "top left corner": (0.26, 0.26),
    "top right corner": (0.74, 0.26),
    "bottom left corner": (0.26, 0.74),
    "bottom right corner": (0.74, 0.74),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
}

# The radii there are, as fractions of the picture's `unit`, by how many things there are; `placed` is one away from the
# middle.
RADII: dict[str, dict[str, tuple[float, ...]]] = {
    "single": {"small": (0.14, 0.16), "medium": (0.22, 0.24), "large": (0.31, 0.34)},
    "placed": {"small": (0.135,), "medium": (0.17,), "large": (0.21,)},
    "pair": {"small": (0.145,), "medium": (0.175,), "large": (0.215,)},
    "three": {"small": (0.11,), "medium": (0.1275,), "large": (0.145,)},
}
MIDDLES = {1: (0.5,), 2: (0.265, 0.735), 3: (1 / 6, 0.5, 5 / 6)}  # where things stand in order along the picture
# Pixels that a centre and a radius are multiples of. The first is a cell of latents: an outline then cuts the cells in
# a few ways, which a small model can know by heart. Of those between them it makes a guess, and draws wavering edges.
CELL, FINEST = 8, 2


@dataclass(frozen=True)
class World:
    """What there is. `most`: things in a picture; `places`: whether one may be away from the middle; `words`: whether
    sentences use other names, plurals and words that mean nothing to a drawing."""

    name: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[str, ...]
    patterns: tuple[str, ...]
    most: int
    places: bool
    words: bool


FIRST = World("first", tuple(COLOURS)[:8], SHAPES[:6], ("small", "large"), ("plain",), 2, False, False)
WHOLE = World("whole", tuple(COLOURS), SHAPES, ("small", "medium", "large"), PATTERNS, 3, True, True)
WORLDS = {world.name: world for world in (FIRST, WHOLE)}


@dataclass(frozen=True)
class Thing:
    """One shape. `centre` is a fraction of (width, height), `radius` of the picture's `unit`."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and one thing, two of which the first stands in `relation` to the second, or three in order.

    Where `pattern` is not plain, the background has a `second` colour. `place` is one of PLACES, of one thing alone.
    """

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    pattern: str = "plain"
    second: str | None = None
    place: str | None = None


def held_out(colour: str, shape: str, background: str) -> bool:
    """True for the tenth of all combinations that training never draws; the evaluation asks for these alone."""
    return zlib.crc32(f"{colour} {shape} on {background}".encode()) % 10 == 0


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """The polygon of a shape of radius `r` around (`cx`, `cy`), in pixels."""

    def around(angles_radii: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + k * r * math.sin(a), cy - k * r * math.cos(a)) for a, k in angles_radii]

    def scaled(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + x * r, cy + y * r) for x, y in points]

    match shape:
        case "circle":
            return around([(2 * math.pi * i / 96, 1.0) for i in range(96)])
        case "square":
            return scaled([(sx * 0.86, sy * 0.86) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))])
        case "triangle":
            return [(cx, cy - 0.95 * r), (cx + r, cy + 0.8 * r), (cx - r, cy + 0.8 * r)]
        case "star":
            return around([(math.pi * i / 5, 1.08 if i % 2 == 0 else 0.45) for i in range(10)])
        case "diamond":
            return [(cx, cy - 1.1 * r), (cx + 0.8 * r, cy), (cx, cy + 1.1 * r), (cx - 0.8 * r, cy)]
        case "heart":
            points = []
            for i in range(96):
                t = 2 * math.pi * i / 96
                x = 16.0 * math.sin(t) ** 3
                y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
                points.append((cx + x / 16 * r, cy - (y + 2.5) / 16 * r))
            return points
        case "cross":
            corners = ((-1, -1), (1, -1), (1, 1), (-1, 1))
            arm, end = 0.34, 0.98
            return scaled(
                [p for x, y in corners for p in ((x * end, y * arm), (x * arm, y * arm), (x * arm, y * end))[:: x * y]]
            )
        case "arrow":
            half = [(0.0, -1.05), (0.85, -0.1), (0.36, -0.1), (0.36, 0.95)]
            return scaled(half + [(-x, y) for x, y in reversed(half[1:])])
        case "moon":
            tip = math.radians(50)
            middle, inner = 0.55, math.hypot(math.cos(tip) - 0.55, math.sin(tip))
            meet = math.atan2(math.sin(tip), math.cos(tip) - middle)
            outer = [tip + (2 * math.pi - 2 * tip) * i / 64 for i in range(65)]
            back = [-meet - (2 * math.pi - 2 * meet) * i / 48 for i in range(1, 48)]
            return scaled(
                [(math.cos(a), math.sin(a)) for a in outer]
                + [(middle + inner * math.cos(a), inner * math.sin(a)) for a in back]
            )
        case "hourglass":
            return scaled([(-0.85, -1.0), (0.85, -1.0), (0.14, 0.0), (0.85, 1.0), (-0.85, 1.0), (-0.14, 0.0)])
    raise ValueError(f"no such shape: {shape}")


def middle_of(shape: str) -> tuple[float, float, float]:
    """Area and centre of gravity of an outline of radius 1, by the shoelace formula."""
    points = outline(shape, 0.0, 0.0, 1.0)
    area = x = y = 0.0
    for (ax, ay), (bx, by) in pairwise([*points, points[0]]):
        cross = ax * by - bx * ay
        area, x, y = area + cross / 2, x + (ax + bx) * cross / 6, y + (ay + by) * cross / 6
    return abs(area), x / area, y / area


def on_lattice(scene: Scene, width: int, height: int) -> Scene:
    """The scene with each centre at the nearest corner of a cell of the canvas, each radius the nearest there is."""
    pixels = unit(scene, width, height)

    def moved(thing: Thing) -> Thing:
        x, y = (
            CELL * round(part * side / CELL) / side for part, side in zip(thing.centre, (width, height), strict=True)
        )
        return replace(thing, centre=(x, y), radius=FINEST * round(thing.radius * pixels / FINEST) / pixels)

    return replace(scene, things=tuple(moved(thing) for thing in scene.things))


def group(scene: Scene) -> str:
    """The entry of RADII that the scene's things are of."""
    if len(scene.things) > 1:
        return "pair" if len(scene.things) == 2 else "three"
    return "single" if scene.place is None else "placed"


def unit(scene: Scene, width: int, height: int) -> float:
    """The pixels that radii are fractions of: the side of the square of the same area, or as much as there is room for.

    So a wide or tall picture has things of the size that a square one has, if they fit into it.
    """
    side, short = math.sqrt(width * height), min(width, height)
    if scene.relation is not None:
        return min(side, width if (RELATIONS | ROWS)[scene.relation] == "horizontal" else height)
    return min(side, short if scene.place is not None else 1.3 * short)


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an RGB picture of `width` × `height` pixels, drawn at twice the size and box-filtered down."""
    picture = Image.new("RGB", (2 * width, 2 * height), COLOURS[scene.background])
    pen = ImageDraw.Draw(picture)
    if scene.second is not None:
        for row in range(2 * height):
            pen.line(((0, row), (2 * width, row)), fill=row_colour(scene, (row + 0.5) / (2 * height)))
    pixels = 2 * unit(scene, width, height)
    for thing in scene.things:
        x, y = thing.centre[0] * 2 * width, thing.centre[1] * 2 * height
        pen.polygon(outline(thing.shape, x, y, thing.radius * pixels), fill=COLOURS[thing.colour])
    return picture.reduce(2)


def painted(scenes: list[Scene], width: int, height: int) -> np.ndarray:
    """uint8 [scenes, height, width, 3]."""
    return np.stack([np.asarray(draw(scene, width, height)) for scene in scenes])


def row_colour(scene: Scene, depth: float) -> Rgb:
    """The background's colour at a depth from 0 (top) to 1."""
    first = COLOURS[scene.background]
    second = first if scene.second is None else COLOURS[scene.second]
    share = depth if scene.pattern == "gradient" else float(int(depth * BANDS) % 2)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def stands_out(colour: str, first: str, second: str | None) -> bool:
    """Whether a thing of the colour can be seen everywhere between the background's two."""
    if second is None:
        return colour != first
    point, a, b = (COLOURS[name] for name in (colour, first, second))
    span = [y - x for x, y in zip(a, b, strict=True)]
    along = sum(d * (p - x) for d, p, x in zip(span, point, a, strict=True)) / sum(d * d for d in span)
    near = [x + min(max(along, 0.0), 1.0) * d for x, d in zip(a, span, strict=True)]
    return math.dist(near, point) > 80


def random_scene(
    rng: random.Random,
    width: int,
    height: int,
    things: int | None = None,
    world: World = FIRST,
    held: bool = False,
    pattern: str | None = None,
    placed: bool | None = None,
) -> Scene:
    """A scene that training may draw, composed for the shape of the canvas.

    Args:
        things: how many; by chance if not said.
        held: instead, one that training never draws: the first thing is a held-out combination.
        pattern, placed: of the background, and whether one thing has a place; by chance if not said.
    """
    count = things or rng.choices((1, 2, 3)[: world.most], (0.4, 0.4, 0.2)[: world.most])[0]
    pattern = pattern or ("plain" if rng.random() < 0.7 else rng.choice(world.patterns))
    while True:
        background, second, *rest = rng.sample(world.colours, len(world.colours))
        between = None if pattern == "plain" else second
        others = [c for c in (second, *rest) if stands_out(c, background, between)]
        if len(others) < count:
            continue
        named = [(colour, rng.choice(world.shapes)) for colour in rng.sample(others, count)]
        out = [held_out(colour, shape, background) for colour, shape in named]
        if out[0] if held else not any(out):
            break
    relation = place = None
    if count == 1:
        size = rng.choice(world.sizes)
        placed = world.places and rng.random() < 0.4 if placed is None else placed
        place = rng.choice(list(PLACES)) if placed else None
        arranged = [single(rng, *named[0], size, place)]
    elif count == 2:
        relation = rng.choice(list(RELATIONS))
        if world.words and rng.random() < 0.1:  # two of a kind
            relation, named = "left of", [named[0]] * 2
        arranged = paired(rng, named, relation, world.sizes)
    else:
        relation = rng.choice(list(ROWS))
        arranged = in_a_row(rng, named, relation, world.sizes)
    return on_lattice(Scene(background, tuple(arranged), relation, pattern, between, place), width, height)


def single(rng: random.Random, colour: str, shape: str, size: str, place: str | None = None) -> Thing:
    """One thing, in the middle or at its place."""
    radius = rng.choice(RADII["single" if place is None else "placed"][size])
    return Thing(colour, shape, size, (0.5, 0.5) if place is None else PLACES[place], radius)


def paired(rng: random.Random, named: list[tuple[str, str]], relation: str, sizes: tuple[str, ...]) -> list[Thing]:
    """Two things, the first in `relation` to the second, each in its own half of the canvas."""
    horizontal = RELATIONS[relation] == "horizontal"
    first_comes_first = relation not in BACKWARDS
    alike = named[0] == named[1]
    common = rng.choice(sizes)
    things = []
    for index, (colour, shape) in enumerate(named):
        size = common if alike else rng.choice(sizes)
        radius = rng.choice(RADII["pair"][size])
        in_first_half = (index == 0) == first_comes_first
        along = MIDDLES[2][0 if in_first_half else 1]
        things.append(Thing(colour, shape, size, (along, 0.5) if horizontal else (0.5, along), radius))
    return things


def in_a_row(rng: random.Random, named: list[tuple[str, str]], relation: str, sizes: tuple[str, ...]) -> list[Thing]:
    """Three things in the order in which they are named."""
    things = []
    for index, (colour, shape) in enumerate(named):
        size = rng.choice(sizes)
        along = MIDDLES[3][index]
        centre = (along, 0.5) if ROWS[relation] == "horizontal" else (0.5, along)
        things.append(Thing(colour, shape, size, centre, rng.choice(RADII["three"][size])))
    return things
