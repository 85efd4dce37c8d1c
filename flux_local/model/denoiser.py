"""The denoising path: what a picture is while it is being denoised, and one Euler step of several at once.

Pictures of one canvas advance together although their step, guidance, seed and prompt differ, since the transformer
takes a timestep and a guidance scale per sample. Which pictures share a step is somebody else's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux_local.model.latents import position_ids
from flux_local.model.text import PromptEmbedding

TIMESTEPS = 1000
"""The transformer's time runs from 0 to this; sigma is its thousandth."""


@dataclass(frozen=True)
class Keep:
    """What inpainting holds on to. All packed, [1, tokens, 64]."""

    repaint: Tensor
    """1 where the picture is to be made anew, 0 where it stays."""
    original: Tensor
    noise: Tensor

    def at(self, sigma: float) -> Tensor:
        """The original at a noise level."""
        return noised(self.original, self.noise, sigma)


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x(σ) = σ·noise + (1 − σ)·clean; at σ = 1 exactly the noise."""
    return sigma * noise + (1 - sigma) * clean


@dataclass
class Picture:
    """A picture being denoised: packed latents [1, tokens, 64] at noise level `sigmas[step]`."""

    width: int
    height: int
    prompt: PromptEmbedding
    guidance: float
    sigmas: list[float]
    latents: Tensor
    step: int = 0
    keep: Keep | None = None
    negative: PromptEmbedding | None = None
    """What to keep away from, with `true_cfg_scale`; None for one pass a step."""
    true_cfg_scale: float = 1.0
    velocity: Tensor | None = None
    """That of the last step."""

    def estimate(self) -> Tensor:
        """What the finished latents would be if the last step's velocity held: x(σ) − σ·v."""
        assert self.velocity is not None
        return self.latents - self.sigmas[self.step] * self.velocity

    @property
    def steps_left(self) -> int:
        return len(self.sigmas) - 1 - self.step


class Denoiser:
    """FLUX.1's transformer and the Euler rule around it."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.dtype: torch.dtype = transformer.dtype
        self.device: torch.device = transformer.device
        self._positions: dict[tuple[int, int], Tensor] = {}

    @torch.inference_mode()
    def velocity(self, pictures: Sequence[Picture]) -> Tensor:
        """[B, tokens, 64]: where each picture's latents move per unit of sigma, guided where it asks for that."""
        velocity = self.raw_velocity(pictures, [p.prompt for p in pictures])
        guided = [i for i, p in enumerate(pictures) if p.negative is not None]
        if guided:
            negatives = [p.negative for p in pictures if p.negative is not None]
            away = self.raw_velocity([pictures[i] for i in guided], negatives)
            scale = torch.tensor([pictures[i].true_cfg_scale for i in guided], device=self.device)[:, None, None]
            velocity[guided] = (away + scale * (velocity[guided] - away)).to(velocity.dtype)
        return velocity

    def raw_velocity(self, pictures: Sequence[Picture], prompts: Sequence[PromptEmbedding]) -> Tensor:
        """[B, tokens, 64]: the transformer's own, each picture under the prompt beside it."""
        first = pictures[0]
        timesteps = torch.tensor([p.sigmas[p.step] for p in pictures], dtype=torch.float32) * TIMESTEPS
        guidance = torch.tensor([p.guidance for p in pictures], dtype=torch.float32, device=self.device)
        velocity: Tensor = self.transformer(
            hidden_states=torch.cat([p.latents for p in pictures]),
            # Rounded to the model's precision before the division, as diffusers' FluxPipeline does.
            timestep=timesteps.to(self.device, self.dtype) / TIMESTEPS,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            pooled_projections=torch.cat([prompt.pooled for prompt in prompts]),
            encoder_hidden_states=torch.cat([prompt.states for prompt in prompts]),
            txt_ids=torch.zeros(prompts[0].states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.positions(first.width, first.height),
            return_dict=False,
        )[0]
        return velocity

    @torch.inference_mode()
    def advance(self, pictures: Sequence[Picture]) -> None:
        """Takes each picture one Euler step further: x(σ') = x(σ) + (σ' − σ)·v, in fp32, kept in the model's dtype.

        Args:
            pictures: of one canvas and one prompt length, each with steps left.
        """
        for picture, velocity in zip(pictures, self.velocity(pictures).split(1), strict=True):
            sigma, following = (torch.tensor(s, dtype=torch.float32) for s in picture.sigmas[picture.step :][:2])
            moved = picture.latents.float() + (following - sigma).to(self.device) * velocity
            if picture.keep is not None:
                moved = torch.where(picture.keep.repaint > 0, moved, picture.keep.at(float(following)))
            picture.latents = moved.to(self.dtype)
            picture.velocity = velocity
            picture.step += 1

    def positions(self, width: int, height: int) -> Tensor:
        """The rotary positions of a canvas, kept from the first time."""
        key = (width, height)
        if key not in self._positions:
            self._positions[key] = position_ids(width, height).to(self.device, self.dtype)
        return self._positions[key]
