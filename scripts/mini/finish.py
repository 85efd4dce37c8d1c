"""Stage seven: the finish. The decoder learns what the painter's own latents mean.

A painter's outlines waver by a pixel, and a decoder that has only seen the latents of drawings draws them so. Here it
learns to make of what the painter drew the drawing that was meant (`practice.mended`), beside drawings under noise as
in its first training: what an edit is given comes back as it was.

Most of a drawing is flat, and learnt long ago. So most batches are windows with an edge in them, turned and mirrored
as their latents can be too: more than twice the steps in the same time. The others are whole pictures, over which a
group norm has other moments than over a window. Knows nothing of how the painter draws.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flux_local.model.latents import unpack

from . import flow, practice, vae
from .drawings import random_scene
from .pools import drawings, latents_of
from .run import Run

STEPS = 4500
RATE = 3e-4
AVERAGE = 0.995
CANVASES = practice.CANVASES
OWN, OTHERS = 0.2, 0.125  # windows in a batch, and windows of other drawings, for a picture of the transformer's batch
WINDOW = 64  # pixels
EDGES = 0.06  # of a window's pixels that are not as its first one is
TRIES = 6  # for a window that has them
WHOLE_EVERY = 8
DRAWN_IN = (4, 10)  # steps of a drawing, any number between
AT_A_TIME = 6  # batches of drawings, each over another canvas
REUSE = 16  # windows of a drawing
ASTRAY = 0.15  # share of the drawings, those furthest from what was meant, that show another thing and teach nothing
NEARBY = 2  # pixels
STEEP, ROOT, BEYOND = 1.0, 0.5, 6.0  # weights in the loss, beside that of the mean error, which is 1
OFFSET = 50_000_000  # of this stage's chance


@dataclass(frozen=True)
class Lesson:
    """What the painter drew, what it meant, and other drawings of the size."""

    latents: torch.Tensor  # [batch, 16, height / 8, width / 8]
    meant: np.ndarray  # uint8 [batch, height, width, 3]
    others: np.ndarray  # uint8 [another batch, height, width, 3]


def latest(run: Run, autoencoder: AutoencoderKL) -> None:
    """Sets the decoder's weights to the average of the last checkpoint, if there is one."""
    if (path := run.work / "finish.pt").exists():
        average = averaged(autoencoder.decoder)
        average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
        autoencoder.decoder = average.module


def averaged(decoder: nn.Module) -> AveragedModel:
    return AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))


def nearby(x: torch.Tensor) -> torch.Tensor:
    """Pictures → of each pixel and colour the most that is within NEARBY pixels."""
    return F.max_pool2d(x, 2 * NEARBY + 1, 1, NEARBY)


def steepest(x: torch.Tensor) -> torch.Tensor:
    """Pictures [batch, 3, height, width] → of each pixel and colour the largest step to a neighbour nearby."""
    across, down = (edge.abs() for edge in vae.edges(x))
    return nearby(F.pad(across, (0, 1)) + F.pad(down, (0, 0, 0, 1)))


def difference(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """What the decoder is trained to make small of pictures, each [batch, 3, height, width].

    Of squares, an edge whose place is not sure would best be wide. Here it is wrong to be less steep than the right
    one, or steeper, wherever nearby that lies; and an error's root, which grows least where it is large already,
    prefers pixels that are right and some that are wrong to all that are a little wrong. What steep edges would have
    beside them, lighter or darker than all that is right nearby, is wrong several times over: at a weight of 1 it was
    1.3% of the difference between both colours.
    """
    error, edge = vae.absolute(made, wanted)
    root = ((made - wanted).abs() + 0.01).sqrt().mean()
    steep = F.l1_loss(steepest(made), steepest(wanted))
    beyond = (F.relu(made - nearby(wanted)) + F.relu(-nearby(-wanted) - made)).mean()
    return error + 0.5 * edge + STEEP * steep + ROOT * root + BEYOND * beyond


def window(rng: random.Random, pixels: np.ndarray) -> tuple[int, int]:
    """Row and column, in cells of 8 pixels, of a window into a picture [height, width, 3]; if possible with an edge."""
    side = WINDOW // 8
    for _ in range(TRIES):
        row, column = (rng.randrange(length // 8 - side + 1) for length in pixels.shape[:2])
        seen = pixels[8 * row :, 8 * column :][:WINDOW, :WINDOW]
        if (seen != seen[0, 0]).any(axis=-1).mean() > EDGES:
            break
    return row, column


def drawn(
    run: Run, painter: flow.Painter, autoencoder: AutoencoderKL, turn: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """AT_A_TIME batches of the painter's over the next canvases in turn: their latents, and what was meant."""
    generator = run.generator(OFFSET + turn)
    for index in range(AT_A_TIME):
        canvas = width, height = CANVASES[(turn * AT_A_TIME + index) % len(CANVASES)]
        tokens = width * height // 256
        scenes, wordings = practice.asked(run, rng, *canvas)
        x = torch.randn(run.batch, tokens, 64, generator=generator, device=run.device)
        sigmas = practice.SCHEDULE.sigmas(rng.randint(*DRAWN_IN), tokens)
        guidance = practice.values(rng, run.batch)
        x, _ = practice.drawn(run, painter, x, sigmas, [wording.text for wording in wordings], guidance, canvas)
        said = [wording.mentions_background for wording in wordings]
        meant = list(drawings(run, practice.mended(run, autoencoder, scenes, said, x, *canvas), *canvas))
        away = (x - latents_of(run, autoencoder, meant)).square().mean(dim=(1, 2))
        near = away.argsort()[: max(1, round((1 - ASTRAY) * run.batch))].tolist()
        yield unpack(x, *canvas).float()[near], np.concatenate(meant)[near]


def lessons(run: Run, painter: flow.Painter, autoencoder: AutoencoderKL, turn: int) -> list[Lesson]:
    """From AT_A_TIME batches of drawings: REUSE windows of each, and whole pictures; in random order."""
    rng = random.Random(f"{run.seed} finish {turn}")
    own, more = (max(1, round(share * run.batch)) for share in (OWN, OTHERS))
    windows, whole = [], []
    for latents, pixels in drawn(run, painter, autoencoder, turn, rng):
        height, width = pixels.shape[1:3]
        scenes = [random_scene(rng, width, height, world=run.world) for _ in pixels]
        others = np.concatenate(list(drawings(run, scenes, width, height)))
        for index in [*range(len(pixels))] * REUSE:
            way = rng.randrange(8)
            row, column = window(rng, pixels[index])
            cells = latents[index, :, row:, column:][:, : WINDOW // 8, : WINDOW // 8]
            meant = pixels[index, 8 * row :, 8 * column :][:WINDOW, :WINDOW]
            row, column = window(rng, others[index])
            other = others[index, 8 * row :, 8 * column :][:WINDOW, :WINDOW]
            windows.append((vae.turned_latents(cells, way), vae.turned(meant, way), vae.turned(other, way)))
        size = max(1, own * WINDOW**2 // (2 * width * height))
        whole += [
            Lesson(latents[at : at + size], pixels[at : at + size], others[at : at + size])
            for at in range(0, len(pixels) - size + 1, size)
        ]
    rng.shuffle(windows)
    found = []
    for at in range(0, len(windows) - own + 1, own):
        cells, meant, other = zip(*windows[at : at + own], strict=True)
        found.append(Lesson(torch.stack(cells), np.stack(meant), np.stack(other[:more])))
    rng.shuffle(whole)
    found += whole[: max(1, len(found) // (WHOLE_EVERY - 1))]
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
    """Trains the autoencoder's decoder in place, going on from the last checkpoint, and leaves it with the running
    average of its weights; returns the painter as it is.

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
    autoencoder = autoencoder.eval().to(run.device, memory_format=torch.channels_last)
    decoder = autoencoder.decoder.requires_grad_(True)
    average = averaged(decoder)
    optimiser = torch.optim.AdamW(decoder.parameters(), lr=RATE, weight_decay=1e-4, betas=(0.9, 0.99))
    start = run.resume("finish", autoencoder, optimiser, average=average)
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
            torch.manual_seed(run.seed * 1_000_003 + OFFSET + step)
            latents = torch.cat([lesson.latents, vae.under_noise(autoencoder, wanted[count:])])
            with run.autocast():
                made = autoencoder.decode(latents.to(memory_format=torch.channels_last)).sample.float()
            figures = {
                name: (made[part] - wanted[part]).abs().mean().item()
                for name, part in (("own", slice(count)), ("others", slice(count, None)))
            }
            loss = difference(made, wanted)
            run.step(optimiser, loss, decoder, rate(step))
            average.update_parameters(decoder)
            progress(step + 1, **figures)
            run.checkpoint("finish", step + 1, steps, autoencoder, optimiser, average=average)
    autoencoder.decoder = average.module.requires_grad_(False)
    look(painter, steps)
    return painter
