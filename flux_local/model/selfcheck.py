"""Which form of each operation a device gets: its kernel if that says the same as the torch form, else the torch form.

Every kernel is run once on random data of the sizes that it will see. One that does not compile, fails, or is further
from the torch form than rounding explains is left out, with a warning: a card may be slower, never wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flux_local.model import flash3
from flux_local.model.fp8_attention import LIBRARIES, scales
from flux_local.model.ops import (
    E4M3,
    Backend,
    Heads,
    Layout,
    Ops,
    Rows,
    Site,
    Vectors,
    cudnn_attention,
    efficient_attention,
    flash_attention,
    heads_quantised,
    linear_gelu_at_once,
)
from flux_local.model.ops import attention as attention_by

log = logging.getLogger("flux_local.selfcheck")

ATTENTIONS: dict[str, Backend] = {
    "cudnn": cudnn_attention,
    "flash": flash_attention,
    "efficient": efficient_attention,
}
"""Those of torch, the fastest first (on Hopper at head size 128: FlashAttention-3, arXiv 2407.08608, figure 5)."""
CUDNN_TO_MEND = 91500
"""The last cuDNN, 9.15.0, whose attention errs inside a graph where a number of tokens is no multiple of 128 (pytorch
issue 169849)."""
TRIAL = Layout(1, 512, 1029)
"""FLUX.1's text, and a picture whose tokens divide by nothing, as those of most canvases do not."""
SITE = Site(Vectors(0, 1, 2), Vectors(3, 4, 5))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Largest ‖kernel − truth‖ / ‖truth‖: rounding of the results, twice over."""
FP8_TOLERANCE = 2e-2
"""Where the result is in fp8 and what goes before it was rounded: numbers near the middle fall to either side."""
PROBABILITY_TOLERANCE = 5e-2
"""Of fp8 attention: libraries round probabilities to e4m3, by up to 1/16 each."""


@dataclass(frozen=True)
class Sizes:
    """Of the data that kernels are checked on."""

    heads: int
    head_size: int
    layout: Layout
    channels: int = 128
    groups: int = 32
    side: int = 64


@dataclass(frozen=True)
class Data:
    """Where a trial's numbers come from: rounded to one precision, given in another, so that a truth can be had."""

    device: str
    rounded: torch.dtype
    given: torch.dtype

    def random(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(self.rounded).to(self.given)


@dataclass(frozen=True)
class Finding:
    """What became of one kernel. `error` is relative to the truth; None if it did not run."""

    name: str
    good: bool
    error: float | None
    reason: str = ""


def choose(kernels: Mapping[str, Any], sizes: Sizes, device: str, dtype: torch.dtype) -> tuple[Ops, list[Finding]]:
    """The operations for a device, and what was found of each kernel."""
    findings = [check(name, kernel, sizes, device, dtype) for name, kernel in kernels.items()]
    for finding in findings:
        if not finding.good:
            log.warning("kernel %s is not used: %s", finding.name, finding.reason)
    return replace(Ops(), **{f.name: kernels[f.name] for f in findings if f.good}), findings


def accelerated(sizes: Sizes, device: str, dtype: torch.dtype) -> tuple[Ops, list[Finding]]:
    """The fastest operations that a GPU does rightly: Triton's kernels and the first of `attentions`."""
    kernels: dict[str, Any] = {"linear_gelu": linear_gelu_at_once}
    try:
        from flux_local.model.kernels import KERNELS
    except ImportError as error:
        log.warning("Triton cannot be imported (%s); plain torch is used", error)
        ops, findings = choose(kernels, sizes, device, dtype)
        findings.append(Finding("triton", False, None, str(error)))
    else:
        ops, findings = choose(kernels | KERNELS, sizes, device, dtype)
    for name, backend in attentions(device).items():
        if name == "cudnn" and (torch.backends.cudnn.version() or 0) <= CUDNN_TO_MEND:
            reason = "cuDNN before 9.15.1 errs at lengths that are no multiple of 128; update it"
            findings.append(Finding("attention cudnn", False, None, reason))
            continue
        attention = partial(attention_by, backend=backend)
        finding = replace(check("attention", attention, sizes, device, dtype), name=f"attention {name}")
        findings.append(finding)
        if finding.good:
            return replace(ops, attention=attention, attention_by=name), findings
    log.warning("no attention backend could be forced; torch's own choice is used")
    return ops, findings


def attentions(device: str) -> dict[str, Backend]:
    """What may be tried on a device, the fastest first."""
    found: dict[str, Backend] = {}
    if flash3.suits(device):
        try:
            found["flash-3"] = flash3.attention()
        except ImportError as error:
            log.info("no FlashAttention-3 (%s)", error)
    return found | ATTENTIONS


def with_fp8_attention(ops: Ops, sizes: Sizes, device: str, dtype: torch.dtype) -> tuple[Ops, list[Finding]]:
    """The first of `LIBRARIES` that is there and does fp8 attention rightly, beside the given operations.

    The operations come back as they are where there is none; the findings say why.
    """
    findings = []
    for name, find in LIBRARIES.items():
        try:
            attention = find(ops.scatter_into)
        except ImportError as error:
            findings.append(Finding(f"fp8 attention {name}", False, None, f"not installed ({error})"))
            continue
        except Exception as error:  # whatever a library does that finds its own parts missing
            reason = f"{type(error).__name__}: {error}"[:200]
            findings.append(Finding(f"fp8 attention {name}", False, None, reason))
            continue
        finding = replace(check("attention_quantised", attention, sizes, device, dtype), name=f"fp8 attention {name}")
        findings.append(finding)
        if finding.good:
            return replace(ops, attention_quantised=attention, attention_quantised_by=name), findings
    return ops, findings


def check(name: str, kernel: Any, sizes: Sizes, device: str, dtype: torch.dtype) -> Finding:
    """Runs a kernel, and its torch form on the same data in fp32."""
    run = TRIALS[name]
    try:
        expected = run(getattr(Ops(), name), sizes, Data(device, dtype, torch.float32))
        found = run(kernel, sizes, Data(device, dtype, dtype))
    except Exception as error:  # whatever a compiler or a driver raises
        return Finding(name, False, None, f"{type(error).__name__}: {error}"[:200])
    distance = float((found.double() - expected.double()).norm() / expected.double().norm())
    limit = TOLERANCE[dtype]
    if name == "attention_quantised":
        limit = PROBABILITY_TOLERANCE
    elif name.endswith("quantised") and dtype != torch.float32:
        limit = FP8_TOLERANCE
    if not distance <= limit:
        return Finding(name, False, distance, f"off by {distance:.2e}, more than {limit:.0e}")
    return Finding(name, True, distance)


def widened(rows: Rows, data: Data) -> Tensor:
    """What fp8 rows stand for, beside their scales."""
    return torch.cat([rows.scale, rows.values.float() * rows.scale], dim=1).to(data.given)


def try_norm_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    return try_norm(lambda *given: widened(op(*given), data), sizes, data)


def try_add_norm_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """The rows and, narrowed to as many columns, the residual stream."""
    width = sizes.heads * sizes.head_size
    x = data.random(0, sizes.layout.rows, width)
    branch = data.random(1, sizes.layout.rows, width)
    table = data.random(2, sizes.layout.batch, 6, width)
    rows = widened(op(x, branch, table, sizes.layout, SITE), data)
    return torch.cat([rows, x], dim=1)


def try_gelu_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    width = sizes.heads * sizes.head_size
    buffer = data.random(0, sizes.layout.rows, 7 * width)
    both = widened(op(buffer[:, 3 * width :], buffer[:, :width]), data)
    return torch.cat([both, widened(op(buffer[:, 3 * width :], None), data)], dim=1)


def try_norm(op: Any, sizes: Sizes, data: Data) -> Tensor:
    width = sizes.heads * sizes.head_size
    x = data.random(0, sizes.layout.rows, width)
    table = data.random(1, sizes.layout.batch, 6, width)
    found: Tensor = op(x, table, sizes.layout, SITE)
    return found


def try_add_norm(op: Any, sizes: Sizes, data: Data) -> Tensor:
    width = sizes.heads * sizes.head_size
    x = data.random(0, sizes.layout.rows, width)
    branch = data.random(1, sizes.layout.rows, width)
    table = data.random(2, sizes.layout.batch, 6, width)
    return torch.cat([op(x, branch, table, sizes.layout, SITE), x])


def try_norm_rotate(op: Any, sizes: Sizes, data: Data) -> Tensor:
    tokens = sizes.layout.text + sizes.layout.image
    qkv = data.random(0, sizes.layout.rows, 7 * sizes.heads * sizes.head_size)
    angle = Data(data.device, torch.float32, torch.float32).random(1, tokens, sizes.head_size // 2)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)
    op(qkv, sizes.heads, data.random(2, 2, 2, sizes.head_size), rotary, sizes.layout)
    return qkv


def try_linear_gelu(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Into some of a buffer's rows, by some of a layer's outputs."""
    width = sizes.heads * sizes.head_size
    x, weight = data.random(0, sizes.layout.rows, width), data.random(1, 7 * width, width) * width**-0.5
    out = torch.zeros(sizes.layout.rows, 4 * width, dtype=data.given, device=data.device)
    bias = data.random(2, 7 * width)
    op(x[1:], weight[3 * width :], bias[3 * width :], out[1:])
    return out


def try_attention(op: Any, sizes: Sizes, data: Data) -> Tensor:
    qkv = data.random(0, sizes.layout.rows, 7 * sizes.heads * sizes.head_size)
    found: Tensor = op(qkv, sizes.heads, sizes.head_size, sizes.layout)
    return found


def try_scatter(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Into a strided part of a buffer, in fp8 as cuDNN gives it."""
    layout, width = sizes.layout, sizes.heads * sizes.head_size
    tokens = data.random(0, layout.batch, layout.text + layout.image, sizes.heads, sizes.head_size).to(E4M3)
    scale = Data(data.device, torch.float32, torch.float32).random(1, layout.batch, sizes.heads)
    buffer = torch.zeros(layout.rows, 2 * width, dtype=data.given, device=data.device)
    op(buffer[:, width:], tokens, layout, scale)
    return buffer


def some_heads(op: Any, sizes: Sizes, data: Data) -> Heads:
    """Heads in fp8 of random queries, keys and values, by a form of `heads_quantised`."""
    tokens = sizes.layout.text + sizes.layout.image
    qkv = data.random(0, sizes.layout.rows, 7 * sizes.heads * sizes.head_size)
    angle = Data(data.device, torch.float32, torch.float32).random(1, tokens, sizes.head_size // 2)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)
    weights = data.random(2, 2, 2, sizes.head_size)
    heads: Heads = op(qkv, sizes.heads, weights, rotary, scales(weights), sizes.layout)
    return heads


def try_heads_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    heads = some_heads(op, sizes, data)
    by = (heads.scales[0], heads.scales[1], heads.value_scale[:, None, :, None])
    widened = [(x.float() * scale).flatten() for x, scale in zip(heads[:3], by, strict=True)]
    return torch.cat([*widened, heads.scales, heads.value_scale.flatten()]).to(data.given)


def try_attention_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Into a strided part of a buffer; the heads are the same whatever precision is asked for."""
    heads = some_heads(heads_quantised, sizes, Data(data.device, data.rounded, torch.float32))
    buffer = torch.zeros(sizes.layout.rows, 3 * sizes.heads * sizes.head_size, dtype=data.given, device=data.device)
    op(heads, sizes.layout, buffer[:, sizes.heads * sizes.head_size : -sizes.heads * sizes.head_size])
    return buffer


def picture(sizes: Sizes, data: Data, seed: int = 0) -> Tensor:
    """Of no mean that is nought, channels last."""
    x = data.random(seed, 1, sizes.channels, sizes.side, sizes.side + 1) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last)


def try_group_norm(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Alone, and of a sum."""
    x = picture(sizes, data)
    weight, bias, addend = (data.random(seed, sizes.channels) for seed in (1, 2, 3))
    return torch.cat([op(x, sizes.groups, weight, bias, 1e-6, added) for added in (None, addend)])


def try_residual_sum(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Of two, and of three."""
    x, branch = picture(sizes, data), picture(sizes, data, seed=1)
    return torch.cat([op(x, branch, added) for added in (None, data.random(2, sizes.channels))])


def try_doubled(op: Any, sizes: Sizes, data: Data) -> Tensor:
    found: Tensor = op(picture(sizes, data))
    return found


def try_quantised(op: Any, sizes: Sizes, data: Data) -> Tensor:
    """Of a strided part of a buffer."""
    width = sizes.heads * sizes.head_size
    buffer = data.random(0, sizes.layout.rows, 7 * width)
    return widened(op(buffer[:, 2 * width :]), data)


TRIALS: dict[str, Callable[[Any, Sizes, Data], Tensor]] = {
    "modulated_norm": try_norm,
    "add_norm": try_add_norm,
    "norm_rotate_": try_norm_rotate,
    "linear_gelu": try_linear_gelu,
    "group_norm_silu": try_group_norm,
    "residual_sum": try_residual_sum,
    "doubled": try_doubled,
    "attention": try_attention,
    "scatter_into": try_scatter,
    "heads_quantised": try_heads_quantised,
    "attention_quantised": try_attention_quantised,
    "quantised": try_quantised,
    "modulated_norm_quantised": try_norm_quantised,
    "add_norm_quantised": try_add_norm_quantised,
    "gelu_quantised": try_gelu_quantised,
}
