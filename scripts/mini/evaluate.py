"""Accuracy of a model folder on prompts that training never saw, through flux-local's own pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from flux_local.model.loader import Pipeline

from .drawings import FIRST, PATTERNS, Scene, World, random_scene
from .judge import Verdict, judge
from .sentences import describe

BATCH = 4


@dataclass(frozen=True)
class Question:
    prompt: str
    scene: Scene
    mentions_size: bool


def questions(
    count: int,
    things: int,
    width: int,
    height: int,
    seed: int = 1,
    world: World = FIRST,
    pattern: str = "plain",
    placed: bool = False,
    words: bool = False,
) -> list[Question]:
    """Prompts whose first thing is a held-out combination of colour, shape and background.

    Args:
        words: worded as in a world that uses other names and words that mean nothing to a drawing.
    """
    rng = random.Random(f"evaluation {seed} {things} {pattern} {placed}")
    found: list[Question] = []
    while len(found) < count:
        kind = rng.choice(PATTERNS[1:]) if pattern == "any" else pattern
        scene = random_scene(rng, width, height, things, world, held=True, pattern=kind, placed=placed)
        wording = describe(scene, rng, replace(world, words=True) if words else world)
        if wording.mentions_background:
            found.append(Question(wording.text, scene, wording.mentions_size))
    return found


def paint(
    pipeline: Pipeline,
    prompts: list[str],
    width: int,
    height: int,
    steps: int,
    guidance: float = 4.5,
    seed: int = 0,
    go_fast: bool = False,
    computed: tuple[bool, ...] = (),
) -> Iterator[Image.Image]:
    """A picture for each prompt; picture i has seed + i."""
    denoiser = pipeline.denoiser_for(go_fast)
    for at in range(0, len(prompts), BATCH):
        batch = [
            pipeline.begin(
                pipeline.text.encode(prompt),
                width,
                height,
                seed=seed + at + i,
                steps=steps,
                guidance=guidance,
                go_fast=go_fast,
                computed=computed,
            )
            for i, prompt in enumerate(prompts[at : at + BATCH])
        ]
        while batch[0].steps_left:
            denoiser.advance(batch)
        for picture in batch:
            yield Image.frombytes("RGB", (width, height), pipeline.vae.decode(picture.latents, width, height))


def share(verdicts: list[Verdict], part: str) -> float:
    """Percentage right among those where the part was asked for; of outlines, the mean in percent."""
    asked = [getattr(v, part) for v in verdicts if getattr(v, part) is not None]
    return round(100 * sum(asked) / len(asked), 1) if asked else float("nan")


def evaluate(
    pipeline: Pipeline,
    width: int,
    height: int,
    steps: int,
    count: int = 300,
    on_picture: Callable[[], None] = lambda: None,
    world: World = FIRST,
    words: bool = False,
    only: Collection[str] = (),
) -> dict[str, float]:
    """Percentages right, an equal share of the prompts for each kind of drawing that the world has, or of `only`."""
    asked = kinds(count, width, height, world, words=words, only=only)
    figures = {}
    for kind, chosen in asked.items():
        pictures = paint(pipeline, [q.prompt for q in chosen], width, height, steps)
        verdicts = []
        for question, picture in zip(chosen, pictures, strict=True):
            verdicts.append(judge(picture, question.scene, question.mentions_size, world))
            on_picture()
        for part in ("background", "colour", "shape", "size", "relation", "place", "outline"):
            if any(getattr(v, part) is not None for v in verdicts):
                figures[f"{kind}: {part}"] = share(verdicts, part)
    return figures


def kinds(
    count: int,
    width: int,
    height: int,
    world: World,
    seed: int = 1,
    words: bool = False,
    only: Collection[str] = (),
) -> dict[str, list[Question]]:
    """`count` questions in all."""
    wanted: dict[str, dict[str, Any]] = {"one": {"things": 1}, "two": {"things": 2}}
    if world.most > 2:
        wanted["three"] = {"things": 3}
    if world.places:
        wanted["placed"] = {"things": 1, "placed": True}
    if len(world.patterns) > 1:
        wanted["patterned"] = {"things": 1, "pattern": "any"}
    wanted = {kind: how for kind, how in wanted.items() if not only or kind in only}
    return {
        kind: questions(count // len(wanted), width=width, height=height, seed=seed, world=world, words=words, **how)
        for kind, how in wanted.items()
    }


def sheet(
    pipeline: Pipeline, path: Path, steps: int, side: int = 128, columns: int = 5, rows: int = 2, world: World = FIRST
) -> None:
    """Writes pictures of held-out prompts with the prompts under them."""
    asked = [q for chosen in kinds(columns * rows, side, side, world, seed=7).values() for q in chosen]
    caption = 58
    page = Image.new("RGB", (columns * (side + 12), rows * (side + caption + 8)), "white")
    pen = ImageDraw.Draw(page)
    for i, picture in enumerate(paint(pipeline, [q.prompt for q in asked], side, side, steps)):
        x, y = i % columns * (side + 12) + 6, i // columns * (side + caption + 8) + 4
        page.paste(picture, (x, y))
        words, lines = asked[i].prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > side // 6:
                lines.append("")
            lines[-1] += word + " "
        pen.multiline_text((x, y + side + 2), "\n".join(line.strip() for line in lines[:5]), fill="black", spacing=1)
    page.save(path, optimize=True)
