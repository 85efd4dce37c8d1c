"""The autoencoder's operations of `ops` as Triton kernels, on channels-last pictures; all others are in `kernels`.

As there, launch shapes and the order of all sums are fixed by the sizes alone. Knows no weights and no layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers that a program has at a time."""
STAGES = 4
"""Of the loops over sums: while a tile is added, the next ones are on their way. One that waits for each tile reads at
a third of the memory's speed (measured on an H200)."""
BLOCKS = 1024
"""A picture is divided into so many for its sums; into fewer where one would have less than a tile for each stage."""
SUMS = 2048
"""Numbers of these sums that a program has at a time."""


@triton.jit(do_not_specialize=["pixels", "span"])
def _channel_sums(
    x, sums, pixels, span, channels, STAGES: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    block, picture = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    left = tl.minimum(span, pixels - block * span).to(tl.int32)
    start = x + (picture * pixels + block * span) * channels
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in tl.range(0, left, ROWS, num_stages=STAGES):
        pixel = first + row
        inside = (channel < channels) & (pixel < left)
        value = tl.load(start + pixel * channels + channel, inside, 0.0).to(tl.float32)
        total += value
        squares += value * value
    channel = tl.arange(0, CHANNELS)
    out = sums + (picture * tl.num_programs(0) + block) * 2 * channels + channel
    tl.store(out, tl.sum(total, 0), channel < channels)
    tl.store(out + channels, tl.sum(squares, 0), channel < channels)


@triton.jit(do_not_specialize=["pixels", "blocks"])
def _scale_and_shift(
    sums, weight, bias, addend, scale, shift, pixels, blocks, channels, epsilon, ADD: tl.constexpr,
    PER_GROUP: tl.constexpr, STAGES: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, GROUP)
    start = sums + picture * blocks * 2 * channels + tl.program_id(0) * PER_GROUP + column[None, :]
    total = tl.zeros((ROWS, GROUP), tl.float64)
    squares = tl.zeros((ROWS, GROUP), tl.float64)
    for first in tl.range(0, blocks, ROWS, num_stages=STAGES):
        at = start + (first + row) * 2 * channels
        inside = (first + row < blocks) & (column[None, :] < PER_GROUP)
        total += tl.load(at, inside, 0.0).to(tl.float64)
        squares += tl.load(at + channels, inside, 0.0).to(tl.float64)
    channel, inside = tl.program_id(0) * PER_GROUP + column, column < PER_GROUP
    of_channels, of_squares = tl.sum(total, 0), tl.sum(squares, 0)
    if ADD:
        added = tl.load(addend + channel, inside, 0.0).to(tl.float64)
        of_squares += added * (2.0 * of_channels + added * pixels)
        of_channels += added * pixels
    count = pixels.to(tl.float64) * PER_GROUP
    mean = tl.sum(of_channels, 0) / count
    variance = tl.sum(of_squares, 0) / count - mean * mean
    deviation = tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + epsilon)
    factor = tl.load(weight + channel, inside, 0.0).to(tl.float64) / deviation
    centre = mean - added if ADD else mean
    constant = tl.load(bias + channel, inside, 0.0).to(tl.float64) - centre * factor
    tl.store(scale + picture * channels + channel, factor.to(tl.float32), inside)
    tl.store(shift + picture * channels + channel, constant.to(tl.float32), inside)


@triton.jit(do_not_specialize=["pixels"])
def _scale_shift_silu(x, scale, shift, out, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    block, picture = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    pixel, channel = block * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (channel < channels) & (pixel < pixels)
    at = (picture * pixels + pixel) * channels + channel
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    value = value * tl.load(scale + picture * channels + channel, channel < channels, 0.0)
    value += tl.load(shift + picture * channels + channel, channel < channels, 0.0)
    tl.store(out + at, (value * tl.sigmoid(value)).to(out.dtype.element_ty), inside)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, addend: Tensor | None = None
) -> Tensor:
    """`ops.group_norm_silu`: once over the pictures for the sums, once to turn them.

    The sums of blocks are put together in fp64; what the addend does to them, and to the result, is known without it.
    """
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    pixels, per_group = height * width, channels // groups
    power, group = triton.next_power_of_2(channels), triton.next_power_of_2(per_group)
    rows = max(1, TILE // power)
    span = triton.cdiv(triton.cdiv(pixels, BLOCKS), STAGES * rows) * STAGES * rows
    blocks = triton.cdiv(pixels, span)
    sums = torch.empty(batch, blocks, 2, channels, dtype=torch.float32, device=x.device)
    scale, shift = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    _channel_sums[(blocks, batch)](
        x, sums, pixels, span, channels, STAGES=STAGES, ROWS=rows, CHANNELS=power, num_warps=8
    )  # fmt: skip
    _scale_and_shift[(groups, batch)](
        sums, weight, bias, weight if addend is None else addend, scale, shift, pixels, blocks, channels, epsilon,
        ADD=addend is not None, PER_GROUP=per_group, STAGES=STAGES, ROWS=max(1, SUMS // group), GROUP=group,
        num_warps=8,
    )  # fmt: skip
    out = torch.empty_like(x)
    _scale_shift_silu[(triton.cdiv(pixels, rows), batch)](
        x, scale, shift, out, pixels, channels, ROWS=rows, CHANNELS=power, num_warps=8
    )
    return out


@triton.jit(do_not_specialize=["pixels"])
def _residual_sum(x, branch, addend, out, pixels, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    pixel, channel = block * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (channel < channels) & (pixel < pixels)
    at = pixel * channels + channel
    value = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(branch + at, inside, 0.0).to(tl.float32)
    value += tl.load(addend + channel, channel < channels, 0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


def residual_sum(x: Tensor, branch: Tensor, addend: Tensor | None = None) -> Tensor:
    """`ops.residual_sum`."""
    if addend is None:
        return x + branch
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    branch = branch.contiguous(memory_format=torch.channels_last)
    pixels, power = batch * height * width, triton.next_power_of_2(channels)
    rows = max(1, TILE // power)
    out = torch.empty_like(x)
    _residual_sum[(triton.cdiv(pixels, rows),)](
        x, branch, addend, out, pixels, channels, ROWS=rows, CHANNELS=power, num_warps=8
    )
    return out


@triton.jit(do_not_specialize=["pixels", "width"])
def _doubled(x, out, pixels, width, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    pixel, channel = block * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    inside = (channel < channels) & (pixel < pixels)
    value = tl.load(x + pixel * channels + channel, inside, 0.0)
    line = pixel // width
    corner = out + 2 * (pixel + line * width) * channels + channel
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(corner + (2 * down * width + right) * channels, value, inside)


def doubled(x: Tensor) -> Tensor:
    """`ops.doubled`: each pixel is read once."""
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    pixels, power = batch * height * width, triton.next_power_of_2(channels)
    rows = max(1, TILE // power)
    out = x.new_empty(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    _doubled[(triton.cdiv(pixels, rows),)](x, out, pixels, width, channels, ROWS=rows, CHANNELS=power, num_warps=8)
    return out
