"""Sentences that describe a scene, in the words that a world allows. Knows nothing of how a scene looks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from .drawings import FIRST, Scene, Thing, World

Words = Callable[[str], str]  # a name → one of its names

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "yellow": ("golden",),
    "green": ("emerald",),
    "blue": ("azure", "cobalt"),
    "purple": ("violet",),
    "pink": ("rose",),
    "brown": ("chocolate",),
    "cyan": ("turquoise", "teal"),
    "grey": ("gray",),
    "small": ("little", "tiny"),
    "medium": ("medium-sized",),
    "large": ("big", "huge"),
    "circle": ("disc",),
    "diamond": ("rhombus",),
    "cross": ("plus",),
    "moon": ("crescent",),
    "background": ("backdrop",),
    "above": ("over", "on top of"),
    "below": ("under", "beneath", "underneath"),
    "left of": ("next to", "beside"),
}
IDLE = "simple"  # of all sentences; says nothing of a drawing, as these:
ADJECTIVES = ("beautiful", "shiny", "lonely", "lovely", "flat", "perfect", "cute", "simple")
ENDINGS = (
    "for a poster",
    "as in a dream",
    "in the style of a children's book",
    "drawn with great care",
    "for my friend",
)


@dataclass(frozen=True)
class Wording:
    """Which parts of a scene a sentence mentions, so that a judge knows what to expect."""

    text: str
    mentions_size: bool = field(default=True)
    mentions_background: bool = field(default=True)


def describe(scene: Scene, rng: random.Random, world: World = FIRST) -> Wording:
    """One of many sentences for the scene; the background is sometimes left unsaid, sizes only if all are large."""
    with_size = rng.random() < 0.75 or any(thing.size != "large" for thing in scene.things)
    with_background = rng.random() < 0.92
    article = rng.random() < 0.8

    def word(name: str) -> str:
        others = OTHER_NAMES.get(name, ())
        return rng.choice(others) if world.words and others and rng.random() < 0.3 else name

    def noun(thing: Thing, article: bool, plural: str = "") -> str:
        words = [word(thing.size)] if with_size else []
        if world.words and len(scene.things) < 3 and rng.random() < 0.1:
            words.insert(0, rng.choice(ADJECTIVES))
        words += [word(thing.colour), word(thing.shape)]
        if plural:
            words[-1] += "es" if words[-1].endswith(("s", "x")) else "s"
            return " ".join([plural, *words])
        return (f"{article_for(words[0])} " if article else "") + " ".join(words)

    things = scene.things
    if len(things) == 3:
        first, second, third = (noun(thing, article) for thing in things)
        order = scene.relation
        if rng.random() < 0.3:
            order = "in a row" if order == "from left to right" else "in a column"
        comma = "," if rng.random() < 0.5 else ""
        subject = f"{first}, {second} and {third}{comma} {order}"
    elif len(things) == 2:
        if (things[0].colour, things[0].shape) == (things[1].colour, things[1].shape):
            subject = noun(things[0], False, "two")
        else:
            first, second = (noun(thing, article) for thing in things)
            relation = word(str(scene.relation))
            if relation in ("left of", "right of") and rng.random() < 0.5:
                relation = f"to the {relation}"
            subject = f"{first} {relation} {second}"
    else:
        subject = noun(things[0], article)
        if scene.place is not None:
            at = {"top": "at the", "bottom": "at the", "left": "on the", "right": "on the"}.get(scene.place, "in the")
            subject += f" {at} {scene.place}"
            if at == "in the" and rng.random() < 0.3:
                subject = subject.removesuffix(" corner")
    sentence = subject if not with_background else on_background(scene, rng, subject, word)
    if rng.random() < 0.25 and not sentence.startswith("on "):
        sentence = rng.choice(["a drawing of ", "a picture of ", "an image of ", "draw ", "a simple "]) + sentence
        for doubled in ("a", "an"):
            sentence = sentence.replace(f"simple {doubled} ", "simple ")
    if world.words and len(things) < 3 and rng.random() < 0.1:
        sentence += rng.choice((" ", ", ")) + rng.choice(ENDINGS)
    if rng.random() < 0.3:
        sentence = sentence[0].upper() + sentence[1:]
    elif world.words and rng.random() < 0.05:
        sentence = sentence.upper()
    if rng.random() < 0.2:
        sentence += "."
    return Wording(sentence, with_size, with_background)


def on_background(scene: Scene, rng: random.Random, subject: str, word: Words) -> str:
    """The subject and where it stands."""
    first, ground = word(scene.background), word("background")
    if scene.second is None:
        a = article_for(first)
        return rng.choice(
            [
                f"{subject} on {a} {first} {ground}",
                f"{subject} on {a} {first} {ground}",
                f"{subject} on {first}",
                f"{subject}, {first} {ground}",
                f"{subject} with {a} {first} {ground}",
                f"{subject} in front of {a} {first} {ground}",
                f"on {a} {first} {ground}, {subject}",
            ]
        )
    second = word(scene.second)
    if scene.pattern == "striped":
        return rng.choice(
            [
                f"{subject} on a striped {first} and {second} {ground}",
                f"{subject} on {first} and {second} stripes",
                f"{subject}, {ground} with {first} and {second} stripes",
                f"on {first} and {second} stripes, {subject}",
            ]
        )
    return rng.choice(
        [
            f"{subject} on a gradient from {first} to {second}",
            f"{subject} on {article_for(first)} {first} to {second} gradient",
            f"{subject}, {ground} fading from {first} to {second}",
            f"{subject} with a {ground} that goes from {first} to {second}",
        ]
    )


def article_for(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
