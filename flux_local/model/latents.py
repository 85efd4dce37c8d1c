"""The geometry of FLUX.1's latents: noise from a seed, 2×2 packing into tokens, and the tokens' positions.

Shapes follow the paper's names: a canvas of W × H pixels has latents [16, H/8, W/8] and H/16 · W/16 tokens of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

VAE_SCALE = 8
PATCH = 2


def initial_noise(seed: int, width: int, height: int, channels: int = 16) -> Tensor:
    """Unit Gaussian noise, packed: [1, tokens, 4·channels] fp32 on the CPU.

    One generator for the one picture, so that the noise depends on its seed and canvas alone: what diffusers'
    `FluxPipeline` draws for `generator=torch.Generator("cpu").manual_seed(seed)`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = (1, channels, height // VAE_SCALE, width // VAE_SCALE)
    return pack(torch.randn(shape, generator=generator, dtype=torch.float32))


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h/2 · w/2, 4·C]."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, width: int, height: int) -> Tensor:
    """[B, tokens, 4·C] → [B, C, height/8, width/8]; the inverse of `pack`."""
    b, _, d = tokens.shape
    h, w = height // VAE_SCALE, width // VAE_SCALE
    patches = tokens.view(b, h // PATCH, w // PATCH, d // (PATCH * PATCH), PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, d // (PATCH * PATCH), h, w)


def position_ids(width: int, height: int) -> Tensor:
    """[tokens, 3] fp32: (0, row, column) of each 16-pixel patch. Text tokens are at (0, 0, 0)."""
    rows = torch.arange(height // (VAE_SCALE * PATCH))
    columns = torch.arange(width // (VAE_SCALE * PATCH))
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.zeros(len(grid), 1), grid.float()], dim=1)
