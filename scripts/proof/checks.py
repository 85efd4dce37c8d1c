"""Is it right? Every kernel against its torch form, and the whole transformer against diffusers'."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import torch

from flux_local.model import memory
from flux_local.model.denoiser import Denoiser
from flux_local.model.fp8 import ADA, in_fp8
from flux_local.model.geometry import Geometry
from flux_local.model.graphs import recorded
from flux_local.model.layers import Layers
from flux_local.model.ops import Layout, Ops
from flux_local.model.reference import ReferenceTransformer
from flux_local.model.selfcheck import Sizes, accelerated, with_fp8_attention
from flux_local.model.transformer import FluxTransformer

from .bench import Bench, say

FP8_STEP, FP8_BLOCK = 0.04, 0.08
"""Largest relative errors of fp8 against our own precision: of a velocity, and of what one branch of a block adds.

e4m3 rounds by up to 1/16; normal numbers through an MLP's two products of normal weights come out 5.1 to 5.5% off at
any width, which is the format's own error and none of ours.
"""
BF16_ERROR = 1.1
"""Our distance from fp32 truth, at most so many times that of diffusers in bf16."""
RAGGED_TEXT = 77
"""Tokens: with so many the image's rows begin where fp8's libraries do not like it."""


def kernels(bench: Bench) -> None:
    """Every kernel against its torch form, at the sizes of the whole model; the good ones are used from here."""
    geometry = Geometry.of(bench.scale.transformer)
    tokens = (bench.scale.sides[0] // 16) ** 2
    if not bench.cuda:
        say("  no GPU: the torch forms are used")
        return
    for batch in bench.scale.batches:
        sizes = Sizes(geometry.heads, geometry.head_size, Layout(batch, bench.scale.text, tokens // batch),
                      bench.scale.vae["block_out_channels"][0], bench.scale.vae["norm_num_groups"], 64)  # fmt: skip
        ops, findings = accelerated(sizes, bench.device, bench.dtype)
        for finding in findings:
            bench.report.found(f"kernel {finding.name}, batch {batch}", finding)
        if batch == 1:
            bench.report.check("e4m3 as torch rounds it", rounds_as_torch(bench, ops))
            bench.ops = ops
            bench.ops = fp8_attention(bench, ops, sizes)


def rounds_as_torch(bench: Bench, ops: Ops) -> bool:
    """Whether all numbers of e4m3, the middles between them, and what lies just beside become the same numbers."""
    grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    row = torch.cat([grid, middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])]).to(bench.device)
    rows = torch.stack([row, -row])
    found, expected = ops.quantised(rows), Ops().quantised(rows)
    return torch.equal(found.values.float(), expected.values.float())


def fp8_attention(bench: Bench, ops: Ops, sizes: Sizes) -> Ops:
    """With the first library that does attention in fp8; that none is there is no failure."""
    ops, findings = with_fp8_attention(ops, sizes, bench.device, bench.dtype)
    for finding in findings:
        if finding.reason.startswith("not installed"):
            say(f"  {finding.name}: {finding.reason}")
        else:
            bench.report.found(f"kernel {finding.name}", finding)
    return ops


def build(bench: Bench) -> None:
    """diffusers' module with random weights, what it says in fp32, and ours on the same weights."""
    from diffusers import FluxTransformer2DModel

    bench.module = bench.filled(lambda: FluxTransformer2DModel(**bench.scale.transformer))
    # Before ours is made: 12 billion parameters in fp32 leave no room beside it on a card of 80 GB, and only
    # a module that is not converted any more shares its memory with ours.
    side = bench.scale.sides[-1]
    exact = ReferenceTransformer(bench.module.to(torch.float32))
    bench.truth = Denoiser(exact).velocity(bench.pictures(exact, side, 1, 4)).double()
    bench.module.to(bench.dtype)
    began = time.perf_counter()
    weights = bench.module.state_dict()
    geometry = Geometry.of(bench.module.config)
    work = memory.step_work(geometry.width, max(bench.scale.batches) * bench.scale.sides[0] ** 2)
    bench.ours = FluxTransformer(geometry, Layers(weights.__getitem__), bench.ops, work=work)
    bench.fast = in_fp8(bench.ours)
    emulated = bench.cuda and bench.ops.attention_quantised_by == Ops().attention_quantised_by
    bench.fastest = None if emulated else attention_in_fp8(bench.fast)
    bench.theirs = ReferenceTransformer(bench.module)
    bench.report.timings["fuse_weights_s"] = time.perf_counter() - began
    say(f"  {sum(p.numel() for p in bench.module.parameters()) / 1e9:.2f} billion parameters")


def correctness(bench: Bench) -> None:
    """Velocities in bf16, ours and diffusers', against diffusers' own in fp32."""
    side = bench.scale.sides[-1]
    drawn = {}
    for name, transformer in (("diffusers", bench.theirs), ("ours", bench.ours)):
        drawn[name] = Denoiser(transformer).velocity(bench.pictures(transformer, side, 1, 4)).double()
    errors = {name: float((v - bench.truth).norm() / bench.truth.norm()) for name, v in drawn.items()}
    limit = max(BF16_ERROR * errors["diffusers"], 1e-5)
    bench.report.check(f"velocity at {side}² against fp32", 0 <= errors["ours"] <= limit, **errors, limit=limit)
    if bench.cuda and torch.cuda.get_device_capability() >= ADA:
        bench.report.check("products in fp8 are the card's own", bench.fast.fp8)
    ragged(bench, bench.ours, side, 2 * limit)
    ragged(bench, bench.fast, side, FP8_STEP, text=RAGGED_TEXT)
    rounded = Denoiser(bench.fast).velocity(bench.pictures(bench.fast, side, 1, 4)).double()
    error = float((rounded - drawn["ours"]).norm() / drawn["ours"].norm())
    bench.report.check(f"velocity at {side}² in fp8 against ours", 0 < error <= FP8_STEP, error=error, limit=FP8_STEP)
    worst = max(contributions(bench, side))
    bench.report.check("each block's contribution in fp8", 0 < worst <= FP8_BLOCK, worst=worst, limit=FP8_BLOCK)
    if bench.fastest is not None:
        found = Denoiser(bench.fastest).velocity(bench.pictures(bench.fastest, side, 1, 4)).double()
        error = float((found - drawn["ours"]).norm() / drawn["ours"].norm())
        name = f"velocity at {side}² in fp8, attention too, against ours"
        bench.report.check(name, 0 < error <= 1.5 * FP8_STEP, error=error, limit=1.5 * FP8_STEP)
    modes = {"bf16": bench.ours, "fp8": bench.fast, "fp8 attention": bench.fastest}
    for name, transformer in modes.items():
        if transformer is None:
            continue
        for batch in bench.scale.batches[1:]:
            same = Denoiser(transformer).independent(side, side, batch, bench.prompt(0))
            bench.report.independent[f"{name}, {batch} at {side}"] = same
            say(f"  {name}: a picture's bits in a batch of {batch} are {'' if same else 'NOT '}those of it alone")


def ragged(bench: Bench, transformer: FluxTransformer, side: int, limit: float, text: int | None = None) -> None:
    """Ours against its plain operations at odd numbers of tokens, where kernels and attention go other ways."""
    width, height = side + 16, side - 16
    found, plain = (
        Denoiser(each).velocity(bench.pictures(each, width, 1, 4, height, text)).double()
        for each in (transformer, bench.ours.with_plain_operations())
    )
    error = float((found - plain).norm() / plain.norm())
    fp8 = f" in fp8, {text} tokens of text," if text else ""
    name = f"velocity at {width}×{height}{fp8} against plain operations"
    bench.report.check(name, 0 <= error <= limit, error=error, limit=limit)


def contributions(bench: Bench, side: int) -> Iterator[float]:
    """‖fp8 − ours‖ / ‖ours‖ of what each branch of each block adds, given the same normal numbers."""
    layout = Layout(1, bench.scale.text, (side // 16) ** 2)
    rotary = bench.ours.rotary(side, side, bench.scale.text)
    generator = torch.Generator(bench.device).manual_seed(5)
    x = torch.randn(layout.rows, bench.ours.geometry.width, generator=generator, device=bench.device).to(bench.dtype)
    given = bench.ops.quantised(x) if bench.fast.fp8 else x
    with torch.inference_mode():
        for plain, fast in zip(bench.ours.branches(), bench.fast.branches(), strict=True):
            expected = plain(x, rotary, layout).double()
            yield float((fast(given, rotary, layout).double() - expected).norm() / expected.norm())


def attention_in_fp8(transformer: FluxTransformer) -> FluxTransformer:
    """The same with attention in fp8 too; all weights are shared."""
    twin = copy.copy(transformer)
    twin.fp8_attention = True
    twin.run = recorded(twin.forward, twin.device, beside=transformer.run)
    return twin
