"""A device, what is found there, and data of FLUX.1's shapes for it. Knows nothing of what is checked or timed."""

from __future__ import annotations

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux_local.model.denoiser import Picture
from flux_local.model.latents import initial_noise
from flux_local.model.ops import Ops
from flux_local.model.schedule import FlowSchedule
from flux_local.model.selfcheck import Finding
from flux_local.model.text import PromptEmbedding

from .scale import Scale
from .timing import milliseconds

GUIDANCE = 4.0
"""Exact in bf16, times a thousand too."""


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
    """A device and a scale; what is built and found there."""

    module: Any
    """diffusers' transformer with random weights,"""
    theirs: Any
    """behind our interface;"""
    ours: Any
    """ours on the same weights,"""
    fast: Any
    """in fp8,"""
    fastest: Any
    """and with attention in fp8 too, or None."""
    truth: Tensor
    """A velocity of diffusers' module in fp32."""

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
