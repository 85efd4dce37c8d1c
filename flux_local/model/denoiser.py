"""The denoising path: what a picture is while it is being denoised, and one Euler step of several at once.

Pictures of one canvas advance together although their step, guidance, seed and prompt differ, since the transformer
takes a timestep and a guidance scale per sample. Which pictures share a step is somebody else's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flux_local.model.latents import initial_noise, position_ids
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


class RowByRow(nn.Module):
    """A linear layer over [rows, features] as a matmul for each row, so that no row's bits know of the others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.linear(row) for row in x.split(1)])


def modulate_apart(transformer: nn.Module) -> None:
    """Makes every layer that sees one vector a picture (time, guidance, pooled prompt, modulation) work row by row.

    A matmul of few rows picks its order of summation by their number; those over tokens have many rows at any batch.
    """
    for name, module in list(transformer.named_modules()):
        parent_name, _, own_name = name.rpartition(".")
        parent_is_norm = "norm" in parent_name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and ("time_text_embed" in name or parent_is_norm):
            setattr(transformer.get_submodule(parent_name), own_name, RowByRow(module))


class Denoiser:
    """FLUX.1's transformer and the Euler rule around it."""

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        self.dtype: torch.dtype = transformer.dtype
        self.device: torch.device = transformer.device
        self._positions: dict[tuple[int, int], Tensor] = {}
        self._independent: dict[tuple[int, int, int], bool] = {}
        modulate_apart(transformer)

    @torch.inference_mode()
    def velocity(self, pictures: Sequence[Picture]) -> Tensor:
        """[B, tokens, 64]: where each picture's latents move per unit of sigma, guided where it asks for that.

        A guided picture is two rows of one pass: under its prompt, and under what to keep away from.
        """
        guided = [i for i, p in enumerate(pictures) if p.negative is not None]
        rows = [(p, p.prompt) for p in pictures]
        rows += [(p, p.negative) for p in pictures if p.negative is not None]
        velocity = self.raw_velocity(rows)
        if guided:
            toward, away = velocity[guided], velocity[len(pictures) :]
            scale = torch.tensor([pictures[i].true_cfg_scale for i in guided], device=self.device)[:, None, None]
            velocity = velocity[: len(pictures)]
            velocity[guided] = (away + scale * (toward - away)).to(velocity.dtype)
        return velocity

    @torch.inference_mode()
    def raw_velocity(self, rows: Sequence[tuple[Picture, PromptEmbedding]]) -> Tensor:
        """[rows, tokens, 64]: the transformer's own, each picture under the prompt beside it."""
        first = rows[0][0]
        timesteps = torch.tensor([p.sigmas[p.step] for p, _ in rows], dtype=torch.float32) * TIMESTEPS
        guidance = torch.tensor([p.guidance for p, _ in rows], dtype=torch.float32, device=self.device)
        velocity: Tensor = self.transformer(
            hidden_states=torch.cat([p.latents for p, _ in rows]),
            # Rounded to the model's precision before the division, as diffusers' FluxPipeline does.
            timestep=timesteps.to(self.device, self.dtype) / TIMESTEPS,
            guidance=guidance if self.transformer.config.guidance_embeds else None,
            pooled_projections=torch.cat([prompt.pooled for _, prompt in rows]),
            encoder_hidden_states=torch.cat([prompt.states for _, prompt in rows]),
            txt_ids=torch.zeros(rows[0][1].states.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=self.positions(first.width, first.height),
            return_dict=False,
        )[0]
        return velocity

    @torch.inference_mode()
    def advance(self, pictures: Sequence[Picture]) -> None:
        """Takes each picture one Euler step further: x(σ') = x(σ) + (σ' − σ)·v, in fp32, kept in the model's dtype.

        Either all pictures are moved or, if the transformer raises, none.

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

    def independent(self, width: int, height: int, rows: int, prompt: PromptEmbedding) -> bool:
        """Whether a picture's bits are the same in a batch of so many rows as alone. Measured, once a shape.

        The rows differ in noise, step and guidance, as those of strangers do. Bits that depend on the number of rows
        (another blocking of a matmul, say) show in the first step or not at all.
        """
        key = (width, height, rows)
        if key not in self._independent:
            pictures = [
                Picture(width, height, prompt, 1.0 + i, [1.0 - i / (2 * rows), 0.0],
                        initial_noise(i, width, height).to(self.device, self.dtype))
                for i in range(rows)
            ]  # fmt: skip
            together = self.raw_velocity([(p, prompt) for p in pictures])
            alone = [self.raw_velocity([(p, prompt)]) for p in pictures]
            self._independent[key] = bool(torch.equal(together, torch.cat(alone)))
        return self._independent[key]

    def positions(self, width: int, height: int) -> Tensor:
        """The rotary positions of a canvas, kept from the first time."""
        key = (width, height)
        if key not in self._positions:
            self._positions[key] = position_ids(width, height).to(self.device, self.dtype)
        return self._positions[key]
