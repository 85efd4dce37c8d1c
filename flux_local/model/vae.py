"""Latents ↔ pixels through FLUX.1's autoencoder, one picture at a time."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flux_local.model.autoencoder import AutoencoderKL
from flux_local.model.latents import VAE_SCALE, pack, unpack
from flux_local.model.ops import Ops

T = TypeVar("T")

BAND = 100_000_000
"""Multiplications of a convolution that a CPU does in one go, about two milliseconds of two cores: a layer with more
is done in bands of rows, with a pause after each, so that a step of another picture never waits for a whole layer. On
a GPU all layers together take less than a step."""


class Autoencoder:
    """Packed latents to 8-bit RGB and back.

    Args:
        tile_above: pixels of a canvas from which on it is encoded and decoded in tiles, which overlap and are blended.
    """

    def __init__(self, vae: AutoencoderKL, ops: Ops | None = None, tile_above: int | None = None) -> None:
        self.tile_above = tile_above
        self.ops = ops or Ops()
        first = vae.decoder.conv_in.weight
        self.device, self.dtype = first.device, first.dtype
        self.vae = vae
        if self.device.type == "cuda":
            nn.Module.to(vae, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.in_bands = self.device.type == "cpu"
        self.biases_apart = self.device.type == "cuda"

    @torch.inference_mode()
    def encode(self, pixels: bytes, width: int, height: int) -> Tensor:
        """RGB rows → the mean of the posterior, scaled and packed: [1, tokens, 64]."""
        rows = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, height, width, 3)
        picture = (rows.permute(0, 3, 1, 2).to(self.device).float() / 127.5 - 1).to(self.dtype)
        in_tiles = self.tile_above is not None and width * height > self.tile_above
        mean = self.vae.tiled_encode(picture) if in_tiles else self.vae.encode(picture)
        return pack((mean - self.vae.shift_factor) * self.vae.scaling_factor)

    def repaint(self, mask: bytes, width: int, height: int) -> Tensor:
        """A byte a pixel → [1, tokens, 64]: 1 for each latent that covers a pixel to be repainted."""
        rows = torch.frombuffer(bytearray(mask), dtype=torch.uint8).view(1, 1, height, width)
        covered = torch.nn.functional.max_pool2d((rows > 0).float(), VAE_SCALE)
        return pack(covered.expand(-1, self.vae.channels, -1, -1)).to(self.device)

    @torch.inference_mode()
    def layers(self, latents: Tensor, width: int, height: int) -> Generator[None, None, Tensor]:
        """[1, tokens, 64] → [3, height, width] in 0 … 1, fp32, not clamped: returned at the end of a generator.

        Yields between layers and parts of layers, so that whoever has more to do than this one picture can do it
        meanwhile. NaN where the model failed.
        """
        spatial = unpack(latents, width, height)
        spatial = spatial / self.vae.scaling_factor + self.vae.shift_factor
        x = spatial.to(self.dtype)
        if self.tile_above is not None and width * height > self.tile_above:
            tiled = self.vae.tiled_decode(x)
            yield
            return tiled[0].float() / 2 + 0.5
        if self.vae.post_quant_conv is not None:
            x = self.vae.post_quant_conv(x)
        decoder: Any = self.vae.decoder
        x = decoder.conv_in(x)
        middle = decoder.mid_block
        x = yield from self.residual(middle.resnets[0], x)
        for attention in middle.attentions:
            x = attention(x)
        x = yield from self.residual(middle.resnets[1], x)
        bias: Tensor | None = None
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x, bias = (yield from self.residual(resnet, x, bias)), None
            for upsampler in block.upsamplers or ():
                x = self.ops.doubled(x)
                yield
                assert bias is None, "a block has one upsampler"
                x, bias = yield from self.unbiased(upsampler.conv, x)
        x = self.norm_silu(decoder.conv_norm_out, x, bias)
        yield
        x = yield from self.convolved(decoder.conv_out, x)
        picture: Tensor = x[0].float() / 2 + 0.5
        return picture

    def residual(self, block: Any, x: Tensor, bias: Tensor | None = None) -> Generator[None, None, Tensor]:
        """A block of two convolutions beside a shortcut: [1, C, h, w] → [1, C', h, w].

        Args:
            bias: [C], what x still lacks.
        """
        y = self.norm_silu(block.norm1, x, bias)
        yield
        y, lacking = yield from self.unbiased(block.conv1, y)
        y = self.norm_silu(block.norm2, y, lacking)
        yield
        y, lacking = yield from self.unbiased(block.conv2, y)
        if (shortcut := block.conv_shortcut) is not None:
            x, own = yield from self.unbiased(shortcut, x)
            through = None if bias is None else shortcut.weight.flatten(1).float() @ bias.float()
            bias = together(own, through)
        return self.ops.residual_sum(x, y, together(lacking, bias))

    def unbiased(self, conv: Any, x: Tensor) -> Generator[None, None, tuple[Tensor, Tensor | None]]:
        """A convolution and, on a GPU, the bias that it lacks then: what follows adds it in passing.

        In torch that is a pass of its own over the result, at a third of the memory's speed.
        """
        if not self.biases_apart:
            whole = yield from self.convolved(conv, x)
            return whole, None
        out = F.conv2d(x, conv.weight, padding=conv.padding)
        yield
        return out, conv.bias

    def convolved(self, conv: Any, x: Tensor) -> Generator[None, None, Tensor]:
        """A convolution that keeps height and width, whole or in bands of rows, with a pause after each.

        How it is divided depends on the sizes alone, so that the bits never depend on what else is running.
        """
        height, width = x.shape[2:]
        rows = max(1, BAND // (width * conv.weight.numel())) if self.in_bands else height
        if rows >= height:
            whole: Tensor = conv(x)
            yield
            return whole
        out = x.new_empty(1, conv.out_channels, height, width)
        halo, sides = conv.padding
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            above, below = max(0, halo - top), max(0, bottom + halo - height)
            band = F.pad(x[:, :, top - halo + above : bottom + halo - below], (0, 0, above, below))
            out[:, :, top:bottom] = F.conv2d(band, conv.weight, conv.bias, padding=(0, sides))
            yield
        return out

    def norm_silu(self, norm: Any, x: Tensor, addend: Tensor | None) -> Tensor:
        return self.ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, addend)

    @torch.inference_mode()
    def decoding(self, latents: Tensor, width: int, height: int) -> Generator[None, None, bytes]:
        """As `layers`, to RGB bytes, row by row, 3 · width · height of them.

        Raises:
            ArithmeticError: the picture has a value that is not a finite number.
        """
        picture = yield from self.layers(latents, width, height)
        if not bool(torch.isfinite(picture).all()):
            raise ArithmeticError("the decoded picture holds values that are not finite")
        rounded = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
        rows: bytes = rounded.permute(1, 2, 0).contiguous().cpu().numpy().tobytes()
        return rows

    def decode(self, latents: Tensor, width: int, height: int) -> bytes:
        """`decoding` in one go."""
        return finished(self.decoding(latents, width, height))


def together(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of two biases in fp32, or the only one as it is."""
    return b if a is None else a if b is None else a.float() + b


def finished(work: Generator[None, None, T]) -> T:
    """What a generator returns, without its pauses."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: T = end.value
            return result
