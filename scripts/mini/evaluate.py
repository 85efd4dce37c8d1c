"""Accuracy of a model folder on prompts that training never saw, through flux-local's own pipeline."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from flux_local.model.loader import Pipeline

from .drawings import COLOURS, RELATIONS, SHAPES, SIZES, Scene, describe, held_out, paired, single
from .judge import Verdict, judge

BATCH = 4


@dataclass(frozen=True)
class Question:
    prompt: str
    scene: Scene
    mentions_size: bool


def questions(count: int, pair: bool, width: int, height: int, seed: int = 1) -> list[Question]:
    """Prompts whose first thing is a held-out combination of colour, shape and background."""
    rng = random.Random(f"evaluation {seed} {pair}")
    found: list[Question] = []
    while len(found) < count:
        background = rng.choice(list(COLOURS))
        colour, second = rng.sample([c for c in COLOURS if c != background], 2)
        shape = rng.choice(SHAPES)
        if not held_out(colour, shape, background):
            continue
        if pair:
            named = [(colour, shape), (second, rng.choice(SHAPES))]
            scene = paired(rng, background, named, rng.choice(list(RELATIONS)), width, height)
        else:
            scene = Scene(background, (single(rng, colour, shape, rng.choice(SIZES), width, height),))
        wording = describe(scene, rng)
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
    """Percentage right among those where the part was asked for."""
    asked = [getattr(v, part) for v in verdicts if getattr(v, part) is not None]
    return round(100 * sum(asked) / len(asked), 1) if asked else float("nan")


def evaluate(
    pipeline: Pipeline,
    width: int,
    height: int,
    steps: int,
    count: int = 300,
    on_picture: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Percentages right, half of the prompts with one thing and half with two."""
    verdicts: dict[bool, list[Verdict]] = {}
    for pair in (False, True):
        asked = questions(count // 2, pair, width, height)
        pictures = paint(pipeline, [q.prompt for q in asked], width, height, steps)
        verdicts[pair] = []
        for question, picture in zip(asked, pictures, strict=True):
            verdicts[pair].append(judge(picture, question.scene, question.mentions_size))
            on_picture()
    one, two = verdicts[False], verdicts[True]
    return {
        "background": share(one, "background"),
        "colour": share(one, "colour"),
        "shape": share(one, "shape"),
        "size": share(one, "size"),
        "pair background": share(two, "background"),
        "pair colours": share(two, "colour"),
        "pair shapes": share(two, "shape"),
        "pair relation": share(two, "relation"),
    }


def sheet(pipeline: Pipeline, path: Path, steps: int, side: int = 128, columns: int = 6, rows: int = 2) -> None:
    """Writes pictures of held-out prompts with the prompts under them."""
    asked = questions(columns * rows - columns, False, side, side, seed=7) + questions(
        columns, True, side, side, seed=7
    )
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
