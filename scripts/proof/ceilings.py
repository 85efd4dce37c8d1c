"""What a card does at best, measured, and the least time that a denoising step can therefore take."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model.geometry import Geometry
from flux_local.model.selfcheck import attentions

from .scale import Scale
from .timing import milliseconds

Say = Callable[[str], None]


def measure(scale: Scale, device: str, dtype: torch.dtype, say: Say) -> dict[str, Any]:
    """Bandwidth in TB/s; matrix products, square and at FLUX.1's shapes, and attention by backend, in TFLOP/s."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    n = scale.ceiling
    source, other = random(n, n), random(n, n)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "copy_tb_s": 2 * source.nbytes / milliseconds(lambda: target.copy_(source), device, 20) / 1e9,
        "matmul_tflops": 2 * n**3 / milliseconds(lambda: source @ other, device, 10) / 1e9,
        "matmuls": {},
        "attention_tflops": {},
    }
    say(f"  copy {found['copy_tb_s']:.2f} TB/s, matmul of {n}² {found['matmul_tflops']:.0f} TFLOP/s")
    for name, (rows, columns, depth) in shapes(scale).items():
        x, weight, bias = random(rows, depth), random(columns, depth), random(columns)
        work = 2 * rows * columns * depth / 1e9
        figures = {"tflops": work / milliseconds(partial(F.linear, x, weight, bias), device, 10)}
        try:
            figures["fp8_tflops"] = work / milliseconds(fp8_product(x, weight, bias), device, 10)
        except (RuntimeError, AttributeError) as error:
            say(f"  no fp8 product of {rows} × {columns} × {depth}: {str(error)[:120]}")
        found["matmuls"][name] = figures
        say(f"  {name:11}{rows:6} ×{columns:6} ×{depth:6}  " + "  ".join(f"{k} {v:.0f}" for k, v in figures.items()))
    geometry = Geometry.of(scale.transformer)
    rows = (scale.sides[0] // 16) ** 2 + scale.text
    q, k, v = random(1, rows, 3, geometry.heads, geometry.head_size).permute(2, 0, 3, 1, 4).unbind(0)
    work = 4 * rows * rows * geometry.width / 1e9
    for name, backend in attentions(device).items():
        try:
            taken = milliseconds(partial(backend, q, k, v), device, 10)
        except RuntimeError as error:
            say(f"  attention {name} cannot: {str(error)[:80]}")
            continue
        found["attention_tflops"][name] = work / taken
        say(f"  attention {name} {work / taken:.0f} TFLOP/s at [1, {geometry.heads}, {rows}, {geometry.head_size}]")
    return found


def shapes(scale: Scale) -> dict[str, tuple[int, int, int]]:
    """(rows, columns, depth) of each matrix product of a step at the largest canvas."""
    d, text, image = Geometry.of(scale.transformer).width, scale.text, (scale.sides[0] // 16) ** 2
    return {
        "image qkv": (image, 3 * d, d), "image out": (image, d, d), "image up": (image, 4 * d, d),
        "image down": (image, d, 4 * d), "text qkv": (text, 3 * d, d), "text up": (text, 4 * d, d),
        "text down": (text, d, 4 * d), "single in": (image + text, 7 * d, d), "single out": (image + text, d, 5 * d),
    }  # fmt: skip


def fp8_product(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """The product of the same shape in fp8 with a scale a row and a column, without what makes the scales."""
    rows = torch.full((len(x), 1), 0.01, device=x.device)
    columns = torch.full((1, len(weight)), 0.01, device=x.device)
    a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    bias = bias.to(torch.bfloat16)
    return lambda: torch._scaled_mm(a, b.t(), rows, columns, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def floor(scale: Scale, measured: dict[str, Any], say: Say) -> dict[str, Any]:
    """By canvas: the operations of a step, and the time that they take at the measured rates.

    Every token crosses 12·D² weights a block, and attention costs 4·tokens²·D a block; modulation is left out, since
    it is computed once a picture.
    """
    geometry = Geometry.of(scale.transformer)
    d, blocks = geometry.width, geometry.double_blocks + geometry.single_blocks
    attention_rate = max(measured["attention_tflops"].values(), default=measured["matmul_tflops"])
    found = {}
    for side in scale.sides:
        tokens = (side // 16) ** 2 + scale.text
        linear, attended = 24 * blocks * tokens * d * d / 1e12, 4 * blocks * tokens * tokens * d / 1e12
        least = 1000 * (linear / measured["matmul_tflops"] + attended / attention_rate)
        found[str(side)] = {"tflop": linear + attended, "least_ms": least}
        say(f"  {side}²: {linear + attended:.2f} TFLOP a step, {least:.2f} ms at the least")
    return found
