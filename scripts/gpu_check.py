#!/usr/bin/env python3
"""The GPU proof: is flux-local right on this card, and how fast is it beside diffusers and the card's own limits?

    make gpu-check            (or: scripts/gpu_check.py --out docs/benchmarks/CARD.json)

Builds FLUX.1's whole architecture with random weights on the device; needs no weights and no network, only torch,
triton, diffusers, transformers, safetensors and Pillow. Prints the physical floor first, checks every kernel and the
transformer against diffusers' modules, then times both in the same run. Ends with a table and one JSON document, and
exits 1 when a check fails. `--small` runs all of it at toy sizes, on a CPU too: a test of this script, no measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import io
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from proof import ceilings, peers  # noqa: E402
from proof.scale import REAL, SMALL, Scale  # noqa: E402
from proof.timing import TIMED, WARM_UPS, milliseconds  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from flux_local.model import memory  # noqa: E402
from flux_local.model.denoiser import Denoiser, Picture  # noqa: E402
from flux_local.model.fp8 import ADA, in_fp8  # noqa: E402
from flux_local.model.geometry import Geometry  # noqa: E402
from flux_local.model.graphs import Graphs, Pool, recorded  # noqa: E402
from flux_local.model.latents import initial_noise  # noqa: E402
from flux_local.model.layers import Layers  # noqa: E402
from flux_local.model.ops import Layout, Ops  # noqa: E402
from flux_local.model.reference import ReferenceTransformer  # noqa: E402
from flux_local.model.schedule import FlowSchedule  # noqa: E402
from flux_local.model.selfcheck import Finding, Sizes, accelerated, with_fp8_attention  # noqa: E402
from flux_local.model.t5 import T5Encoder, fastest  # noqa: E402
from flux_local.model.text import PromptEmbedding  # noqa: E402
from flux_local.model.transformer import FluxTransformer  # noqa: E402
from flux_local.model.vae import Autoencoder  # noqa: E402
from flux_local.steps import LEVELS, formula  # noqa: E402

FP8_STEP, FP8_BLOCK = 0.04, 0.08
"""Largest relative errors of fp8 against our own precision: of a velocity, and of what one branch of a block adds.

e4m3 rounds by up to 1/16; normal numbers through an MLP's two products of normal weights come out 5.1 to 5.5% off at
any width, which is the format's own error and none of ours.
"""
BF16_ERROR = 1.1
"""Our distance from fp32 truth, at most so many times that of diffusers in bf16."""
GUIDANCE = 4.0
"""Exact in bf16, times a thousand too."""
RAGGED_TEXT = 77
"""Tokens: with so many the image's rows begin where fp8's libraries do not like it."""
STEPS_TIMED = 3
"""Steps between two events: one alone would count the host's launches too, which a server hides behind the card."""


@dataclass
class Report:
    """What was found, in the order of finding; the JSON document."""

    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Any] = field(default_factory=dict)
    floor: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    independent: dict[str, bool] = field(default_factory=dict)
    """Whether bits depend on the batch: no failure, since the engine then leaves such batches alone."""
    timings: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By precision, the kernels of one step alone, which a card that its power limits does faster than one of many."""
    memory: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, good: bool, **figures: Any) -> None:
        self.checks.append({"name": name, "good": good, **figures})
        say(f"  {'good' if good else 'BAD '}  {name}  {figures}")

    def write(self, path: Path | None) -> None:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def found(self, name: str, finding: Finding) -> None:
        self.check(name, finding.good, error=finding.error, reason=finding.reason)


def say(text: str) -> None:
    print(text, flush=True)


class Bench:
    """A device, a scale, and the stages of the proof."""

    def __init__(self, device: str, scale: Scale, out: Path | None = None) -> None:
        self.device, self.scale, self.report, self.out = device, scale, Report(), out
        self.cuda = device.startswith("cuda")
        if ":" in device:
            torch.cuda.set_device(device)  # Triton takes the current one
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.ops = Ops()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A part whose failure is recorded and costs the others nothing; what is known by then is written."""
        say(f"\n{name}")
        began = time.perf_counter()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        with self.attempt(name):
            yield
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            self.report.memory.setdefault("peak_gb", {})[name] = torch.cuda.max_memory_allocated() / 1e9
        self.report.write(self.out)
        say(f"  [{time.perf_counter() - began:.1f} s]")

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the boundary of what is measured
            traceback.print_exc()
            self.report.failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")

    def milliseconds(self, work: Callable[[], Any]) -> float:
        return milliseconds(work, self.device)

    def environment(self) -> None:
        import diffusers
        import transformers

        found = {
            "card": torch.cuda.get_device_name() if self.cuda else platform.processor() or "cpu",
            "driver": driver(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if self.cuda else None,  # type: ignore[no-untyped-call]
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "commit": commit(),
            "small": self.scale is SMALL,
        }
        with contextlib.suppress(ImportError):
            import triton

            found["triton"] = triton.__version__
        self.report.environment = found
        say(json.dumps(found, indent=2))

    def ceilings(self) -> None:
        """What the card does at best: copying, matrix products at FLUX.1's shapes, attention by backend."""
        self.report.ceilings = ceilings.measure(self.scale, self.device, self.dtype, say)

    def floor(self) -> None:
        """The least time that a step can take at the ceilings measured."""
        self.report.floor = ceilings.floor(self.scale, self.report.ceilings, say)

    def kernels(self) -> None:
        """Every kernel against its torch form, at the sizes of the whole model; the good ones are used from here."""
        geometry = Geometry.of(self.scale.transformer)
        tokens = (self.scale.sides[0] // 16) ** 2
        if not self.cuda:
            say("  no GPU: the torch forms are used")
            return
        for batch in self.scale.batches:
            sizes = Sizes(geometry.heads, geometry.head_size, Layout(batch, self.scale.text, tokens // batch),
                          self.scale.vae["block_out_channels"][0], self.scale.vae["norm_num_groups"], 64)  # fmt: skip
            ops, findings = accelerated(sizes, self.device, self.dtype)
            for finding in findings:
                self.report.found(f"kernel {finding.name}, batch {batch}", finding)
            if batch == 1:
                self.report.check("e4m3 as torch rounds it", self.rounds_as_torch(ops))
                self.ops = ops
                self.ops = self.fp8_attention(ops, sizes)

    def rounds_as_torch(self, ops: Ops) -> bool:
        """Whether all numbers of e4m3, the middles between them, and what lies just beside become the same numbers."""
        grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middle = (grid[1:] + grid[:-1]) / 2
        row = torch.cat([grid, middle, middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])]).to(self.device)
        rows = torch.stack([row, -row])
        found, expected = ops.quantised(rows), Ops().quantised(rows)
        return torch.equal(found.values.float(), expected.values.float())

    def fp8_attention(self, ops: Ops, sizes: Sizes) -> Ops:
        """With the first library that does attention in fp8; that none is there is no failure."""
        ops, findings = with_fp8_attention(ops, sizes, self.device, self.dtype)
        for finding in findings:
            if finding.reason.startswith("not installed"):
                say(f"  {finding.name}: {finding.reason}")
            else:
                self.report.found(f"kernel {finding.name}", finding)
        return ops

    def build(self) -> None:
        """diffusers' module with random weights, what it says in fp32, and ours on the same weights."""
        from diffusers import FluxTransformer2DModel

        self.module = self.filled(lambda: FluxTransformer2DModel(**self.scale.transformer))
        # Before ours is made: 12 billion parameters in fp32 leave no room beside it on a card of 80 GB, and only
        # a module that is not converted any more shares its memory with ours.
        side = self.scale.sides[-1]
        exact = ReferenceTransformer(self.module.to(torch.float32))
        self.truth = Denoiser(exact).velocity(self.pictures(exact, side, 1, 4)).double()
        self.module.to(self.dtype)
        began = time.perf_counter()
        weights = self.module.state_dict()
        geometry = Geometry.of(self.module.config)
        work = memory.step_work(geometry.width, max(self.scale.batches) * self.scale.sides[0] ** 2)
        self.ours = FluxTransformer(geometry, Layers(weights.__getitem__), self.ops, work=work)
        self.fast = in_fp8(self.ours)
        emulated = self.cuda and self.ops.attention_quantised_by == Ops().attention_quantised_by
        self.fastest = None if emulated else attention_in_fp8(self.fast)
        self.theirs = ReferenceTransformer(self.module)
        self.report.timings["fuse_weights_s"] = time.perf_counter() - began
        say(f"  {sum(p.numel() for p in self.module.parameters()) / 1e9:.2f} billion parameters")

    def filled(self, make: Callable[[], nn.Module]) -> Any:
        """A module on the device with weights that keep activations of about one."""
        with torch.device("meta"):
            module = make()
        module = module.to(self.dtype).to_empty(device=self.device).eval().requires_grad_(False)
        generator = torch.Generator(self.device).manual_seed(0)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.ndim < 2 and "norm" in name and name.endswith("weight"):
                tensor.fill_(1.0)
            elif tensor.is_floating_point():
                tensor.normal_(0.0, 0.5 * tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02, generator=generator)
            else:
                tensor.copy_(torch.arange(tensor.numel(), device=self.device).view(tensor.shape))
        return module

    def prompt(self, seed: int, text: int | None = None) -> PromptEmbedding:
        generator = torch.Generator(self.device).manual_seed(seed)
        config = self.scale.transformer

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        length = text or self.scale.text
        states = random(1, length, config["joint_attention_dim"])
        return PromptEmbedding(states, random(1, config["pooled_projection_dim"]), length, "")

    def pictures(
        self,
        transformer: Any,
        width: int,
        batch: int,
        steps: int,
        height: int | None = None,
        text: int | None = None,
    ) -> list[Picture]:
        """Of numbers that are the same in bf16 and in fp32, so that a difference is the transformer's own."""
        height = height or width
        sigmas = FlowSchedule(use_dynamic_shifting=True).sigmas(steps, width * height // 256)
        return [
            Picture(width, height, sigmas,
                    initial_noise(i, width, height).to(self.device, self.dtype).to(transformer.dtype),
                    self.prompt(i, text), transformer.condition(self.prompt(i, text), sigmas[:-1], GUIDANCE))
            for i in range(batch)
        ]  # fmt: skip

    def correctness(self) -> None:
        """Velocities in bf16, ours and diffusers', against diffusers' own in fp32."""
        side = self.scale.sides[-1]
        drawn = {}
        for name, transformer in (("diffusers", self.theirs), ("ours", self.ours)):
            drawn[name] = Denoiser(transformer).velocity(self.pictures(transformer, side, 1, 4)).double()
        errors = {name: float((v - self.truth).norm() / self.truth.norm()) for name, v in drawn.items()}
        limit = max(BF16_ERROR * errors["diffusers"], 1e-5)
        self.report.check(f"velocity at {side}² against fp32", 0 <= errors["ours"] <= limit, **errors, limit=limit)
        if self.cuda and torch.cuda.get_device_capability() >= ADA:
            self.report.check("products in fp8 are the card's own", self.fast.fp8)
        self.ragged(self.ours, side, 2 * limit)
        self.ragged(self.fast, side, FP8_STEP, text=RAGGED_TEXT)
        rounded = Denoiser(self.fast).velocity(self.pictures(self.fast, side, 1, 4)).double()
        error = float((rounded - drawn["ours"]).norm() / drawn["ours"].norm())
        self.report.check(
            f"velocity at {side}² in fp8 against ours", 0 < error <= FP8_STEP, error=error, limit=FP8_STEP
        )
        worst = max(self.contributions(side))
        self.report.check("each block's contribution in fp8", 0 < worst <= FP8_BLOCK, worst=worst, limit=FP8_BLOCK)
        if self.fastest is not None:
            found = Denoiser(self.fastest).velocity(self.pictures(self.fastest, side, 1, 4)).double()
            error = float((found - drawn["ours"]).norm() / drawn["ours"].norm())
            name = f"velocity at {side}² in fp8, attention too, against ours"
            self.report.check(name, 0 < error <= 1.5 * FP8_STEP, error=error, limit=1.5 * FP8_STEP)
        for name, transformer in (("bf16", self.ours), ("fp8", self.fast)):
            for batch in self.scale.batches[1:]:
                same = Denoiser(transformer).independent(side, side, batch, self.prompt(0))
                self.report.independent[f"{name}, {batch} at {side}"] = same
                say(f"  {name}: a picture's bits in a batch of {batch} are {'' if same else 'NOT '}those of it alone")

    def ragged(self, transformer: FluxTransformer, side: int, limit: float, text: int | None = None) -> None:
        """Ours against its plain operations at odd numbers of tokens, where kernels and attention go other ways."""
        width, height = side + 16, side - 16
        found, plain = (
            Denoiser(each).velocity(self.pictures(each, width, 1, 4, height, text)).double()
            for each in (transformer, self.ours.with_plain_operations())
        )
        error = float((found - plain).norm() / plain.norm())
        fp8 = f" in fp8, {text} tokens of text," if text else ""
        name = f"velocity at {width}×{height}{fp8} against plain operations"
        self.report.check(name, 0 <= error <= limit, error=error, limit=limit)

    def contributions(self, side: int) -> Iterator[float]:
        """‖fp8 − ours‖ / ‖ours‖ of what each branch of each block adds, given the same normal numbers."""
        layout = Layout(1, self.scale.text, (side // 16) ** 2)
        rotary = self.ours.rotary(side, side, self.scale.text)
        generator = torch.Generator(self.device).manual_seed(5)
        x = torch.randn(layout.rows, self.ours.geometry.width, generator=generator, device=self.device).to(self.dtype)
        given = self.ops.quantised(x) if self.fast.fp8 else x
        with torch.inference_mode():
            for plain, fast in zip(self.ours.branches(), self.fast.branches(), strict=True):
                expected = plain(x, rotary, layout).double()
                yield float((fast(given, rotary, layout).double() - expected).norm() / expected.norm())

    def step_ms(self, transformer: Any, side: int, batch: int) -> float:
        """A step among steps, as a server has them: in a row, with the host running ahead. What the server's own clock
        says of the last one is written beside it."""
        denoiser = Denoiser(transformer)
        pictures = self.pictures(transformer, side, batch, STEPS_TIMED * (TIMED + WARM_UPS))

        def several() -> None:
            for _ in range(STEPS_TIMED):
                denoiser.advance(pictures)

        ms = milliseconds(several, self.device, least_ms=0) / STEPS_TIMED
        denoiser.pace.finish()
        if (seconds := denoiser.pace.token_seconds) is not None:
            own = self.report.timings.setdefault("step_ms_by_own_clock", [])
            own.append([ms, 1000 * seconds * batch * (side * side // 256)])
        return ms

    def steps(self) -> None:
        """One step: ours with graphs and without, then diffusers as it comes. A row that fails costs no other."""
        table = self.report.timings["step_ms"] = {}
        for side in self.scale.sides:
            rows: dict[str, tuple[Any, tuple[int, ...]]] = {
                f"ours {side}": (self.ours, self.scale.batches),
                f"ours fp8 {side}": (self.fast, self.scale.batches),
                f"ours fp8, attention too {side}": (self.fastest, self.scale.batches),
                f"ours without graph {side}": (without_graphs(self.ours), (1,)),
                f"diffusers eager {side}": (self.theirs, self.scale.batches),
            }
            for name, (transformer, batches) in rows.items():
                for batch in self.batches_at(side, batches) if transformer is not None else ():
                    with self.attempt(f"step, {name}, batch {batch}"):
                        ms = table.setdefault(name, {})[str(batch)] = self.step_ms(transformer, side, batch)
                        say(f"  {name:34} batch {batch}: {ms:.2f} ms")
        if self.cuda:
            self.graphs_in_turn()
        for name, transformer in (("own precision", self.ours), ("fp8", self.fast), ("fp8 attention", self.fastest)):
            graphs = getattr(transformer, "run", None)
            if isinstance(graphs, Graphs):
                self.report.check(
                    f"CUDA graphs, {name}", bool(graphs.captured) and not graphs.refused,
                    captured=len(graphs.captured), refused=[[list(shape) for shape in s] for s in graphs.refused],
                )  # fmt: skip

    def batches_at(self, side: int, batches: tuple[int, ...]) -> tuple[int, ...]:
        """Those that a server would have at this canvas: no more at once than fill one of the largest."""
        return tuple(batch for batch in batches if batch == 1 or batch * side**2 <= self.scale.sides[0] ** 2)

    def graphs_in_turn(self) -> None:
        """More shapes than there may be graphs, over and over: what is let go takes nothing of the others with it."""
        weight = torch.randn(12288, 3072, device=self.device, dtype=self.dtype)
        graphs = Graphs(lambda x: x @ weight, Pool(), limit=2)
        inputs = [torch.randn(rows, 12288, device=self.device, dtype=self.dtype) for rows in (512, 77, 1024, 512, 256)]
        same = [bool(torch.equal(graphs(x), x @ weight)) for x in 4 * inputs]
        self.report.check("CUDA graphs, more shapes than graphs", all(same) and not graphs.refused, same=same)

    def compiled(self) -> None:
        """diffusers' own recipe: cuDNN's attention and its repeated blocks compiled."""
        if not self.cuda:
            say("  only on a GPU")
            return
        table, side = self.report.timings["step_ms"], self.scale.sides[0]
        self.module.set_attention_backend("_native_cudnn")
        self.module.compile_repeated_blocks(fullgraph=True)
        table[f"diffusers compiled {side}"] = {"1": self.step_ms(self.theirs, side, 1)}
        say(f"  diffusers compiled {side}: {table[f'diffusers compiled {side}']['1']:.2f} ms")

    def others(self) -> None:
        """What other packages make of diffusers' module, where they are installed; last, since they change it."""
        if not self.cuda:
            say("  only on a GPU")
            return
        table, side = self.report.timings["step_ms"], self.scale.sides[0]
        for policy in (None, "medium"):
            try:
                with peers.cache_dit_steps(self.module, self.scale.steps, policy) as cached:
                    seconds = self.milliseconds(lambda: self.loop(side, cached.begin)) / 1000
                    found = {"denoising_s": seconds, "computed": cached.computed(), "steps": self.scale.steps}
            except ImportError as error:
                say(f"  cache-dit: not installed ({error})")
                break
            self.report.timings[f"cache-dit {policy or 'by threshold'} {side}"] = found
            say(f"  cache-dit, {policy or 'by threshold'}: {found}")
        try:
            peers.torchao_fp8(self.module)
        except ImportError as error:
            say(f"  torchao: not installed ({error})")
            return
        table[f"diffusers with torchao's fp8, compiled {side}"] = {"1": (ms := self.step_ms(self.theirs, side, 1))}
        say(f"  torchao's fp8, compiled: {ms:.2f} ms")

    def loop(self, side: int, begin: Callable[[], None]) -> None:
        """All steps of a picture through diffusers' module."""
        begin()
        pictures, denoiser = self.pictures(self.theirs, side, 1, self.scale.steps), Denoiser(self.theirs)
        while pictures[0].steps_left:
            denoiser.advance(pictures)

    def profile(self) -> None:
        """One step of ours in each precision at the first side, by kernel."""
        if not self.cuda:
            say("  only on a GPU")
            return
        from torch.profiler import ProfilerActivity, profile

        for name, transformer in (("own precision", self.ours), ("fp8", self.fast), ("fp8 attention", self.fastest)):
            if transformer is None:
                continue
            denoiser, pictures = Denoiser(transformer), self.pictures(transformer, self.scale.sides[0], 1, 8)
            denoiser.advance(pictures)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as recorded:
                denoiser.advance(pictures)
                torch.cuda.synchronize()
            rows = [row for row in recorded.key_averages() if row.self_device_time_total > 0]
            rows.sort(key=lambda row: -row.self_device_time_total)
            total = sum(row.self_device_time_total for row in rows) or 1.0
            self.report.profile[name] = [
                {"kernel": row.key[:120], "calls": row.count, "ms": row.self_device_time_total / 1000,
                 "share": row.self_device_time_total / total}
                for row in rows[:24]
            ]  # fmt: skip
            say(f"  {name}, {total / 1000:.2f} ms")
            for row in self.report.profile[name]:
                say(f"  {row['ms']:8.3f} ms  {100 * row['share']:5.1f}%  {row['calls']:4} × {row['kernel'][:90]}")

    def around(self) -> None:
        """What lies around the steps, then whole pictures: prompt, steps, decoding, PNG."""
        from diffusers import AutoencoderKL
        from PIL import Image
        from transformers import T5Config, T5EncoderModel

        t5 = self.filled(lambda: T5EncoderModel(T5Config(**self.scale.t5, feed_forward_proj="gated-gelu")))
        tokens = torch.arange(self.scale.text, device=self.device)[None]
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = Autoencoder(self.filled(lambda: AutoencoderKL(**self.scale.vae, **kinds)), self.ops)
        timings = self.report.timings
        with torch.inference_mode():
            read = self.reader(t5)
            for name, work in (("t5_ms", read), ("t5_by_transformers_ms", lambda ids: t5(ids).last_hidden_state)):
                timings[name] = self.milliseconds(lambda: work(tokens))  # noqa: B023
            say(f"  T5: {timings['t5_ms']:.2f} ms, by transformers {timings['t5_by_transformers_ms']:.2f} ms")
            for side in self.scale.sides:
                noise = initial_noise(0, side, side).to(self.device, self.dtype)
                timings[f"decode_{side}_ms"] = self.milliseconds(lambda: vae.decode(noise, side, side))  # noqa: B023
                say(f"  decoding at {side}²: {timings[f'decode_{side}_ms']:.2f} ms")
            whole = {}
            transformers = [t for t in (self.ours, self.fast, self.fastest) if t is not None]
            modes = [(self.scale.sides[0], *mode) for mode in product(transformers, LEVELS)]
            modes += [(self.scale.sides[-1], transformer, "none") for transformer in transformers]
            for side, transformer, level in modes:
                denoiser, mask = Denoiser(transformer), formula(level, self.scale.steps)
                precision = "own precision" if transformer is self.ours else "fp8"
                name = f"{side}² {precision}, attention {transformer.attention_by}, acceleration {level}"
                taken = []
                for _ in range(2):
                    if self.cuda:
                        torch.cuda.synchronize()
                    began = time.perf_counter()
                    read(tokens)
                    pictures = self.pictures(transformer, side, 1, self.scale.steps)
                    pictures[0].computed = mask
                    while pictures[0].steps_left:
                        denoiser.advance(pictures)
                    pixels = vae.decode(pictures[0].latents, side, side)
                    Image.frombytes("RGB", (side, side), pixels).save(io.BytesIO(), "PNG", compress_level=1)
                    taken.append(time.perf_counter() - began)
                whole[name] = min(taken)
                say(f"  whole picture, {name}, {self.scale.steps} steps: {whole[name]:.3f} s")
            timings["picture_s"] = whole

    def reader(self, t5: Any) -> Callable[[Tensor], Tensor]:
        """T5 as the server has it on this device."""
        if not self.cuda:
            return lambda ids: t5(ids).last_hidden_state
        device = torch.device(self.device)
        found = fastest(t5, self.scale.text, device)
        self.report.check("T5 is ours", isinstance(found, T5Encoder))
        return recorded(found, device)

    def run(self) -> Report:
        stages = {
            "Environment": self.environment, "The card's ceilings": self.ceilings, "Floor": self.floor,
            "Kernels": self.kernels, "Building FLUX.1 with random weights": self.build,
            "Correctness": self.correctness, "Steps": self.steps, "Around the steps": self.around,
            "Profile of one step": self.profile, "diffusers compiled": self.compiled,
            "Other packages": self.others,
        }  # fmt: skip
        for name, work in stages.items():
            with self.stage(name):
                work()
        return self.report


def attention_in_fp8(transformer: FluxTransformer) -> FluxTransformer:
    """The same with attention in fp8 too; all weights are shared."""
    twin = copy.copy(transformer)
    twin.fp8_attention = True
    twin.run = recorded(twin.forward, twin.device, beside=transformer.run)
    return twin


def without_graphs(transformer: FluxTransformer) -> FluxTransformer:
    """The same, each operation launched by itself."""
    twin = copy.copy(transformer)
    twin.run = twin.forward
    return twin


def driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def table(report: Report) -> None:
    """The steps side by side, with what they are of the first."""
    steps = report.timings.get("step_ms", {})
    say(f"\n{'step':28}{'batch':>6}{'ms':>10}{'ms a picture':>14}")
    for name, by_batch in steps.items():
        for batch, ms in by_batch.items():
            say(f"{name:28}{batch:>6}{ms:10.2f}{ms / int(batch):14.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a test of this script")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU. Try --device cpu --small to see what this does.", file=sys.stderr)
        return 2
    report = Bench(options.device, SMALL if options.small else REAL, options.out).run()
    failed = report.failures + [check["name"] for check in report.checks if not check["good"]]
    table(report)
    say(f"\n{len(report.checks)} checks, {len(failed)} failed{': ' + '; '.join(failed) if failed else ''}")
    print(json.dumps(asdict(report)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
