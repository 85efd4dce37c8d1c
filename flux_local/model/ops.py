"""What FLUX.1 computes beside matrix products and convolutions, in plain torch: the truth for all other forms.

Tokens lie in rows: first the text of every picture of the batch, then the image of every picture. A stream's rows are
thus one contiguous range at any batch size, and no block joins or splits anything. Knows no weights and no blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
"""Of every normalisation in FLUX.1."""
E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
"""448."""
TINY = 1e-12
"""Stands for the largest of a row of zeros."""


class Layout(NamedTuple):
    """Where whose tokens are: `batch` × `text` rows, then `batch` × `image` rows."""

    batch: int
    text: int
    image: int

    @property
    def text_rows(self) -> int:
        return self.batch * self.text

    @property
    def streams(self) -> tuple[slice, slice]:
        """The rows of text, and those of the images."""
        return slice(0, self.text_rows), slice(self.text_rows, self.rows)

    @property
    def rows(self) -> int:
        return self.batch * (self.text + self.image)


class Vectors(NamedTuple):
    """Which vectors of a modulation table a stream takes: its own places in the table's second dimension.

    The first three for the normalisation that is to come, `gate` for the branch that goes before it.
    """

    shift: int
    scale: int
    gate: int = -1


class Site(NamedTuple):
    """The vectors of both streams at one normalisation."""

    text: Vectors
    image: Vectors


def parts(layout: Layout, site: Site) -> Iterator[tuple[slice, int, Vectors]]:
    """The rows that share their vectors: (rows, picture, vectors)."""
    if layout.batch == 1 and site.text == site.image:
        yield slice(0, layout.rows), 0, site.image
        return
    for b in range(layout.batch):
        yield slice(b * layout.text, (b + 1) * layout.text), b, site.text
    for b in range(layout.batch):
        first = layout.text_rows + b * layout.image
        yield slice(first, first + layout.image), b, site.image


def modulated_norm(x: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift, each row with its own stream's and picture's vectors.

    Args:
        x: [rows, D].
        modulation: [batch, vectors, D].
    """
    normed = torch.empty_like(x)
    for rows, b, at in parts(layout, site):
        weight, bias = 1 + modulation[b, at.scale], modulation[b, at.shift]
        normed[rows] = F.layer_norm(x[rows], x.shape[1:], weight, bias, EPSILON)
    return normed


def add_norm(x: Tensor, branch: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Tensor:
    """Adds gate·branch to the residual stream `x` in place, then returns `modulated_norm` of it.

    Args:
        x, branch: [rows, D].
        modulation: [batch, vectors, D].
    """
    for rows, b, at in parts(layout, site):
        x[rows].addcmul_(branch[rows], modulation[b, at.gate])
    return modulated_norm(x, modulation, layout, site)


def norm_rotate_(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, layout: Layout) -> None:
    """RMSNorm of each head's query and key, then their rotation, in place; values stay as they are.

    Args:
        qkv: [rows, ≥ 3·D], of any row stride; the first 2·D columns are written.
        weights: [streams, 2, head size], for query and key, of text and image or of both at once.
        rotary: [text + image, head size / 2, 2] fp32, cosine and sine of each pair's angle.
    """
    size = weights.shape[2]
    streams = [
        (qkv[: layout.text_rows], weights[0], rotary[: layout.text]),
        (qkv[layout.text_rows :], weights[-1], rotary[layout.text :]),
    ]
    if layout.batch == 1 and len(weights) == 1:
        streams = [(qkv, weights[0], rotary)]
    for rows, weight, table in streams:
        qk = rows[:, : 2 * heads * size].view(layout.batch, len(table), 2, heads, size)
        normed = F.rms_norm(qk.float(), (size,), eps=EPSILON) * weight.float()[:, None]
        pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
        turned = pairs * torch.view_as_complex(table)[:, None, None]
        qk.copy_(torch.view_as_real(turned).flatten(-2))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """GELU(x·Wᵀ + b) by its tanh form, into `out` [rows, outputs] of any row stride."""
    torch.addmm(bias, x, weight.t(), out=out)
    torch.ops.aten.gelu_(out, approximate="tanh")


def linear_gelu_at_once(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """`linear_gelu` as one kernel of cuBLAS, where `out` is contiguous; the product is not rounded before its GELU."""
    torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)


Backend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key and value [B, heads, N, size] → softmax(q·kᵀ/√size)·v of the same shape."""


def attention(
    qkv: Tensor, heads: int, size: int, layout: Layout, backend: Backend = F.scaled_dot_product_attention
) -> Tensor:
    """Attention of each picture over its own text and image together: [rows, ≥ 3·D] → [rows, D]."""
    q, k, v = gathered(qkv[:, : 3 * heads * size], layout).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
    return scattered(backend(q, k, v).transpose(1, 2).flatten(2), layout)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's. Called by its own name, as the other two: a choice by `sdpa_kernel` would hold for other threads too."""
    out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    return out


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-2 as torch brings it."""
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out


def efficient_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xFormers' memory-efficient attention as torch brings it."""
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return out


def gathered(rows: Tensor, layout: Layout) -> Tensor:
    """[rows, N] → [batch, text + image, N]: each picture's tokens together; a view where there is one picture."""
    if layout.batch == 1:
        return rows[None]
    streams = rows.split((layout.text_rows, layout.rows - layout.text_rows))
    return torch.cat([stream.unflatten(0, (layout.batch, -1)) for stream in streams], dim=1)


def scattered(tokens: Tensor, layout: Layout) -> Tensor:
    """The inverse of `gathered`."""
    if layout.batch == 1:
        return tokens[0]
    return torch.cat([stream.flatten(0, 1) for stream in tokens.split((layout.text, layout.image), dim=1)])


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, addend: Tensor | None = None
) -> Tensor:
    """SiLU(GroupNorm(x + addend)) of pictures [B, C, h, w]: what stands before each convolution of the autoencoder.

    Args:
        addend: [C], the bias of the convolution before, where that left it out.
    """
    if addend is not None:
        x = x + addend.to(x.dtype)[:, None, None]
    return F.silu(F.group_norm(x, groups, weight, bias, epsilon))


def residual_sum(x: Tensor, branch: Tensor, addend: Tensor | None = None) -> Tensor:
    """x + branch + addend: pictures [B, C, h, w], and the biases [C] that convolutions before left out."""
    return x + branch if addend is None else x + branch + addend.to(x.dtype)[:, None, None]


def doubled(x: Tensor) -> Tensor:
    """Pictures at twice their height and width, each pixel four times."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Rows(NamedTuple):
    """Rows in fp8: row ≈ values · scale, its largest at 448."""

    values: Tensor
    """[rows, N] e4m3."""
    scale: Tensor
    """[rows, 1] fp32."""


Activation = Tensor | Rows
"""What a matrix product takes: numbers as they are, or already in fp8."""


def part(x: Activation, rows: slice) -> Activation:
    """Some of the rows; their scales begin at a multiple of 16 bytes, as cuBLAS wants them."""
    if not isinstance(x, Rows):
        return x[rows]
    scale = x.scale[rows]
    return Rows(x.values[rows], scale.clone() if scale.storage_offset() % 4 else scale)


def quantised(rows: Tensor) -> Rows:
    """[rows, N] in fp8, each row with a scale of its own."""
    wide = rows.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(TINY) / LARGEST
    return Rows((wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale)


def modulated_norm_quantised(x: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Rows:
    """`modulated_norm`, in fp8."""
    return quantised(modulated_norm(x, modulation, layout, site))


def add_norm_quantised(x: Tensor, branch: Tensor, modulation: Tensor, layout: Layout, site: Site) -> Rows:
    """`add_norm`, in fp8; the residual stream stays as it is."""
    return quantised(add_norm(x, branch, modulation, layout, site))


def gelu_quantised(x: Tensor, beside: Tensor | None = None) -> Rows:
    """[rows, N] → GELU(x) by its tanh form, in fp8; with `beside` [rows, M], which stays as it is, before it."""
    active = F.gelu(x, approximate="tanh")
    return quantised(active if beside is None else torch.cat([beside, active], dim=1))


class Heads(NamedTuple):
    """What attention takes, in fp8: each number ≈ its value here · its scale."""

    query: Tensor
    """[batch, text + image, heads, size] e4m3, normalised and rotated."""
    key: Tensor
    """The same."""
    value: Tensor
    """The same, neither normalised nor rotated."""
    scales: Tensor
    """[2] fp32: of all queries, and of all keys."""
    value_scale: Tensor
    """[batch, heads] fp32."""


def heads_quantised(qkv: Tensor, heads: int, weights: Tensor, rotary: Tensor, scales: Tensor, layout: Layout) -> Heads:
    """`norm_rotate_`, into fp8 instead of in place; each head's values of a picture have a scale of their own.

    Args:
        scales: [2] fp32, of the queries and of the keys.
    """
    size = weights.shape[2]
    wide = qkv[:, : 3 * heads * size].to(torch.float32, copy=True)
    norm_rotate_(wide, heads, weights, rotary, layout)
    query, key, value = gathered(wide, layout).unflatten(-1, (3, heads, size)).unbind(2)
    value_scale = value.abs().amax(dim=(1, 3)).clamp_min(TINY) / LARGEST

    def narrow(x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).clamp(-LARGEST, LARGEST).to(E4M3)

    return Heads(
        narrow(query, scales[0]), narrow(key, scales[1]), narrow(value, value_scale[:, None, :, None]), scales,
        value_scale,
    )  # fmt: skip


def attention_quantised(heads: Heads, layout: Layout, out: Tensor) -> None:
    """`attention` on what fp8 holds, into `out` [rows, D] of any row stride. Probabilities are not rounded here."""
    scales = (heads.scales[0], heads.scales[1], heads.value_scale[:, None, :, None])
    q, k, v = ((x.float() * scale).transpose(1, 2) for x, scale in zip(heads[:3], scales, strict=True))
    scatter_into(out, F.scaled_dot_product_attention(q, k, v).transpose(1, 2), layout)


def scatter_into(out: Tensor, tokens: Tensor, layout: Layout, scale: Tensor | None = None) -> None:
    """[batch, text + image, heads, size] in any precision, each head times its `scale` [batch, heads] if there is one,
    into rows `out` [rows, D]."""
    first = 0
    for stream in tokens.split((layout.text, layout.image), dim=1):
        batch, count, *head = stream.shape
        rows = out[first : first + batch * count].unflatten(0, (batch, count)).unflatten(-1, head)
        if scale is None:
            rows.copy_(stream)
        else:
            torch.mul(stream.to(out.dtype), scale[:, None, :, None], out=rows)
        first += batch * count


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation. Those of this module unless another is put in place."""

    modulated_norm: Callable[[Tensor, Tensor, Layout, Site], Tensor] = modulated_norm
    add_norm: Callable[[Tensor, Tensor, Tensor, Layout, Site], Tensor] = add_norm
    norm_rotate_: Callable[[Tensor, int, Tensor, Tensor, Layout], None] = norm_rotate_
    linear_gelu: Callable[[Tensor, Tensor, Tensor, Tensor], None] = linear_gelu
    attention: Callable[[Tensor, int, int, Layout], Tensor] = attention
    scatter_into: Callable[[Tensor, Tensor, Layout, Tensor | None], None] = scatter_into
    heads_quantised: Callable[[Tensor, int, Tensor, Tensor, Tensor, Layout], Heads] = heads_quantised
    attention_quantised: Callable[[Heads, Layout, Tensor], None] = attention_quantised
    group_norm_silu: Callable[[Tensor, int, Tensor, Tensor, float, Tensor | None], Tensor] = group_norm_silu
    residual_sum: Callable[[Tensor, Tensor, Tensor | None], Tensor] = residual_sum
    doubled: Callable[[Tensor], Tensor] = doubled
    quantised: Callable[[Tensor], Rows] = quantised
    modulated_norm_quantised: Callable[[Tensor, Tensor, Layout, Site], Rows] = modulated_norm_quantised
    add_norm_quantised: Callable[[Tensor, Tensor, Tensor, Layout, Site], Rows] = add_norm_quantised
    gelu_quantised: Callable[[Tensor, Tensor | None], Rows] = gelu_quantised
    attention_by: str = "torch"
    """Whose kernel `attention` is,"""
    attention_quantised_by: str = "emulated"
    """and whose `attention_quantised` is."""
