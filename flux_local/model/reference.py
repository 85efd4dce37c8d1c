"""diffusers' own `FluxTransformer2DModel` behind the interface of `FluxTransformer`: what ours is measured against.

For `--reference`, for comparisons and for a card that is in doubt; slower, since it computes everything at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flux_local.model.latents import position_ids
from flux_local.model.text import PromptEmbedding
from flux_local.model.transformer import TIMESTEPS


@dataclass(frozen=True)
class ReferenceCondition:
    """What the module is called with."""

    states: Tensor
    pooled: Tensor
    times: Tensor
    """[steps] in 0 … 1."""
    guidance: Tensor


class ReferenceTransformer:
    """Wraps a loaded module.

    Args:
        device: where it computes, if its weights are elsewhere.
    """

    attention_by: str = "diffusers"
    recordings: int = 0

    def __init__(self, module: Any, device: torch.device | None = None) -> None:
        self.module = module
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = device or module.device

    def condition(self, prompt: PromptEmbedding, sigmas: Sequence[float], guidance: float) -> ReferenceCondition:
        # Rounded to the model's precision before the division, as diffusers' FluxPipeline does.
        times = (torch.tensor(sigmas, dtype=torch.float32) * TIMESTEPS).to(self.device, self.dtype) / TIMESTEPS
        return ReferenceCondition(
            prompt.states.to(self.device, self.dtype),
            prompt.pooled.to(self.device, self.dtype),
            times,
            torch.tensor([guidance], dtype=torch.float32, device=self.device),
        )

    @torch.inference_mode()
    def velocity(
        self, latents: Tensor, conditions: Sequence[ReferenceCondition], steps: Sequence[int], width: int, height: int
    ) -> Tensor:
        text = conditions[0].states.shape[1]
        velocity: Tensor = self.module(
            hidden_states=latents,
            timestep=torch.stack([c.times[step] for c, step in zip(conditions, steps, strict=True)]),
            guidance=torch.cat([c.guidance for c in conditions]) if self.module.config.guidance_embeds else None,
            pooled_projections=torch.cat([c.pooled for c in conditions]),
            encoder_hidden_states=torch.cat([c.states for c in conditions]),
            txt_ids=torch.zeros(text, 3, device=self.device, dtype=self.dtype),
            img_ids=position_ids(width, height).to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return velocity
