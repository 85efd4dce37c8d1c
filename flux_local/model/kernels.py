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

from flux_local.model import ops
from flux_local.model.ops import E4M3, EPSILON, LARGEST, TINY, Heads, Layout, Rows, Site
from flux_local.model.vae_kernels import doubled, group_norm_silu, residual_sum

HEADS = 8
"""That one program norms and turns."""
TOKENS = 16
"""Among whose values one program finds the largest."""
BY_HAND = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Python runs the kernels, which has neither a card's instructions nor its conversions."""


SIGMOID = tl.constexpr("{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }")
"""1/(1 + 2ˣ), as near as a card's own instructions come."""


@triton.jit
def _gelu_of(value):
    # x·(1 + tanh u)/2 = x·sigmoid(2u) = x/(1 + 2ᵗ), u = √(2/π)·(x + 0.044715·x³), t = −2u·log₂e
    power = value * (-2.302208198144325 - 0.1029432395800225 * (value * value))
    if BY_HAND:
        return value / (1.0 + tl.exp2(power))
    return value * tl.inline_asm_elementwise(SIGMOID, "=f,f", [power], tl.float32, True, 1)


@triton.jit
def _to_e4m3(value, largest):
    """fp32 → e4m3, ties to even, and no further than the largest: what a card's own conversion does.

    Below 2⁻⁶ the numbers of e4m3 lie 2⁻⁹ apart, which is what fp32 keeps next to 24576; above, three bits follow the
    leading one.
    """
    if BY_HAND:
        missing = value != value
        value = tl.minimum(tl.maximum(value, -largest), largest)
        near_zero = (value + 24576.0) - 24576.0
        bits = value.to(tl.int32, bitcast=True)
        elsewhere = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(value) < 0.015625, near_zero, elsewhere)
        value = tl.where(missing, float("nan"), rounded)
    return value.to(tl.float8e4nv)


# Where a block's vectors lie in the table: without this, one compilation for each pattern of ones and sixteens.
SITES = ["text_shift", "text_scale", "text_gate", "image_shift", "image_scale", "image_gate"]
# How many tokens there are of what: without this, what is compiled at the start serves canvases whose numbers divide by
# sixteen, and the others compile within a request.
COUNTS = ["text_rows", "text", "image"]


@triton.jit
def _to_fp8(row, largest, tiny):
    """A row's scale, and its numbers over that in e4m3.

    With a NaN the scale is infinite, so that no product of the row is finite: a maximum would pass over it.
    """
    absolute = tl.where(row == row, tl.abs(row), float("inf"))
    top = tl.maximum(tl.max(absolute, 0), tiny)
    return top / largest, _to_e4m3(row * (largest / top), largest)


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
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + epsilon)
    scale = tl.load(vectors + tl.where(of_image, image_scale, text_scale) * width + columns, inside, 0.0)
    shift = tl.load(vectors + tl.where(of_image, image_shift, text_shift) * width + columns, inside, 0.0)
    normed = centred * inverse * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    if FP8:
        row_scale, narrow = _to_fp8(tl.where(inside, normed, 0.0), largest, tiny)
        tl.store(scales + row, row_scale)
        tl.store(out + row * width + columns, narrow, inside)
    else:
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
        ADD=branch is not None, FP8=fp8, BLOCK=triton.next_power_of_2(width), num_warps=4 if fp8 else 8,
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
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    inside = (head < heads) & (column < size)
    at = qkv + row * row_stride + which * heads * size + head * size + column
    value = tl.load(at, inside, 0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 1) / size + epsilon)
    of_stream = weights + tl.where(of_image, stream_stride, 0) + tl.minimum(which, 1) * size
    weight = tl.load(of_stream + column, column < size, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value * inverse[:, None] * weight, (HEADS, SIZE // 2, 2)))
    angle = tl.load(rotary + position * size + column, column < size, 0.0)
    cosine, sine = tl.split(tl.reshape(angle, (1, SIZE // 2, 2)))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (HEADS, SIZE))
    if FP8:
        picture = tl.where(of_image, (row - text_rows) // image, row // text)
        of_head = tl.load(value_scale + picture * heads + head, head < heads, 1.0)
        scale = tl.where(which < 2, tl.load(scales + tl.minimum(which, 1)), of_head)
        narrow = _to_e4m3(tl.where(which < 2, turned, value) * (1.0 / scale), largest)
        batch = text_rows // text
        token = (which * batch + picture) * (text + image) + position
        tl.store(out + (token * heads + head) * size + column, narrow, inside)
    else:
        tl.store(at, turned.to(qkv.dtype.element_ty), inside)


def norm_rotate_(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, layout: Layout) -> None:
    """`ops.norm_rotate_`: a program for some queries of a row, another for their keys."""
    launch_norm_rotate(qkv, heads, weights, rotary, layout)


def launch_norm_rotate(
    qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, layout: Layout,
    scales: tuple[Tensor, Tensor] | None = None, out: Tensor | None = None,
) -> None:  # fmt: skip
    streams, _, size = weights.shape
    assert qkv.stride(1) == 1
    assert rotary.is_contiguous()
    assert weights.is_contiguous()
    group = min(HEADS, triton.next_power_of_2(heads))
    _norm_rotate[(len(qkv), 2 if out is None else 3, triton.cdiv(heads, group))](
        qkv, weights, rotary, *(scales or (rotary, rotary)), qkv if out is None else out, qkv.stride(0),
        weights.stride(0) if streams > 1 else 0, heads, size, layout.text_rows, layout.text, layout.image, EPSILON,
        LARGEST, FP8=out is not None, HEADS=group, SIZE=triton.next_power_of_2(size),
        num_warps=2 if out is None else 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _value_scales(
    qkv, scales, row_stride, heads, size, text_rows, text, image, largest,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block, picture = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * HEADS
    head = first + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    found = tl.zeros((HEADS, SIZE), tl.float32)
    for i in tl.static_range(TOKENS):
        token = block * TOKENS + i
        row = tl.where(token < text, picture * text + token, text_rows + picture * image + token - text).to(tl.int64)
        inside = (head < tl.where(token < text + image, heads, 0)) & (column < size)
        value = tl.load(qkv + row * row_stride + (2 * heads + head) * size + column, inside, 0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(value))
    head = first + tl.arange(0, HEADS)
    # The largest is the same in whatever order they come.
    tl.atomic_max(scales + picture * heads + head, tl.max(found, 1) / largest, head < heads, sem="relaxed")


def heads_quantised(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, scales: Tensor, layout: Layout) -> Heads:
    """`ops.heads_quantised`: once over the values for their scales, then once over all."""
    size, tokens = weights.shape[2], layout.text + layout.image
    value_scale = torch.full((layout.batch, heads), TINY / LARGEST, dtype=torch.float32, device=qkv.device)
    group = min(HEADS, triton.next_power_of_2(heads))
    _value_scales[(triton.cdiv(tokens, TOKENS), layout.batch, triton.cdiv(heads, group))](
        qkv, value_scale, qkv.stride(0), heads, size, layout.text_rows, layout.text, layout.image, LARGEST,
        TOKENS=TOKENS, HEADS=group, SIZE=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip
    out = torch.empty(3, layout.batch, tokens, heads, size, dtype=E4M3, device=qkv.device)
    launch_norm_rotate(qkv, heads, weights, rotary, layout, (scales, value_scale), out)
    return Heads(out[0], out[1], out[2], scales, value_scale)


@triton.jit(do_not_specialize=COUNTS)
def _scatter(tokens, scales, out, heads, size, row_stride, text_rows, text, image, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    of_image = row >= text_rows
    picture = tl.where(of_image, (row - text_rows) // image, row // text)
    position = tl.where(of_image, text + (row - text_rows) % image, row % text)
    column = tl.arange(0, BLOCK)
    inside = column < heads * size
    token = picture * (text + image) + position
    value = tl.load(tokens + token * heads * size + column, inside, 0.0).to(tl.float32)
    scale = tl.load(scales + picture * heads + column // size, inside, 0.0)
    tl.store(out + row * row_stride + column, (value * scale).to(out.dtype.element_ty), inside)


def scatter_into(out: Tensor, tokens: Tensor, layout: Layout, scale: Tensor | None) -> None:
    """`ops.scatter_into`, where there are scales, of contiguous tokens."""
    if scale is None:
        ops.scatter_into(out, tokens, layout)
        return
    heads, size = tokens.shape[2:]
    assert tokens.is_contiguous()
    assert out.stride(1) == 1
    _scatter[(len(out),)](
        tokens, scale, out, heads, size, out.stride(0), layout.text_rows, layout.text, layout.image,
        BLOCK=triton.next_power_of_2(heads * size), num_warps=8,
    )  # fmt: skip


@triton.jit
def _quantise(
    beside, x, values, scales, first, width, beside_stride, row_stride, largest, tiny,
    FIRST: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = (columns >= first) & (columns < first + width)
    value = tl.load(x + row * row_stride + columns - first, inside, 0.0).to(tl.float32)
    if GELU:
        value = _gelu_of(value)
    if FIRST:
        other = tl.load(beside + row * beside_stride + columns, columns < first, 0.0).to(tl.float32)
        value = tl.where(columns < first, other, value)
    scale, narrow = _to_fp8(value, largest, tiny)
    tl.store(scales + row, scale)
    tl.store(values + row * (first + width) + columns, narrow, columns < first + width)


def launch_quantise(x: Tensor, gelu: bool, beside: Tensor | None = None) -> Rows:
    count, width = x.shape
    first = 0 if beside is None else beside.shape[1]
    assert x.stride(1) == 1
    assert beside is None or beside.stride(1) == 1
    values = torch.empty(count, first + width, dtype=E4M3, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(first + width)
    _quantise[(count,)](
        x if beside is None else beside, x, values, scales, first, width, 0 if beside is None else beside.stride(0),
        x.stride(0), LARGEST, TINY, FIRST=beside is not None, GELU=gelu, BLOCK=block,
        num_warps=16 if block > 4096 else 8,
    )  # fmt: skip
    return Rows(values, scales)


def quantised(rows: Tensor) -> Rows:
    """`ops.quantised`, of rows of any stride: read once."""
    return launch_quantise(rows, False)


def gelu_quantised(x: Tensor, beside: Tensor | None = None) -> Rows:
    """`ops.gelu_quantised`: both are read once, and left as they are."""
    return launch_quantise(x, True, beside)


KERNELS: dict[str, Any] = {
    "modulated_norm": modulated_norm,
    "add_norm": add_norm,
    "norm_rotate_": norm_rotate_,
    "scatter_into": scatter_into,
    "heads_quantised": heads_quantised,
    "group_norm_silu": group_norm_silu,
    "residual_sum": residual_sum,
    "doubled": doubled,
    "quantised": quantised,
    "modulated_norm_quantised": modulated_norm_quantised,
    "add_norm_quantised": add_norm_quantised,
    "gelu_quantised": gelu_quantised,
}
