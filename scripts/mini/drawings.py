"""The world of the embedded model: flat drawings and the sentences that describe them.

A `Scene` says what is in a picture; `draw` renders it with Pillow, `describe` words it, `random_scene` makes one up.
Knows nothing of models, latents or training.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 137, 22),
    "yellow": (250, 218, 56),
    "green": (42, 157, 74),
    "blue": (38, 84, 214),
    "purple": (132, 52, 168),
    "white": (250, 250, 248),
    "black": (24, 24, 28),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart")
SIZES = ("small", "large")
RELATIONS = {"left of": "horizontal", "right of": "horizontal", "above": "vertical", "below": "vertical"}

# Radii as a fraction of the picture's short side.
RADII = {
    "single": {"small": (0.14, 0.16), "large": (0.31, 0.34)},
    "pair": {"small": (0.12, 0.135), "large": (0.205, 0.225)},
}


@dataclass(frozen=True)
class Thing:
    """One shape. `centre` is a fraction of (width, height), `radius` a fraction of the short side."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background colour and one thing, or two of which the first stands in `relation` to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


@dataclass(frozen=True)
class Wording:
    """Which parts of a scene a sentence mentions, so that a judge knows what to expect."""

    text: str
    mentions_size: bool = field(default=True)
    mentions_background: bool = field(default=True)


def held_out(colour: str, shape: str, background: str) -> bool:
    """True for the tenth of all combinations that training never draws; the evaluation asks for these alone."""
    return zlib.crc32(f"{colour} {shape} on {background}".encode()) % 10 == 0


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """The polygon of a shape of radius `r` around (`cx`, `cy`), in pixels."""

    def around(angles_radii: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(cx + k * r * math.sin(a), cy - k * r * math.cos(a)) for a, k in angles_radii]

    match shape:
        case "circle":
            return around([(2 * math.pi * i / 96, 1.0) for i in range(96)])
        case "square":
            return [(cx + sx * 0.86 * r, cy + sy * 0.86 * r) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
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
                x = 16 * math.sin(t) ** 3
                y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
                points.append((cx + x / 16 * r, cy - (y + 2.5) / 16 * r))
            return points
    raise ValueError(f"no such shape: {shape}")


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """The scene as an RGB picture of `width` × `height` pixels, drawn at twice the size and box-filtered down."""
    picture = Image.new("RGB", (2 * width, 2 * height), COLOURS[scene.background])
    pen = ImageDraw.Draw(picture)
    short = 2 * min(width, height)
    for thing in scene.things:
        x, y = thing.centre[0] * 2 * width, thing.centre[1] * 2 * height
        pen.polygon(outline(thing.shape, x, y, thing.radius * short), fill=COLOURS[thing.colour])
    return picture.reduce(2)


def random_scene(rng: random.Random, width: int, height: int, pair: bool | None = None) -> Scene:
    """A scene that training may draw, composed for the shape of the canvas; `pair` forces one thing or two."""
    while True:
        background = rng.choice(list(COLOURS))
        others = [c for c in COLOURS if c != background]
        if rng.random() < 0.45 if pair is None else pair:
            first, second = rng.sample(others, 2)
            named = [(first, rng.choice(SHAPES)), (second, rng.choice(SHAPES))]
        else:
            named = [(rng.choice(others), rng.choice(SHAPES))]
        if not any(held_out(colour, shape, background) for colour, shape in named):
            break
    if len(named) == 1:
        return Scene(background, (single(rng, *named[0], rng.choice(SIZES), width, height),))
    return paired(rng, background, named, rng.choice(list(RELATIONS)), width, height)


def single(rng: random.Random, colour: str, shape: str, size: str, width: int, height: int) -> Thing:
    """One thing, about the middle."""
    radius = rng.uniform(*RADII["single"][size])
    return Thing(colour, shape, size, (rng.uniform(0.48, 0.52), rng.uniform(0.48, 0.52)), radius)


def paired(
    rng: random.Random, background: str, named: list[tuple[str, str]], relation: str, width: int, height: int
) -> Scene:
    """Two things, the first in `relation` to the second, each in its own half of the canvas."""
    horizontal = RELATIONS[relation] == "horizontal"
    first_comes_first = relation in ("left of", "above")
    things = []
    for index, (colour, shape) in enumerate(named):
        size = rng.choice(SIZES)
        radius = rng.uniform(*RADII["pair"][size])
        in_first_half = (index == 0) == first_comes_first
        along = rng.uniform(0.255, 0.275) if in_first_half else rng.uniform(0.725, 0.745)
        across = rng.uniform(0.48, 0.52)
        centre = (along, across) if horizontal else (across, along)
        things.append(Thing(colour, shape, size, centre, radius))
    return Scene(background, tuple(things), relation)


def describe(scene: Scene, rng: random.Random) -> Wording:
    """One of many sentences for the scene; size and background are sometimes left unsaid."""
    with_size = rng.random() < 0.75
    with_background = rng.random() < 0.92

    def noun(thing: Thing, article: bool) -> str:
        words = [thing.size] if with_size else []
        words += [thing.colour, thing.shape]
        return (f"{article_for(words[0])} " if article else "") + " ".join(words)

    article = rng.random() < 0.8
    if scene.relation is None:
        subject = noun(scene.things[0], article)
    else:
        first, second = (noun(thing, article) for thing in scene.things)
        relation = scene.relation
        if relation in ("left of", "right of") and rng.random() < 0.5:
            relation = f"to the {relation}"
        subject = f"{first} {relation} {second}"
    if not with_background:
        sentence = subject
    else:
        b = scene.background
        sentence = rng.choice(
            [
                f"{subject} on {article_for(b)} {b} background",
                f"{subject} on {article_for(b)} {b} background",
                f"{subject} on {b}",
                f"{subject}, {b} background",
                f"{subject} with {article_for(b)} {b} background",
                f"{subject} in front of {article_for(b)} {b} background",
                f"on {article_for(b)} {b} background, {subject}",
            ]
        )
    if rng.random() < 0.25:
        sentence = rng.choice(["a drawing of ", "a picture of ", "an image of ", "draw ", "a simple "]) + sentence
        sentence = sentence.replace("simple a ", "simple ").replace("simple an ", "simple ")
    if rng.random() < 0.3:
        sentence = sentence[0].upper() + sentence[1:]
    if rng.random() < 0.2:
        sentence += "."
    return Wording(sentence, with_size, with_background)


def article_for(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
