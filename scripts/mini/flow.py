"""Stage two: the transformer and both text encoders, by rectified flow on the autoencoder's latents.

The convention is FLUX.1's: x(σ) = (1 − σ)·latents + σ·noise, and the network predicts the velocity noise − latents.
Begins at 64², where a picture is 16 tokens and colours and shapes are learnt cheaply, and goes on at full size.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .drawings import Scene, describe, draw, random_scene
from .run import Run
from .text import T5_LENGTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

CHUNK = 2048  # pictures encoded at a time
REUSE = 12  # epochs over a chunk before it is replaced
DROPPED_PROMPTS = 0.1  # trained with the empty prompt, so that classifier-free guidance means something


@dataclass(frozen=True)
class Phase:
    """`steps` optimiser steps on pictures of the given canvases in turn, `batch` at a time."""

    canvases: tuple[tuple[int, int], ...]
    batch: int
    steps: int


@dataclass(frozen=True)
class Round:
    """Phases under one learning-rate cycle. A round starts from the averaged weights of the one before.

    `mu`: log of the factor by which noise levels are shifted towards noise; None is the scheduler's own.
    """

    name: str
    peak_rate: float
    mu: float | None
    phases: tuple[Phase, ...]


ROUNDS = (
    Round(
        "transformer, first round",
        1.5e-3,
        None,
        (
            Phase(((64, 64),), 96, 4500),
            Phase(((128, 128),), 64, 1500),
            Phase(((192, 192), (128, 128), (192, 112), (112, 192), (160, 160)), 32, 900),
        ),
    ),
    # Where things are and what shape they have is decided above σ = 0.85, which the first round hardly sees.
    Round(
        "transformer, second round",
        1.0e-3,
        1.7,
        (Phase(((128, 128),), 64, 2500), Phase(((192, 192), (128, 128)), 32, 500)),
    ),
)


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
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=self.text_encoder_2.config.d_model,
            pooled_projection_dim=self.text_encoder.config.hidden_size,
            guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        )

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


def position_ids(width: int, height: int, device: torch.device) -> torch.Tensor:
    """[tokens, 3]: row and column of each 16-pixel patch."""
    rows, columns = torch.meshgrid(torch.arange(height // 16), torch.arange(width // 16), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float().to(device)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[batch, 16, h, w] → [batch, h/2·w/2, 64]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


class Pool:
    """Scaled latents of fresh drawings on one canvas. What step `k` gets depends on the seed and `k` alone."""

    def __init__(
        self, run: Run, vae: AutoencoderKL, width: int, height: int, batch: int, chunk: int, offset: int
    ) -> None:
        self.run, self.vae, self.width, self.height, self.offset = run, vae, width, height, offset
        self.batch, self.chunk, self.loaded = batch, chunk, -1
        self.scenes: list[Scene] = []
        self.latents = torch.empty(0)

    def __call__(self, step: int) -> tuple[torch.Tensor, list[Scene]]:
        index = step * self.batch // (self.chunk * REUSE)
        if index != self.loaded:
            self.load(index)
        chosen = random.Random(f"{self.run.seed} {self.width}x{self.height} {self.offset + step}").sample(
            range(self.chunk), self.batch
        )
        return self.latents[chosen].float(), [self.scenes[i] for i in chosen]

    @torch.no_grad()
    def load(self, index: int) -> None:
        rng = random.Random(f"{self.run.seed} {self.width}x{self.height} chunk {self.offset + index}")
        self.scenes = [random_scene(rng, self.width, self.height) for _ in range(self.chunk)]
        parts = []
        for at in range(0, self.chunk, 32):
            drawn = [np.asarray(draw(scene, self.width, self.height)) for scene in self.scenes[at : at + 32]]
            x = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            with self.run.autocast():
                mean = self.vae.encode(x.to(self.run.device, memory_format=torch.channels_last)).latent_dist.mean
            scaled = (mean.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor
            parts.append(pack(scaled))
        self.latents = torch.cat(parts).half()
        self.loaded = index


def random_sigmas(count: int, mu: float, generator: torch.Generator) -> torch.Tensor:
    """Logit-normal noise levels with a tenth uniform, shifted towards noise by exp(mu)."""
    t = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    t = torch.where(torch.rand(count, generator=generator) < 0.1, uniform, t).clamp(1e-4, 1 - 1e-4)
    shift = math.exp(mu)
    return shift / (shift + 1 / t - 1)


def train(run: Run, vae: AutoencoderKL, scale: float = 1.0, compiled: bool = True) -> Painter:
    """Trains through all rounds, going on from the last checkpoint; returns the averaged weights.

    Args:
        scale: share of the recipe's steps; less than 1 is for trying things out.
    """
    torch.manual_seed(run.seed)
    painter = Painter(run.seed).to(run.device)
    vae = vae.eval().requires_grad_(False).to(run.device, memory_format=torch.channels_last)
    transformer = cast(nn.Module, torch.compile(painter.transformer) if compiled else painter.transformer)
    for number, part in enumerate(ROUNDS, start=1):
        average = train_round(run, vae, painter, transformer, number, part, scale)
        painter.load_state_dict(average.module.state_dict())
    return painter.eval()


def train_round(
    run: Run, vae: AutoencoderKL, painter: Painter, transformer: nn.Module, number: int, part: Round, scale: float
) -> AveragedModel:
    """One round, in place; returns the running average of the weights."""
    average = AveragedModel(painter, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    matrices = [p for p in painter.parameters() if p.ndim >= 2]
    others = [p for p in painter.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=part.peak_rate, betas=(0.9, 0.98), fused=True)
    lengths = [max(1, round(phase.steps * scale)) for phase in part.phases]
    steps = sum(lengths)
    offset = (number - 1) * 1_000_000  # no round sees another's pictures or noise
    start = run.resume(f"flow-{number}", painter, optimiser, average=average)
    schedule = run.one_cycle(optimiser, steps, start, warm_up=300)
    first = 0
    with run.progress(part.name, steps, start) as progress:
        for phase, length in zip(part.phases, lengths, strict=True):
            chunk = min(CHUNK if len(phase.canvases) == 1 else CHUNK // 4, phase.batch * length)
            pools = [Pool(run, vae, w, h, phase.batch, chunk, offset) for w, h in phase.canvases]
            for step in range(max(first, start), first + length):
                turn, pool = (step - first) // len(pools), pools[(step - first) % len(pools)]
                generator = torch.Generator().manual_seed(run.seed * 1_000_003 + offset + step)
                latents, scenes = pool(turn)
                rng = random.Random(f"{run.seed} words {offset + step}")
                prompts = ["" if rng.random() < DROPPED_PROMPTS else describe(scene, rng).text for scene in scenes]
                mu = calculate_shift(latents.shape[1]) if part.mu is None else part.mu
                loss = flow_loss(run, painter, transformer, latents, prompts, pool.width, pool.height, mu, generator)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                average.update_parameters(painter)
                progress(step + 1, loss=loss.item())
                run.checkpoint(f"flow-{number}", step + 1, steps, painter, optimiser, average=average)
            first += length
    return average


def flow_loss(
    run: Run,
    painter: Painter,
    transformer: nn.Module,
    latents: torch.Tensor,
    prompts: list[str],
    width: int,
    height: int,
    mu: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity at random noise levels. The guidance value is random and means nothing yet."""
    device = run.device
    sigma = random_sigmas(len(latents), mu, generator)
    guidance = 1 + 9 * torch.rand(len(latents), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    noisy = torch.lerp(latents, noise, sigma[:, None, None])
    with run.autocast():
        states, pooled = painter.read(prompts)
        with sdpa_kernel(SDPBackend.MATH):
            velocity = transformer(
                hidden_states=noisy.to(device),
                encoder_hidden_states=states,
                pooled_projections=pooled,
                timestep=sigma.to(device),
                guidance=guidance.to(device),
                img_ids=position_ids(width, height, device),
                txt_ids=torch.zeros(T5_LENGTH, 3, device=device),
                return_dict=False,
            )[0]
    return F.mse_loss(velocity.float(), (noise - latents).to(device))


def latest(run: Run) -> Painter:
    """The averaged weights of the last checkpoint."""
    average = AveragedModel(Painter(run.seed), multi_avg_fn=get_ema_multi_avg_fn(0.999))
    path = max(run.work.glob("flow-*.pt"))
    average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return cast(Painter, average.module).eval()
