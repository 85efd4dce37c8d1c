"""FLUX.1's autoencoder as modules whose tensors have diffusers' names: what `AutoencoderKL` computes, to the bit.

diffusers' own class brings seconds of imports with it, most of a start. Knows nothing of packed latents, of bytes, nor
of how a decoder is walked through between the steps of other pictures: `vae` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6
OVERLAP = 0.25  # of a tile's side


class ResnetBlock(nn.Module):
    """Two convolutions beside a shortcut: [B, C, h, w] → [B, C', h, w]."""

    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPSILON)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out, EPSILON)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        out: Tensor = y + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class Attention(nn.Module):
    """One head over all positions, beside a shortcut: [B, C, h, w] → the same shape."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPSILON)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (linear(tokens)[:, None] for linear in (self.to_q, self.to_k, self.to_v))
        mixed: Tensor = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return mixed.transpose(1, 2).reshape(x.shape) + x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x)
        return out


class Downsampler(nn.Module):
    """Half the height and width; what lacks for the last window lies below and on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsampler(nn.Module):
    """Twice the height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Block(nn.Module):
    """Residual blocks, and then a change of size where there is one: its `downsamplers` or `upsamplers`."""

    def __init__(self, channels: int, out: int, layers: int, groups: int, sampler: nn.Module | None, name: str) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels if i == 0 else out, out, groups) for i in range(layers)])
        self.sampler = name
        setattr(self, name, None if sampler is None else nn.ModuleList([sampler]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *(getattr(self, self.sampler) or ())):
            x = layer(x)
        return x


class Coder(nn.Module):
    """What both halves have: a convolution, blocks, a norm, a convolution."""

    def __init__(self, into: int, first: int, last: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(into, first, 3, padding=1)
        self.conv_norm_out = nn.GroupNorm(groups, last, EPSILON)
        self.conv_out = nn.Conv2d(last, out, 3, padding=1)

    def finished(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Encoder(Coder):
    """[B, 3, 8h, 8w] in −1 … 1 → mean and logarithm of the variance, [B, 2·latent channels, h, w]."""

    def __init__(self, widths: Sequence[int], layers: int, groups: int, attention: bool, channels: int) -> None:
        super().__init__(3, widths[0], widths[-1], 2 * channels, groups)
        self.down_blocks = nn.ModuleList()
        for before, width in zip((widths[0], *widths), widths, strict=False):
            down = None if len(self.down_blocks) == len(widths) - 1 else Downsampler(width)
            self.down_blocks.append(Block(before, width, layers, groups, down, "downsamplers"))
        self.mid_block = MidBlock(widths[-1], groups, attention)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.finished(self.mid_block(x))


class Decoder(Coder):
    """[B, latent channels, h, w] → [B, 3, 8h, 8w]."""

    def __init__(self, widths: Sequence[int], layers: int, groups: int, attention: bool, channels: int) -> None:
        widths = widths[::-1]
        super().__init__(channels, widths[0], widths[-1], 3, groups)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList()
        for before, width in zip((widths[0], *widths), widths, strict=False):
            up = None if len(self.up_blocks) == len(widths) - 1 else Upsampler(width)
            self.up_blocks.append(Block(before, width, layers + 1, groups, up, "upsamplers"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.finished(x)


class AutoencoderKL(nn.Module):
    """Both halves, as a configuration of diffusers says.

    Raises:
        KeyError, ValueError: the configuration lacks something, or is of another kind of autoencoder.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        kinds = {*config["down_block_types"], *config["up_block_types"], config.get("act_fn", "silu")}
        if not kinds <= {"DownEncoderBlock2D", "UpDecoderBlock2D", "silu"}:
            raise ValueError(f"an autoencoder of other blocks: {', '.join(sorted(kinds))}")
        self.channels: int = config["latent_channels"]
        self.scaling_factor: float = config["scaling_factor"]
        self.shift_factor: float = config.get("shift_factor") or 0.0
        self.sample_size: int = config["sample_size"]
        halves = (
            config["block_out_channels"], config["layers_per_block"], config["norm_num_groups"],
            config.get("mid_block_add_attention", True), self.channels,
        )  # fmt: skip
        self.encoder, self.decoder = Encoder(*halves), Decoder(*halves)
        double, single = 2 * self.channels, self.channels
        self.quant_conv = nn.Conv2d(double, double, 1) if config.get("use_quant_conv", True) else None
        self.post_quant_conv = nn.Conv2d(single, single, 1) if config.get("use_post_quant_conv", True) else None

    @property
    def scale(self) -> int:
        """Pixels of a latent's side."""
        return 1 << (len(self.decoder.up_blocks) - 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in −1 … 1 → the mean of the posterior, [B, latent channels, h, w]."""
        moments: Tensor = self.encoder(pictures)
        return (moments if self.quant_conv is None else self.quant_conv(moments))[:, : self.channels]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, latent channels, h, w] → [B, 3, H, W]."""
        out: Tensor = self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))
        return out

    def tiled_encode(self, pictures: Tensor) -> Tensor:
        """As `encode`, in tiles of the `sample_size` that the model was trained at."""
        return tiled(self.encode, pictures, self.sample_size, self.sample_size // self.scale)

    def tiled_decode(self, latents: Tensor) -> Tensor:
        """As `decode`, in tiles of the `sample_size` that the model was trained at."""
        return tiled(self.decode, latents, self.sample_size // self.scale, self.sample_size)


def tiled(work: Callable[[Tensor], Tensor], x: Tensor, side: int, becomes: int) -> Tensor:
    """`work` on tiles that overlap by a quarter, each faded into those above it and on its left.

    Args:
        side: of a tile.
        becomes: the side of what `work` makes of one.
    """
    step, faded = int(side * (1 - OVERLAP)), int(becomes * OVERLAP)
    kept = becomes - faded
    rows: list[list[Tensor]] = []
    for top in range(0, x.shape[2], step):
        row: list[Tensor] = []
        for left in range(0, x.shape[3], step):
            tile = work(x[:, :, top : top + side, left : left + side])
            if rows:
                tile = into(rows[-1][len(row)], tile, faded, 2)
            if row:
                tile = into(row[-1], tile, faded, 3)
            row.append(tile)
        rows.append(row)
    return torch.cat([torch.cat([tile[:, :, :kept, :kept] for tile in row], dim=3) for row in rows], dim=2)


def into(first: Tensor, second: Tensor, length: int, dim: int) -> Tensor:
    """The second tile, whose first `length` rows (or columns) begin as the first tile's last and become its own."""
    length = min(length, first.shape[dim], second.shape[dim])
    share = torch.arange(length, device=second.device, dtype=second.dtype).div_(length)
    share = share.view(-1, 1) if dim == 2 else share
    own, other = second.narrow(dim, 0, length), first.narrow(dim, first.shape[dim] - length, length)
    own.copy_(other * (1 - share) + own * share)
    return second
