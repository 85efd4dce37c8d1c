"""What stands for places and times in a transformer: rotations of heads, and sinusoids. Knows no weights."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from flux_local.model.latents import position_ids

ROTARY_BASE = 10_000.0
SINUSOIDS = 256
"""Features of a time or a guidance scale before its MLP."""


@lru_cache(maxsize=16)  # 2 to 9 MB each at FLUX.1's sizes, and clients may ask for any canvas
def rotary_table(axes: tuple[int, ...], width: int, height: int, text: int, device: torch.device) -> Tensor:
    """[text + tokens, head size / 2, 2] fp32 of a canvas: cosine and sine of each pair's angle."""
    positions = torch.cat([torch.zeros(text, 3), position_ids(width, height)]).double()
    powers = [torch.arange(0, size, 2, dtype=torch.float64) / size for size in axes]
    angle = torch.cat([torch.outer(positions[:, i], ROTARY_BASE**-power) for i, power in enumerate(powers)], dim=1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)


def sinusoids(values: Tensor) -> Tensor:
    """[N] → [N, 256] fp32: cosines, then sines, of the values at geometric frequencies (arXiv 1706.03762, 3.5)."""
    half = SINUSOIDS // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=values.device) * (-math.log(10_000) / half))
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)
