"""Stage five: practice. The painter draws, and learns what it should have drawn.

From noise it draws a prompt as a server would. The right drawing is the prompt's, with each thing as large as the
painter has it (`mended`), and at every step of the way the painter learns the velocity that leads there. Drawings alone
never show it its own mistakes, from which it does not find back (DAgger, arXiv 1011.0686); and a way that leads
straight to one drawing is gone in few steps (reflow, arXiv 2209.03003, section 2.2).

A part of the practice begins with a drawing under noise and a prompt that may be another's: there the drawing is right.

Every other batch is one of the stages before. Half of it is at guidance 1, which is not practised, so that a low value
stays what it is: the prompt less strictly, the pictures more various.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flux_local.model.latents import unpack
from flux_local.model.schedule import FlowSchedule

from . import flow
from .drawings import (
    BACKWARDS,
    COLOURS,
    RADII,
    RELATIONS,
    ROWS,
    Rgb,
    Scene,
    Thing,
    World,
    group,
    held_out,
    middle_of,
    on_lattice,
    random_scene,
    stands_out,
    unit,
)
from .pools import Pools, encoded
from .run import Run
from .sentences import Wording, describe
from .vae import CHANNELS, COLOUR_AXES, MEASURED, WANTED

STEPS = 8500
RATE = 0.4  # of the peak rates of the stage of drawings
AVERAGE = 0.998
CANVASES: list[tuple[int, int]] = [*flow.ALL_SHAPES, *2 * (flow.SQUARE, *flow.OTHER_SHAPES), *8 * flow.LARGEST_SHAPES]
CANVASES += 32 * flow.LARGEST_SHAPES[:1]  # the square, which is what a request gets that says nothing
random.Random(0).shuffle(CANVASES)
DRAWN_IN = (4, 20)  # steps of a drawing, any number between: what is practised at a few noise levels acts there alone
AT_A_TIME = 4  # batches of drawings, each over another canvas
CROWDED = 0.3  # share of drawings that have several things, beside those by chance
EDITS = 0.25  # share of the practice that begins with another's picture under noise, as image to image does
FALSE_PROMPTS = 0.6  # of those and of the stages before; at 0.85 edits keep more, and all else is less sure
GUIDANCE = (3.0, 10.0)  # half of the practice is at the usual value, the other half between these
LOOK_EVERY = 1000

FEW, MANY = flow.SHIFTS
SCHEDULE = FlowSchedule(
    base_shift=flow.SHIFTS[FEW], max_shift=flow.SHIFTS[MANY], base_image_seq_len=FEW, max_image_seq_len=MANY
)


@dataclass(frozen=True)
class Lesson:
    """A batch of moments on the painter's ways over one canvas: what it had, and the velocity it should have had."""

    canvas: tuple[int, int]
    noisy: torch.Tensor  # [batch, tokens, 64], as `wanted`
    sigma: torch.Tensor
    prompts: list[str]
    guidance: torch.Tensor
    wanted: torch.Tensor


def on_axes(colour: Rgb) -> torch.Tensor:
    """A colour along the latents' COLOUR_AXES: [3]."""
    return torch.tensor(COLOUR_AXES) @ (torch.tensor(colour) / 127.5 - 1)


def coloured(latents: torch.Tensor) -> torch.Tensor:
    """[batch, 16, h, w] → [batch, axis, h, w]: of each 8×8 block the mean colour."""
    index = [CHANNELS.index((axis, 0)) for axis in range(3)]
    scales = torch.tensor([MEASURED[at] / WANTED[0] for at in index])
    return latents[:, index] * scales[:, None, None]


def likely_background(scene: Scene, seen: torch.Tensor, world: World) -> Scene:
    """The scene on the plain background that is nearest to what lies around the picture's edge.

    Args:
        seen: mean colours of the picture's blocks, [axis, h, w].
    """
    edge = torch.cat([seen[:, [0, -1]].flatten(1), seen[:, :, [0, -1]].flatten(1)], dim=1).median(dim=1).values

    def allowed(background: str) -> bool:
        return all(
            stands_out(thing.colour, background, None) and not held_out(thing.colour, thing.shape, background)
            for thing in scene.things
        )

    choice = [colour for colour in world.colours if allowed(colour)]
    if not choice:
        return scene
    nearest = min(choice, key=lambda colour: float((on_axes(COLOURS[colour]) - edge).square().sum()))
    return replace(scene, background=nearest, pattern="plain", second=None)


def measured(scene: Scene, index: int, seen: torch.Tensor, empty: torch.Tensor, width: int, height: int) -> Thing:
    """The scene's thing of that index, with the radius that comes nearest to what is seen, and its own place.

    Args:
        seen, empty: `coloured` of the picture and of its background alone, [axis, h, w].
    """
    thing, count = scene.things[index], len(scene.things)
    horizontal = scene.relation is not None and (RELATIONS | ROWS)[scene.relation] == "horizontal"
    slot = count - 1 - index if scene.relation in BACKWARDS else index
    length = width if horizontal else height
    first, last = (round(part * length / 8 / count) for part in (slot, slot + 1))
    own = (..., slice(first, last)) if horizontal else (..., slice(first, last), slice(None))
    away = on_axes(COLOURS[thing.colour])[:, None, None] - empty[own]
    cover = ((seen - empty)[own] * away).sum(dim=0) / away.square().sum(dim=0)  # of each block, from 0 to 1
    area, _, _ = middle_of(thing.shape)
    seen_radius = (64 * float(cover[cover > 0.05].sum()) / area) ** 0.5 / unit(scene, width, height)
    return replace(thing, radius=min(RADII[group(scene)][thing.size], key=lambda radius: abs(radius - seen_radius)))


def mended(
    run: Run,
    vae: AutoencoderKL,
    scenes: list[Scene],
    said: list[bool],
    latents: torch.Tensor,
    width: int,
    height: int,
) -> list[Scene]:
    """What the pictures should have been: the scenes, with what a prompt leaves open as it is in the picture.

    Args:
        said: whether each prompt mentions the background.
        latents: of the pictures, [scenes, tokens, 64].
    """
    seen = coloured(unpack(latents.float().cpu(), width, height))
    scenes = [
        scene if told else likely_background(scene, picture, run.world)
        for scene, told, picture in zip(scenes, said, seen, strict=True)
    ]
    bare = encoded(run, vae, [replace(scene, things=()) for scene in scenes], width, height)
    empty = coloured(unpack(bare.float().cpu(), width, height))
    return [
        on_lattice(
            replace(
                scene,
                things=tuple(measured(scene, i, seen[n], empty[n], width, height) for i in range(len(scene.things))),
            ),
            width,
            height,
        )
        for n, scene in enumerate(scenes)
    ]


def asked(run: Run, rng: random.Random, width: int, height: int) -> tuple[list[Scene], list[Wording]]:
    """A batch of scenes, CROWDED more often than by chance, and how each is worded."""
    counts = [rng.randint(2, run.world.most) if rng.random() < CROWDED else None for _ in range(run.batch)]
    scenes = [random_scene(rng, width, height, count, run.world) for count in counts]
    return scenes, [describe(scene, rng, run.world) for scene in scenes]


def noise_levels(rng: random.Random, tokens: int) -> list[float]:
    """Those of a drawing in any number of steps, half of the time with each moved by up to half-way to the next."""
    exact = SCHEDULE.sigmas(rng.randint(*DRAWN_IN), tokens)
    if rng.random() < 0.5:
        return exact
    moved = exact.copy()
    for i in range(1, len(exact) - 1):
        by = rng.uniform(-0.5, 0.5)
        moved[i] += abs(by) * (exact[i + (1 if by > 0 else -1)] - exact[i])
    return moved


@torch.no_grad()
def drawn(
    run: Run,
    painter: flow.Painter,
    x: torch.Tensor,
    sigmas: list[float],
    prompts: list[str],
    guidance: torch.Tensor,
    canvas: tuple[int, int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """From `x` at the first noise level to the last: latents [batch, tokens, 64], and what they were at each before."""
    way = []
    for sigma, after in pairwise(sigmas):
        way.append(x)
        predicted = flow.velocity(run, painter, x, torch.full((len(x),), sigma), prompts, guidance, *canvas)
        x = x + (after - sigma) * predicted
    return x, way


@torch.no_grad()
def lessons(run: Run, painter: flow.Painter, vae: AutoencoderKL, turn: int) -> list[Lesson]:
    """From AT_A_TIME batches of drawings and edits, over the next canvases in turn; in random order."""
    rng = random.Random(f"{run.seed} practice {turn}")
    generator = run.generator(30_000_000 + turn)
    found = []
    for index in range(AT_A_TIME):
        canvas = width, height = CANVASES[(turn * AT_A_TIME + index) % len(CANVASES)]
        scenes, wordings = asked(run, rng, *canvas)
        prompts = [wording.text for wording in wordings]
        guidance = values(rng, run.batch)
        sigmas = noise_levels(rng, width * height // 256)
        x = torch.randn(run.batch, width * height // 256, 64, generator=generator, device=run.device)
        told = [at for at, sigma in enumerate(sigmas[:-1]) if sigma < flow.UNTOLD]
        given = None
        if told and rng.random() < EDITS:
            sigmas = sigmas[rng.choice(told) :]
            given = encoded(run, vae, scenes, *canvas)
            x = torch.lerp(given, x, sigmas[0])
            prompts = flow.worded(scenes, torch.full((run.batch,), sigmas[0]), rng, run.world, FALSE_PROMPTS)
        x, way = drawn(run, painter, x, sigmas, prompts, guidance, canvas)
        if given is None:
            right = mended(run, vae, scenes, [wording.mentions_background for wording in wordings], x, *canvas)
            given = encoded(run, vae, right, *canvas)
        noisy, levels = torch.cat(way), torch.tensor(sigmas[:-1], device=run.device).repeat_interleave(run.batch)
        wanted = (noisy - given.repeat(len(way), 1, 1)) / levels[:, None, None]
        for chosen in torch.randperm(len(noisy), generator=generator, device=run.device).split(run.batch):
            who = (chosen % run.batch).tolist()
            found.append(
                Lesson(canvas, noisy[chosen], levels[chosen], [prompts[i] for i in who], guidance[who], wanted[chosen])
            )
    rng.shuffle(found)
    return found


def values(rng: random.Random, count: int) -> torch.Tensor:
    """Guidance values for a batch of practice."""
    return torch.tensor([flow.GUIDANCE if rng.random() < 0.5 else rng.uniform(*GUIDANCE) for _ in range(count)])


def usual(run: Run, pools: Pools, step: int, alone: int = 2) -> Lesson:
    """A batch of pictures not its own; one in `alone` at guidance 1."""
    rng = random.Random(f"{run.seed} practice words {step}")
    generator = run.generator(20_000_000 + step)
    canvas, latents, scenes = pools(step // 2)
    sigma = flow.random_sigmas(len(latents), latents.shape[1], generator)
    noisy, wanted = flow.noised(latents, sigma, generator)
    guidance = values(rng, run.batch)
    guidance[::alone] = 1.0
    prompts = flow.worded(scenes, sigma, rng, run.world, FALSE_PROMPTS)
    return Lesson(canvas, noisy, sigma, prompts, guidance, wanted)


@dataclass(frozen=True)
class Learning:
    """What a stage has that learns from its own drawings: they are drawn by the average."""

    painter: flow.Painter
    average: AveragedModel
    averaged: flow.Painter
    optimiser: flow.Optimisers

    @classmethod
    def of(cls, run: Run, painter: flow.Painter, rate: float, average: float, compiled: bool) -> Learning:
        """A copy of the painter that learns, but for its text encoders, at that share of the peak rates."""
        painter = copy.deepcopy(painter).train().to(run.device)
        for encoder in (painter.text_encoder, painter.text_encoder_2):
            encoder.requires_grad_(False)
        running = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(average))
        averaged = cast(flow.Painter, running.module).eval()
        if compiled:
            flow.compile_blocks(painter)
            flow.compile_blocks(averaged)
        return cls(painter, running, averaged, flow.Optimisers(painter, rate))

    def predicted(self, run: Run, lesson: Lesson) -> tuple[torch.Tensor, torch.Tensor]:
        """The velocities of a lesson as the painter has them now, and their loss."""
        found = flow.velocity(
            run, self.painter, lesson.noisy, lesson.sigma, lesson.prompts, lesson.guidance, *lesson.canvas
        )
        return found, flow.weighted(found - lesson.wanted.to(run.device), lesson.sigma)

    def step(self, run: Run, loss: torch.Tensor, share: float) -> None:
        """As `Run.step`; the average follows."""
        run.step(self.optimiser, loss, self.painter, share)
        self.average.update_parameters(self.painter)


def train(
    run: Run,
    painter: flow.Painter,
    vae: AutoencoderKL,
    scale: float = 1.0,
    compiled: bool = True,
    look: flow.Look = lambda painter, step: None,
) -> flow.Painter:
    """Goes on from the last checkpoint; returns the averaged weights.

    A run that was cut off practises with other drawings than one that was not: they depend on the weights.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
        look: called every LOOK_EVERY steps and at the end with the averaged weights so far.
    """
    torch.manual_seed(run.seed)
    steps = max(2, round(STEPS * scale))
    vae = vae.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    learning = Learning.of(run, painter, RATE, AVERAGE, compiled)
    start = run.resume("practice", learning.painter, learning.optimiser, average=learning.average)
    rate = run.one_cycle(steps, warm_up=100)
    pools = Pools(run, vae, CANVASES, run.batch, steps, 20_000_000)
    waiting: list[Lesson] = []
    turn = start // (AT_A_TIME * sum(DRAWN_IN))
    with run.progress("practice", steps, start) as progress:
        for step in range(start, steps):
            if step % 2 == 0:
                if not waiting:
                    waiting = lessons(run, learning.averaged, vae, turn)
                    turn += 1
                lesson = waiting.pop()
            else:
                lesson = usual(run, pools, step)
            _, loss = learning.predicted(run, lesson)
            learning.step(run, loss, rate(step))
            progress(step + 1, **{"own" if step % 2 == 0 else "others": loss.item()})
            run.checkpoint("practice", step + 1, steps, learning.painter, learning.optimiser, average=learning.average)
            if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                look(learning.averaged, step + 1)
    return learning.averaged
