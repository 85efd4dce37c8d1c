"""Stage three: the transformer and both text encoders, by rectified flow on the autoencoder's latents.

The convention is FLUX.1's: x(σ) = (1 − σ)·latents + σ·noise, and the network predicts the velocity noise − latents.
Begins with squares, where colours and shapes are learnt, and goes on with all ratios of the size table.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flux_local.model.latents import position_ids
from flux_local.sizes import GRID, RATIOS, CanvasRange, canvas_for

from . import reading
from .drawings import Scene, World
from .pools import Pools
from .run import Run
from .sentences import describe
from .text import T5_LENGTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer
from .widen import widened

MATRIX_RATE, OTHER_RATE = 5e-3, 6e-4  # peaks for Muon and for AdamW: with the latter over 1e-3 the loss goes up again
AVERAGE = 0.998
LOOK_EVERY = 1000
GUIDANCE = 4.5  # the value of all training before guidance is distilled
NEARLY_NOISE = 0.4  # share of noise levels from 0.9 to 1, where the prompt alone says what to draw
HEADS = 4  # of 48 channels each
# On a CPU the fused backward pass is slow; on an H200 cuDNN's (9.19, with torch 2.11) ended in an illegal access.
BACKENDS = {"cpu": [SDPBackend.MATH], "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]}
DROPPED_PROMPTS = 0.1  # trained with the empty prompt, so that classifier-free guidance means something
# Trained with another picture's prompt: none above the first noise level, FALSE_PROMPTS of those below the second.
# A picture that can be told is then believed more than the prompt, which is what lets an edit keep a part of it.
UNTOLD, TOLD, FALSE_PROMPTS = 0.85, 0.7, 0.3

CANVAS = CanvasRange(60 * GRID**2, 144 * GRID**2)
# Each of the size table's eleven ratios is drawn on the square or on one of the next eight, or on a larger one.
SQUARE = (128, 128)
OTHER_SHAPES = ((144, 112), (112, 144), (160, 112), (112, 160), (176, 96), (96, 176), (192, 80), (80, 192))
LARGEST_SHAPES = tuple(dict.fromkeys(canvas_for(size, CANVAS) for size in RATIOS.values()))
ALL_SHAPES = tuple((GRID * columns, GRID * rows) for rows in CANVAS.rows() for columns in CANVAS.columns(rows))

# The shift of the noise levels, as `mu` of FLUX.1's schedule at 64 and at 144 tokens; it grows with the logarithm of
# the side. A little more than FLUX.1's own, because flat drawings are decided early: nine tenths of a latent's variance
# are the mean colours of its patches, which at σ = 0.9 are still told from noise, and so is the layout. With 1.7 to 2.1
# the last of eight steps would begin at σ = 0.54 already.
SHIFTS = {64: 1.0, 144: 1.3}


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on pictures of the given canvases in turn."""

    canvases: tuple[tuple[int, int], ...]
    steps: int


PHASES = (
    Phase((SQUARE,), 9000),
    Phase(tuple(c for pair in zip(*[iter(OTHER_SHAPES)] * 2, strict=True) for c in (SQUARE, *pair)), 8000),
)
WARM_RATE = 0.5  # of the peak rates, for weights that have been trained before


class Painter(nn.Module):
    """Prompt in, velocity out: the two text encoders and the transformer, trained as one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.tokenizer = clip_tokenizer(seed)
        self.tokenizer_2 = t5_tokenizer(seed)
        self.text_encoder = clip_encoder(self.tokenizer)
        self.text_encoder_2 = t5_encoder(self.tokenizer_2)
        self.transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=48,
            num_attention_heads=HEADS,
            joint_attention_dim=self.text_encoder_2.config.d_model,
            pooled_projection_dim=self.text_encoder.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(8, 20, 20),
        )
        start_closed(self.transformer)

    def read(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts → T5 states [batch, 32, 96] and CLIP's pooled [batch, 64]."""
        device = self.transformer.x_embedder.weight.device
        t5 = self.tokenizer_2(
            prompts, padding="max_length", truncation=True, max_length=T5_LENGTH, return_tensors="pt"
        ).input_ids
        clip = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt").input_ids
        return (
            self.text_encoder_2(t5.to(device)).last_hidden_state,
            self.text_encoder(clip.to(device)).pooler_output,
        )


Look = Callable[[Painter, int], None]  # what a stage shows of its averaged weights at a step


def start_closed(transformer: FluxTransformer2DModel) -> None:
    """Zero gates and a zero output: every block begins as the identity (adaLN-Zero, arXiv 2212.09748, section 3.2).

    The guidance value begins without effect too.
    """
    nn.init.zeros_(transformer.time_text_embed.guidance_embedder.linear_2.weight)
    for name, parameter in transformer.named_parameters():
        if ".linear." in name and "norm" in name:
            nn.init.zeros_(parameter)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)


@torch.no_grad()
def take(painter: Painter, folder: Path) -> None:
    """Copies a model folder's weights into `painter`. Words are matched by their spelling: vocabularies may differ.
    A narrower transformer is widened."""
    found = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    painter.transformer.load_state_dict(widened(found.transformer, painter.transformer))
    for name, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        own, other = getattr(painter, name), getattr(found, name)
        table, weights = own.get_input_embeddings().weight, other.get_input_embeddings().weight
        ids, known = getattr(painter, tokenizer).get_vocab(), getattr(found, tokenizer).get_vocab()
        words = table.clone()
        shared = sorted(ids.keys() & known.keys())
        words[[ids[word] for word in shared]] = weights[[known[word] for word in shared]]
        state = other.state_dict()
        state |= {key: words for key, value in state.items() if value.shape == weights.shape}
        own.load_state_dict(state)


def kept(folder: Path, seed: int) -> Painter:
    """A model folder's painter as it is, its tokenizers with it."""
    found = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    painter = Painter(seed)
    for part in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "transformer"):
        setattr(painter, part, getattr(found, part))
    return painter


class Optimisers:
    """Muon for the matrices within the blocks, AdamW for all else; to a training run, one optimiser.

    Muon (Jordan 2024, "Muon: an optimizer for hidden layers in neural networks") makes each update's singular values
    equal; scaled to the size of AdamW's updates (arXiv 2502.16982, section 2.2).
    """

    def __init__(self, painter: Painter, share: float = 1.0) -> None:
        named = dict(painter.named_parameters())
        hidden = {name for name, p in named.items() if p.ndim == 2 and "blocks." in name and ".linear." not in name}
        hidden = {name for name in hidden if name.startswith("transformer.")}
        others = [(name, p) for name, p in named.items() if name not in hidden]
        groups = [
            {"params": [p for _, p in others if p.ndim >= 2], "weight_decay": 0.01},
            {"params": [p for _, p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                [named[name] for name in sorted(hidden)],
                lr=share * MATRIX_RATE,
                weight_decay=0.01,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(groups, lr=share * OTHER_RATE, betas=(0.9, 0.98), fused=True),
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)])

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self) -> None:
        for part in self.parts:
            part.step()


def random_sigmas(count: int, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels: NEARLY_NOISE of them from 0.9 to 1; of the others half logit-normal and shifted towards noise for
    the canvas, half uniform.

    A picture is decided while it is nearly noise, and in this world the prompt decides almost all of it: that share is
    what makes words act, in half the time.
    """
    draw = partial(torch.rand, count, generator=generator, device=generator.device)
    t = torch.sigmoid(torch.randn(count, generator=generator, device=generator.device)).clamp(1e-4, 1 - 1e-4)
    few, many = SHIFTS
    shift = math.exp(calculate_shift(tokens, few, many, SHIFTS[few], SHIFTS[many]) if tokens >= few else 1.0)
    uniform = draw()
    spread = torch.where(draw() < 0.5, uniform, shift / (shift + 1 / t - 1))
    first = 0.9 + 0.1 * draw()
    return torch.where(draw() < NEARLY_NOISE, first, spread)


def compile_blocks(painter: Painter) -> None:
    """In place, each kind of block once for all canvases: a minute, and a fifth faster than the whole in one."""
    for block in (*painter.transformer.transformer_blocks, *painter.transformer.single_transformer_blocks):
        block.compile(dynamic=True)


def train(
    run: Run,
    vae: AutoencoderKL,
    scale: float = 1.0,
    compiled: bool = True,
    look: Look = lambda painter, step: None,
    begin: Path | None = None,
    known: bool = False,
) -> Painter:
    """Trains through all phases, going on from the last checkpoint; returns the averaged weights.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
        begin: a model folder whose weights to begin with, at WARM_RATE.
        known: it knows the world: its text encoders stay as they are, and the last phase alone is left.
        look: called every LOOK_EVERY steps and at the end with the averaged weights so far.
    """
    torch.manual_seed(run.seed)
    painter = Painter(run.seed).to(run.device)
    if begin is not None:
        take(painter, begin)
    if not known:
        reading.train(run, painter, scale, keep=begin is not None)
    for encoder in (painter.text_encoder, painter.text_encoder_2):
        encoder.requires_grad_(not known)
    phases = PHASES[-1:] if known else PHASES
    vae = vae.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    if compiled:
        compile_blocks(painter)
    average = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimiser = Optimisers(painter, 1.0 if begin is None else WARM_RATE)
    lengths = [max(1, round(phase.steps * scale)) for phase in phases]
    steps = sum(lengths)
    start = run.resume("flow", painter, optimiser, average=average)
    rate = run.one_cycle(steps, warm_up=200)
    first = 0
    with run.progress("transformer", steps, start) as progress:
        for phase, length in zip(phases, lengths, strict=True):
            pools = Pools(run, vae, phase.canvases, run.batch, length, first)
            for step in range(max(first, start), first + length):
                generator = run.generator(step)
                canvas, latents, scenes = pools(step - first)
                sigma = random_sigmas(len(latents), latents.shape[1], generator)
                noisy, wanted = noised(latents, sigma, generator)
                prompts = worded(scenes, sigma, random.Random(f"{run.seed} words {step}"), run.world)
                guidance = torch.full((len(latents),), GUIDANCE)
                predicted = velocity(run, painter, noisy, sigma, prompts, guidance, *canvas)
                loss = weighted(predicted - wanted.to(run.device), sigma)
                run.step(optimiser, loss, painter, rate(step))
                average.update_parameters(painter)
                progress(step + 1, loss=loss.item())
                run.checkpoint("flow", step + 1, steps, painter, optimiser, average=average)
                if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
                    look(cast(Painter, average.module), step + 1)
            first += length
    return cast(Painter, average.module).eval()


def worded(
    scenes: list[Scene], sigma: torch.Tensor, rng: random.Random, world: World, false: float = FALSE_PROMPTS
) -> list[str]:
    """A prompt for each scene at its noise level: its own, none, or, where the picture can be told, another's.

    Args:
        false: share of the latter.
    """
    prompts = []
    for index, (scene, level) in enumerate(zip(scenes, sigma.tolist(), strict=True)):
        told = min(1.0, max(0.0, (UNTOLD - level) / (UNTOLD - TOLD)))
        if rng.random() < DROPPED_PROMPTS:
            prompts.append("")
        elif rng.random() < false * told:
            prompts.append(describe(scenes[index - 1], rng, world).text)
        else:
            prompts.append(describe(scene, rng, world).text)
    return prompts


def noised(latents: torch.Tensor, sigma: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled latents [batch, tokens, 64] → (the same under noise of the levels [batch], the velocities)."""
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    return torch.lerp(latents, noise, sigma[:, None, None]), noise - latents


def velocity(
    run: Run,
    painter: Painter,
    noisy: torch.Tensor,
    sigma: torch.Tensor,
    prompts: list[str],
    guidance: torch.Tensor,
    width: int,
    height: int,
) -> torch.Tensor:
    """[batch, tokens, 64] in fp32, with gradients where they are wanted."""
    device = run.device
    with run.autocast():
        states, pooled = painter.read(prompts)
        with sdpa_kernel(BACKENDS[device.type]):
            predicted = painter.transformer(
                hidden_states=noisy.to(device),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=sigma.to(device),
                guidance=guidance.to(device),
                img_ids=position_ids(width, height).to(device),
                txt_ids=torch.zeros(T5_LENGTH, 3, device=device),
                return_dict=False,
            )[0]
    return cast(torch.Tensor, predicted.float())


def weighted(error: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the velocity, times σ: between the velocity's own and that of the predicted latents, which
    is σ² of it and leaves outlines soft."""
    return (error.square().mean(dim=(1, 2)) * sigma.to(error.device)).mean()


def latest(run: Run, painter: Painter) -> Painter:
    """The averaged weights of the last checkpoint of the last stage that has one, in a painter of that kind."""
    average = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    stages = [run.work / f"{stage}.pt" for stage in ("outlines", "practice", "guidance", "flow")]
    path = next((stage for stage in stages if stage.exists()), stages[-1])
    average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return cast(Painter, average.module).eval()
