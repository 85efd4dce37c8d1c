"""What a model folder does besides drawing a prompt: how far edits go, what guidance changes, how few steps will do.

Through flux-local's own pipeline, judged as in `judge`. Knows nothing of training.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import combinations

import numpy as np
from PIL import Image

from flux_local.model.loader import Pipeline

from .drawings import RADII, Scene, Thing, World, draw
from .evaluate import BATCH, Question, kinds, paint, questions
from .judge import Seen, judge, look
from .judge import softness as soft

STRENGTHS = (0.3, 0.6, 0.9)
GUIDANCE = (1.0, 4.5)
HARD, SEEDS, MANY_SEEDS = 50, 8, 16


def percent(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 1)


def edit(
    pipeline: Pipeline,
    pictures: list[Image.Image],
    prompts: list[str],
    steps: int,
    strength: float = 1.0,
    masks: list[bytes] | None = None,
) -> list[Image.Image]:
    """Each picture drawn over by its prompt; picture i has seed i."""
    width, height = pictures[0].size
    skip = steps - math.ceil(steps * strength)
    edited: list[Image.Image] = []
    for at in range(0, len(pictures), BATCH):
        batch = [
            pipeline.begin(
                pipeline.text.encode(prompts[i]),
                width,
                height,
                seed=i,
                steps=steps,
                guidance=GUIDANCE[1],
                image=pictures[i].tobytes(),
                mask=None if masks is None else masks[i],
                skip=skip,
            )
            for i in range(at, min(at + BATCH, len(pictures)))
        ]
        while batch[0].steps_left:
            pipeline.denoiser_for(False).advance(batch)
        decoded = (pipeline.vae.decode(picture.latents, width, height) for picture in batch)
        edited.extend(Image.frombytes("RGB", (width, height), pixels) for pixels in decoded)
    return edited


def layout_kept(before: Image.Image, after: Image.Image) -> float:
    """Overlap (intersection over union) of what stands on the background in two pictures of one size."""
    masks = []
    for picture in (before, after):
        pixels = np.asarray(picture).astype(np.float32)
        corner = pixels[:4, :4].mean(axis=(0, 1))
        masks.append(((pixels - corner) ** 2).sum(axis=-1) > 60.0**2)
    return float((masks[0] & masks[1]).sum() / max(1, (masks[0] | masks[1]).sum()))


def edits(pipeline: Pipeline, side: int, steps: int, world: World, count: int = 96) -> dict[str, float]:
    """Percentages. For each strength, of drawings edited by another drawing's prompt: how much of the layout is kept,
    and how often the prompt is all there. For inpainting: how often the object asked for stands in the mask.
    """
    rng = random.Random("edits")
    asked = questions(count, 1, side, side, seed=3, world=world)
    before = [
        draw(Scene(question.scene.background, (another(rng, question, world),)), side, side) for question in asked
    ]
    figures = {}
    for strength in STRENGTHS:
        after = edit(pipeline, before, [q.prompt for q in asked], steps, strength)
        kept = [layout_kept(a, b) for a, b in zip(before, after, strict=True)]
        figures[f"strength {strength:g}: layout kept"] = round(100 * sum(kept) / count, 1)
        there = [judge(p, q.scene, q.mentions_size, world).perfect for p, q in zip(after, asked, strict=True)]
        figures[f"strength {strength:g}: prompt there"] = percent(there)
    figures["inpainting: object in the mask"] = percent(inpainted(pipeline, side, steps, world, count))
    return figures


def another(rng: random.Random, question: Question, world: World) -> Thing:
    """A thing of other colour, shape and size than the question's."""
    scene = question.scene
    thing = scene.things[0]
    colour = rng.choice([c for c in world.colours if c not in (scene.background, thing.colour)])
    shape = rng.choice([s for s in world.shapes if s != thing.shape])
    size = rng.choice([s for s in world.sizes if s != thing.size])
    radius = rng.choice(RADII["single"][size])
    return Thing(colour, shape, size, (0.5, 0.5), radius)


def inpainted(pipeline: Pipeline, side: int, steps: int, world: World, count: int) -> list[bool]:
    """Into a drawing of one thing of two, the other is to be put: its half is the mask, both are in the prompt."""
    asked = questions(count, 2, side, side, seed=4, world=world)
    before, masks = [], []
    for question in asked:
        first, second = question.scene.things
        before.append(draw(replace(question.scene, things=(second,)), side, side))
        x, y = (int(part * side) for part in first.centre)
        half = int(0.24 * side)
        mask = np.zeros((side, side), dtype=np.uint8)
        mask[max(0, y - half) : y + half, max(0, x - half) : x + half] = 1
        masks.append(mask.tobytes())
    after = edit(pipeline, before, [q.prompt for q in asked], steps, masks=masks)
    right = []
    for question, picture in zip(asked, after, strict=True):
        first = question.scene.things[0]
        right.append(any(is_it(seen, first, side) for seen in look(picture, world)[1]))
    return right


def is_it(seen: Seen, thing: Thing, side: int) -> bool:
    away = math.dist(seen.centre, (thing.centre[0] * side, thing.centre[1] * side))
    return seen.colour == thing.colour and seen.shape == thing.shape and away < 0.15 * side


def softness(pipeline: Pipeline, side: int, steps: int, world: World, count: int = 150) -> dict[str, float]:
    """The mean `judge.softness` of single things: as they should be, given back by the autoencoder, and drawn."""
    asked = questions(count, 1, side, side, seed=6, world=world)
    drawings = [draw(question.scene, side, side) for question in asked]
    vae = pipeline.vae
    back = [vae.decode(vae.encode(drawing.tobytes(), side, side), side, side) for drawing in drawings]
    pictures = {
        "drawing": drawings,
        "drawing, through the autoencoder": [Image.frombytes("RGB", (side, side), pixels) for pixels in back],
        "drawn from its prompt": list(paint(pipeline, [q.prompt for q in asked], side, side, steps)),
    }
    return {
        name: round(float(np.nanmean([soft(p, q.scene) for p, q in zip(made, asked, strict=True)])), 2)
        for name, made in pictures.items()
    }


def guidance(pipeline: Pipeline, side: int, steps: int, world: World, among: int = 300) -> dict[str, float]:
    """What the value changes. Adherence: percent of pictures with everything right, of the HARD prompts that failed
    most often at the lower value, over SEEDS seeds that had no part in choosing them. Variety: the mean difference of
    a pixel, of 255, between pictures of one prompt over MANY_SEEDS seeds, at both values.
    """
    asked = [q for chosen in kinds(among, side, side, world, seed=5).values() for q in chosen]

    def scores(chosen: list[Question], value: float, seeds: range) -> list[float]:
        totals = [0] * len(chosen)
        for seed in seeds:
            pictures = paint(pipeline, [q.prompt for q in chosen], side, side, steps, value, seed * 100_000)
            for i, picture in enumerate(pictures):
                totals[i] += judge(picture, chosen[i].scene, chosen[i].mentions_size, world).perfect
        return [total / len(seeds) for total in totals]

    easy = scores(asked, GUIDANCE[0], range(2))
    hard = [asked[i] for i in sorted(range(len(asked)), key=lambda i: easy[i])[:HARD]]
    figures = {}
    for value in GUIDANCE:
        right = scores(hard, value, range(10, 10 + SEEDS))
        figures[f"adherence at {value:g}"] = round(100 * sum(right) / len(right), 1)
    for value in GUIDANCE:
        differences = []
        for question in hard[:8]:
            drawn = paint(pipeline, [question.prompt] * MANY_SEEDS, side, side, steps, value, 5_000_000)
            arrays = [np.asarray(picture).astype(np.float32) for picture in drawn]
            differences += [float(np.abs(a - b).mean()) for a, b in combinations(arrays, 2)]
        figures[f"variety at {value:g}"] = round(sum(differences) / len(differences), 2)
    return figures
