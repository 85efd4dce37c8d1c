"""The operations of `ops` as Triton kernels, for a GPU. Each says the same as its torch form, in one pass over memory.

Launch shapes are fixed by the sizes alone: nothing is tuned at run time, so that a server starts at once and the same
request gives the same bits. Sums are kept in fp32. Whether a kernel is used is decided in `selfcheck`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_local.model.ops import E4M3, EPSILON, LARGEST, TINY, Heads, Layout, Rows, Site

GELU_BLOCK = 1024
PIXELS = 256
"""Pixels whose sums one program of the group norm takes,"""
TILE = 4096
"""as so many numbers at a time."""
TOKENS = 16
"""Whose largest values one program takes."""


@triton.jit
def _gelu_of(value):
    # x·(1 + tanh u)/2 = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³)
    return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))


@triton.jit
def _rounded(value, largest):
    """Numbers as e4m3 has them, but still fp32.

    By hand, ties to even, so that the cast after it is exact whoever does it. Below 2⁻⁶ the numbers of e4m3 lie 2⁻⁹
    apart, which is what fp32 keeps next to 24576; above, three bits follow the leading one.
    """
    missing = value != value  # NaN, which a card's minimum and maximum pass over
    value = tl.minimum(tl.maximum(value, -largest), largest)
    near_zero = (value + 24576.0) - 24576.0
    bits = value.to(tl.int32, bitcast=True)
    elsewhere = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    rounded = tl.where(tl.abs(value) < 0.015625, near_zero, elsewhere)
    return tl.where(missing, float("nan"), rounded)


# Where a block's vectors lie in the table: without this, one compilation for each pattern of ones and sixteens.
SITES = ["text_shift", "text_scale", "text_gate", "image_shift", "image_scale", "image_gate"]
# How many tokens there are of what: without this, what is compiled at the start serves canvases whose numbers divide by
# sixteen, and the others compile within a request.
COUNTS = ["text_rows", "text", "image"]


@triton.jit
def _to_fp8(row, largest, tiny):
    """A row's scale, and its numbers over that, rounded to e4m3 but still fp32.

    With a NaN the scale is infinite, so that no product of the row is finite: a maximum would pass over it.
    """
    absolute = tl.where(row == row, tl.abs(row), float("inf"))
    scale = tl.maximum(tl.max(absolute, 0), tiny) / largest
    return scale, _rounded(row / scale, largest)


@triton.jit(do_not_specialize=SITES + COUNTS)
def _add_norm(
    x, branch, modulation, out, scales, width, picture_stride, text_rows, text, image,
    text_shift, text_scale, text_gate, image_shift, image_scale, image_gate,
    epsilon, largest, tiny, ADD: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_image = row >= text_rows
    picture = tl.where(of_image, (row - text_rows) // image, row // text)
    vectors = modulation + picture * picture_stride
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * width + columns, inside, 0.0).to(tl.float32)
    if ADD:
        gate = tl.load(vectors + tl.where(of_image, image_gate, text_gate) * width + columns, inside, 0.0)
        added = tl.load(branch + row * width + columns, inside, 0.0)
        value += gate.to(tl.float32) * added.to(tl.float32)
        rounded = value.to(x.dtype.element_ty)
        tl.store(x + row * width + columns, rounded, inside)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 0) / width
    centred = tl.where(inside, value - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / width + epsilon)
    scale = tl.load(vectors + tl.where(of_image, image_scale, text_scale) * width + columns, inside, 0.0)
    shift = tl.load(vectors + tl.where(of_image, image_shift, text_shift) * width + columns, inside, 0.0)
    normed = centred / deviation * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    if FP8:
        row_scale, normed = _to_fp8(tl.where(inside, normed, 0.0), largest, tiny)
        tl.store(scales + row, row_scale)
    tl.store(out + row * width + columns, normed.to(out.dtype.element_ty), inside)


def launch_add_norm(
    x: Tensor, branch: Tensor | None, modulation: Tensor, layout: Layout, site: Site, fp8: bool
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    assert x.is_contiguous()
    assert modulation.stride()[1:] == (width, 1)
    assert branch is None or branch.is_contiguous()
    out = torch.empty_like(x, dtype=E4M3 if fp8 else x.dtype)
    scales = torch.empty(rows if fp8 else 0, 1, dtype=torch.float32, device=x.device)
    _add_norm[(rows,)](
        x, x if branch is None else branch, modulation, out, scales if fp8 else x, width, modulation.stride(0),
        layout.text_rows, layout.text, layout.image, *site.text, *site.image, EPSILON, LARGEST, TINY,
        ADD=branch is not None, FP8=fp8, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return out, scales


def modulated_norm(x: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Tensor:
    """`ops.modulated_norm`."""
    return launch_add_norm(x, None, modulation, layout, site, False)[0]


def add_norm(x: Tensor, branch: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Tensor:
    """`ops.add_norm`: the residual stream is read and written once."""
    return launch_add_norm(x, branch, modulation, layout, site, False)[0]


def modulated_norm_quantised(x: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Rows:
    """`ops.modulated_norm_quantised`."""
    return Rows(*launch_add_norm(x, None, modulation, layout, site, True))


def add_norm_quantised(x: Tensor, branch: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Rows:
    """`ops.add_norm_quantised`."""
    return Rows(*launch_add_norm(x, branch, modulation, layout, site, True))


@triton.jit(do_not_specialize=COUNTS)
def _norm_rotate(
    qkv, weights, rotary, scales, value_scale, out, row_stride, stream_stride, heads, size, text_rows, text, image,
    epsilon, largest, FP8: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    of_image = row >= text_rows
    position = tl.where(of_image, text + (row - text_rows) % image, row % text)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (column < size)
    at = qkv + row * row_stride + which * heads * size + head * size + column
    value = tl.load(at, inside, 0.0).to(tl.float32)
    root = tl.sqrt(tl.sum(value * value, 1) / size + epsilon)
    of_stream = weights + tl.where(of_image, stream_stride, 0) + tl.minimum(which, 1) * size
    weight = tl.load(of_stream + column, column < size, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value / root[:, None] * weight, (HEADS, SIZE // 2, 2)))
    angle = tl.load(rotary + position * size + column, column < size, 0.0)
    cosine, sine = tl.split(tl.reshape(angle, (1, SIZE // 2, 2)))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (HEADS, SIZE))
    if FP8:
        picture = tl.where(of_image, (row - text_rows) // image, row // text)
        of_head = tl.load(value_scale + picture * heads + head, head < heads, 1.0)
        scale = tl.where(which < 2, tl.load(scales + tl.minimum(which, 1)), of_head)
        narrow = _rounded(tl.where(which < 2, turned, value) / scale, largest)
        batch = text_rows // text
        token = (which * batch + picture) * (text + image) + position
        tl.store(out + (token * heads + head) * size + column, narrow.to(out.dtype.element_ty), inside)
    else:
        tl.store(at, turned.to(qkv.dtype.element_ty), inside)


def norm_rotate_(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, layout: Layout) -> None:
    """`ops.norm_rotate_`: a program for the queries of a row, another for its keys."""
    launch_norm_rotate(qkv, heads, weights, rotary, layout)


def launch_norm_rotate(
    qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, layout: Layout,
    scales: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    streams, _, size = weights.shape
    assert qkv.stride(1) == 1
    assert rotary.is_contiguous()
    assert weights.is_contiguous()
    _norm_rotate[(len(qkv), 2 if out is None else 3)](
        qkv, weights, rotary, *(scales or (rotary, rotary)), qkv if out is None else out, qkv.stride(0),
        weights.stride(0) if streams > 1 else 0, heads, size, layout.text_rows, layout.text, layout.image, EPSILON,
        LARGEST, FP8=out is not None, HEADS=triton.next_power_of_2(heads), SIZE=triton.next_power_of_2(size),
        num_warps=4 if out is None else 8,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _largest_values(
    qkv, found, row_stride, heads, size, text_rows, text, image,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, picture = tl.program_id(0), tl.program_id(1)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    largest = tl.zeros((HEADS,), tl.float32)
    for i in range(TOKENS):
        token = block * TOKENS + i
        row = tl.where(token < text, picture * text + token, text_rows + picture * image + token - text).to(tl.int64)
        inside = (head < tl.where(token < text + image, heads, 0)) & (column < size)
        value = tl.load(qkv + row * row_stride + (2 * heads + head) * size + column, inside, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(value), 1))
    head = tl.arange(0, HEADS)
    tl.store(found + (picture * tl.num_programs(0) + block) * heads + head, largest, head < heads)


def heads_quantised(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, scales: Tensor, layout: Layout) -> Heads:
    """`ops.heads_quantised`: once over the values for their scales, then once over all."""
    size, tokens = weights.shape[2], layout.text + layout.image
    blocks = triton.cdiv(tokens, TOKENS)
    found = torch.empty(layout.batch, blocks, heads, dtype=torch.float32, device=qkv.device)
    _largest_values[(blocks, layout.batch)](
        qkv, found, qkv.stride(0), heads, size, layout.text_rows, layout.text, layout.image, TOKENS=TOKENS,
        HEADS=triton.next_power_of_2(heads), SIZE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    value_scale = found.amax(1).clamp_min_(TINY).div_(LARGEST)
    out = torch.empty(3, layout.batch, tokens, heads, size, dtype=E4M3, device=qkv.device)
    launch_norm_rotate(qkv, heads, weights, rotary, layout, (scales, value_scale), out)
    return Heads(out[0], out[1], out[2], scales, value_scale)


@triton.jit
def _gelu(x, width, row_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = x + row * row_stride + column
    value = tl.load(at, column < width, 0.0).to(tl.float32)
    tl.store(at, _gelu_of(value).to(x.dtype.element_ty), column < width)


def gelu_(x: Tensor) -> None:
    """`ops.gelu_`."""
    rows, width = x.shape
    assert x.stride(1) == 1
    _gelu[(rows, triton.cdiv(width, GELU_BLOCK))](x, width, x.stride(0), BLOCK=GELU_BLOCK, num_warps=4)


@triton.jit(do_not_specialize=["pixels"])
def _channel_sums(x, sums, pixels, channels, PIXELS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    block, picture = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, channel = tl.arange(0, ROWS)[:, None], tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    squares = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(0, PIXELS, ROWS):
        pixel = block * PIXELS + first + row
        at = x + (picture * pixels + pixel) * channels + channel
        value = tl.load(at, (channel < channels) & (pixel < pixels), 0.0).to(tl.float32)
        total += value
        squares += value * value
    channel = tl.arange(0, CHANNELS)
    out = sums + (picture * tl.num_programs(0) + block) * 2 * channels + channel
    tl.store(out, tl.sum(total, 0), channel < channels)
    tl.store(out + channels, tl.sum(squares, 0), channel < channels)


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


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`ops.group_norm_silu` on channels-last pictures: once over them for the sums, once to turn them.

    The few sums are put together in fp64, in an order that depends on the shape alone.
    """
    batch, channels, height, width = x.shape
    x = x.contiguous(memory_format=torch.channels_last)
    pixels, block = height * width, triton.next_power_of_2(channels)
    rows = max(1, TILE // block)
    sums = torch.empty(batch, triton.cdiv(pixels, PIXELS), 2, channels, dtype=torch.float32, device=x.device)
    _channel_sums[(sums.shape[1], batch)](
        x, sums, pixels, channels, PIXELS=PIXELS, ROWS=min(rows, PIXELS), CHANNELS=block, num_warps=8
    )
    per_group = channels // groups
    of_groups = sums.sum(1, dtype=torch.float64).view(batch, 2, groups, per_group).sum(-1) / (pixels * per_group)
    mean, square = of_groups.repeat_interleave(per_group, dim=2).unbind(1)
    root = torch.rsqrt(square - mean * mean + epsilon) * weight
    scale, shift = root.float(), (bias - mean * root).float()
    out = torch.empty_like(x)
    _scale_shift_silu[(triton.cdiv(pixels, rows), batch)](
        x, scale, shift, out, pixels, channels, ROWS=rows, CHANNELS=block, num_warps=8
    )
    return out


@triton.jit
def _gelu_quantise(x, values, scales, width, first, row_stride, largest, tiny, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    value = tl.load(x + row * row_stride + columns, inside, 0.0).to(tl.float32)
    if GELU:
        value = tl.where(columns < first, value, _gelu_of(value))
    scale, rounded = _to_fp8(value, largest, tiny)
    tl.store(scales + row, scale)
    tl.store(values + row * width + columns, rounded.to(values.dtype.element_ty), inside)


def launch_quantise(rows: Tensor, first: int | None) -> Rows:
    count, width = rows.shape
    assert rows.stride(1) == 1
    values = torch.empty(count, width, dtype=E4M3, device=rows.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=rows.device)
    block = triton.next_power_of_2(width)
    _gelu_quantise[(count,)](
        rows, values, scales, width, first or 0, rows.stride(0), LARGEST, TINY, GELU=first is not None, BLOCK=block,
        num_warps=16 if block > 4096 else 8,
    )  # fmt: skip
    return Rows(values, scales)


def quantised(rows: Tensor) -> Rows:
    """`ops.quantised`, of rows of any stride: read once."""
    return launch_quantise(rows, None)


def gelu_quantised(x: Tensor, first: int) -> Rows:
    """`ops.gelu_quantised`: read once, and left as it is."""
    return launch_quantise(x, first)


KERNELS: dict[str, Any] = {
    "modulated_norm": modulated_norm,
    "add_norm": add_norm,
    "norm_rotate_": norm_rotate_,
    "heads_quantised": heads_quantised,
    "gelu_": gelu_,
    "group_norm_silu": group_norm_silu,
    "quantised": quantised,
    "modulated_norm_quantised": modulated_norm_quantised,
    "add_norm_quantised": add_norm_quantised,
    "gelu_quantised": gelu_quantised,
}
