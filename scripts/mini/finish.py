"""Stage seven: the finish. The decoder learns what the painter's own latents mean.

A painter's outlines waver by a pixel, and a decoder that has only seen the latents of drawings draws them so. Here it
learns to make of what the painter drew the drawing that was meant (`practice.mended`). A third of each batch are the
latents of drawings under noise, as in its first training: what an edit is given comes back as it was.

How much of the gain is that the decoder learns for longer, at a low rate, was not told apart: drawings' own latents
gain as much. What makes edges crisp is the loss. Knows nothing of how the painter draws.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from flux_local.model.latents import unpack

from . import flow, practice, vae
from .drawings import random_scene
from .pools import drawings, latents_of
from .run import Run, between

STEPS = 1800
RATE = 1.5e-4
CANVASES = practice.CANVASES
PIXELS = 192 * 192 // 12  # of the painter's in a batch, for each picture that a step of the transformer has
DRAWN_IN = (4, 10)  # steps of a drawing, any number between
AT_A_TIME = 6  # batches of drawings, each over another canvas
REUSE = 3  # batches of the decoder that a drawing is in
ASTRAY = 0.1  # share of the drawings, those furthest from what was meant, that show another thing and teach nothing
NEARBY = 2  # pixels
STEEP, ROOT = 1.0, 0.5  # weights in the loss, beside that of the mean error, which is 1
LEARNT = 0.5  # share of the new weights in what is left; with more of them the edges have halos of over one percent
OFFSET = 50_000_000  # of this stage's chance


@dataclass(frozen=True)
class Lesson:
    """What the painter drew over one canvas, what it meant, and other drawings of the size."""

    latents: torch.Tensor  # [batch, 16, height / 8, width / 8]
    meant: np.ndarray  # uint8 [batch, height, width, 3]
    others: np.ndarray  # half as many drawings that are not its own


def latest(run: Run, autoencoder: AutoencoderKL) -> None:
    """Sets the weights to those of the last checkpoint, if there is one."""
    if (path := run.work / "finish.pt").exists():
        autoencoder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])


def steepest(x: torch.Tensor) -> torch.Tensor:
    """Pictures [batch, 3, height, width] → of each pixel and colour the largest step to a neighbour nearby."""
    across, down = (edge.abs() for edge in vae.edges(x))
    return F.max_pool2d(F.pad(across, (0, 1)) + F.pad(down, (0, 0, 0, 1)), 2 * NEARBY + 1, 1, NEARBY)


def difference(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What the decoder is trained to make small of pictures, each [batch, 3, height, width].

    Of squares, an edge whose place is not sure would best be wide. Here it is wrong to be less steep than the right
    one, or steeper, wherever nearby that lies; and an error's root, which grows least where it is large already,
    prefers pixels that are right and some that are wrong to all that are a little wrong.
    """
    error, edge = vae.absolute(made, wanted)
    root = ((made - wanted).abs() + 0.01).sqrt().mean()
    return error + 0.5 * edge + STEEP * F.l1_loss(steepest(made), steepest(wanted)) + ROOT * root


def lessons(run: Run, painter: flow.Painter, autoencoder: AutoencoderKL, turn: int) -> list[Lesson]:
    """From AT_A_TIME batches of drawings, over the next canvases in turn; in random order."""
    rng = random.Random(f"{run.seed} finish {turn}")
    generator = run.generator(OFFSET + turn)
    found = []
    for index in range(AT_A_TIME):
        canvas = width, height = CANVASES[(turn * AT_A_TIME + index) % len(CANVASES)]
        tokens = width * height // 256
        scenes, wordings = practice.asked(run, rng, *canvas)
        x = torch.randn(run.batch, tokens, 64, generator=generator, device=run.device)
        sigmas = practice.SCHEDULE.sigmas(rng.randint(*DRAWN_IN), tokens)
        guidance = practice.values(rng, run.batch)
        x, _ = practice.drawn(run, painter, x, sigmas, [wording.text for wording in wordings], guidance, canvas)
        said = [wording.mentions_background for wording in wordings]
        meant = practice.mended(run, autoencoder, scenes, said, x, *canvas)
        drawn = list(drawings(run, meant, *canvas))
        away = (x - latents_of(run, autoencoder, drawn)).square().mean(dim=(1, 2))
        near = away.argsort()[: max(1, round((1 - ASTRAY) * run.batch))].tolist()
        latents, pictures = unpack(x, *canvas).float(), np.concatenate(drawn)
        size = max(1, run.batch * PIXELS // (width * height))
        parts = []
        for _ in range(REUSE):
            rng.shuffle(near)
            parts += [near[at : at + size] for at in range(0, len(near), size)]
        counts = [-(-len(part) // 2) for part in parts]
        more = [random_scene(rng, *canvas, world=run.world) for _ in range(sum(counts))]
        others = np.split(np.concatenate(list(drawings(run, more, *canvas))), np.cumsum(counts)[:-1])
        found += [Lesson(latents[part], pictures[part], other) for part, other in zip(parts, others, strict=True)]
    rng.shuffle(found)
    return found


def train(
    run: Run,
    painter: flow.Painter,
    autoencoder: AutoencoderKL,
    scale: float = 1.0,
    compiled: bool = True,
    look: flow.Look = lambda painter, step: None,
) -> flow.Painter:
    """Trains the autoencoder's decoder in place, going on from the last checkpoint, and leaves it with the mean of its
    weights before and after; returns the painter as it is.

    A run that was cut off learns from other drawings than one that was not.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
        look: called at the end.
    """
    torch.manual_seed(run.seed)
    steps = max(2, round(STEPS * scale))
    painter = painter.eval().requires_grad_(False).to(run.device)
    if compiled:
        flow.compile_blocks(painter)
    layout = torch.channels_last if run.bf16 else torch.contiguous_format  # the faster one of convolutions
    autoencoder = autoencoder.eval().to(run.device, memory_format=layout)
    beginning = copy.deepcopy(autoencoder.decoder)
    decoder = autoencoder.decoder.requires_grad_(True)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=RATE, weight_decay=1e-4, betas=(0.9, 0.99))
    start = run.resume("finish", autoencoder, optimiser)
    rate = run.one_cycle(steps, warm_up=100)
    waiting: list[Lesson] = []
    turn = start
    with run.progress("finish", steps, start) as progress:
        for step in range(start, steps):
            if not waiting:
                waiting = lessons(run, painter, autoencoder, turn)
                turn += 1
            lesson = waiting.pop()
            count = len(lesson.meant)
            wanted = vae.as_tensor(np.concatenate([lesson.meant, lesson.others]), run.device)
            wanted = wanted.contiguous(memory_format=layout)
            torch.manual_seed(run.seed * 1_000_003 + OFFSET + step)
            latents = torch.cat([lesson.latents, vae.under_noise(autoencoder, wanted[count:])])
            with run.autocast():
                made = autoencoder.decode(latents.to(memory_format=layout)).sample.float()
            figures = {
                name: (made[part] - wanted[part]).abs().mean().item()
                for name, part in (("own", slice(count)), ("others", slice(count, None)))
            }
            loss = difference(made, wanted)
            run.step(optimiser, loss, decoder, rate(step))
            progress(step + 1, **figures)
            run.checkpoint("finish", step + 1, steps, autoencoder, optimiser)
    between(beginning, decoder, LEARNT).requires_grad_(False)
    look(painter, steps)
    return painter
