"""What others offer for diffusers' module, timed beside ours where it can be imported: torchao's fp8, and cache-dit.

Each function changes the module that it is given; where its package is missing it raises ImportError and changes none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
FIRST_BLOCKS = 8
THRESHOLD = 0.08
WARM_UP = 8
ORDER = 1
"""Of `cache_dit_steps`: F8B0, a residual threshold of 0.08 after 8 computed steps, and a line through what was seen.

cache-dit's own defaults, which its user guide gives for FLUX.1-dev (docs/user_guide/CACHE_API.md: "Default options,
F8B0, 8 warmup steps, and unlimited cached steps"), with the pair that it recommends there, "TaylorSeer + DBCache FnB0".
"""


def quantised(module: nn.Module, name: str) -> bool:
    """Whether a layer's weight becomes fp8: those that see all tokens, not the modulation, of one row a picture."""
    return isinstance(module, nn.Linear) and name.startswith(BLOCKS) and ".norm" not in name


def torchao_fp8(module: Any) -> None:
    """torchao's fp8 for a `FluxTransformer2DModel` in bf16, in place, and its repeated blocks compiled anew.

    Activations are quantised as they come, both sides with a scale a row: `Float8DynamicActivationFloat8WeightConfig`
    with `PerRow`, as torchao documents it, and inductor's settings as it recommends them, which hold for the process
    from then on. The products are torch's own: by default MSLK's would be taken where that is installed.

    Attention stays as it was set. There is no way back; a GPU below compute capability 8.9 or a CPU is an
    AssertionError of torchao's that says so.
    """
    ao = import_module("torchao.quantization")
    kernels = import_module("torchao.quantization.quantize_.common").KernelPreference
    config = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), kernel_preference=kernels.TORCH)
    torch.compiler.reset()  # what was compiled for the weights as they were
    ao.quantize_(module, config, filter_fn=quantised)
    module.compile_repeated_blocks(fullgraph=True)


@dataclass(frozen=True)
class CachedSteps:
    """A module of which cache-dit leaves out parts of some steps."""

    module: Any
    steps: int
    cache_dit: Any

    def begin(self) -> None:
        """Before each picture's first step.

        cache-dit 1.5.3 would find its own way only a step late: the first of a second picture is to it one more of the
        first one's, and it may take from that picture what it kept.
        """
        self.cache_dit.refresh_context(self.module, num_inference_steps=self.steps)

    def computed(self) -> int:
        """How many steps of the last finished picture ran through all blocks."""
        found = self.cache_dit.summary(self.module, logging=False)[-1]
        return int(found.accumulated_executed_steps) - len(found.cached_steps)


@contextmanager
def cache_dit_steps(module: Any, steps: int, policy: str | None = None) -> Iterator[CachedSteps]:
    """A `FluxTransformer2DModel` with cache-dit's DBCache and TaylorSeer around its blocks, as they are: compiled, say.

    A step that is not computed still runs the first eight blocks, and takes the others from earlier steps.

    Args:
        steps: of each picture.
        policy: None leaves out a step whose first blocks add nearly what they added before, which depends on weights:
            with random ones that is never so, and all steps are computed. Otherwise one of cache-dit's own masks
            ("slow", "medium", "fast", "ultra": 18, 15, 11, 8 of 28 steps computed), whatever the weights say; for 8
            steps or more.
    """
    cache_dit = import_module("cache_dit")
    blocks = len(module.transformer_blocks) + len(module.single_transformer_blocks)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=min(FIRST_BLOCKS, blocks - 1),
        Bn_compute_blocks=0,
        residual_diff_threshold=THRESHOLD,
        max_warmup_steps=WARM_UP,
        num_inference_steps=steps,
    )
    if policy is not None:
        config.steps_computation_mask = cache_dit.steps_mask(mask_policy=policy, total_steps=steps)
        config.steps_computation_policy = "static"
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=ORDER)
    try:
        cache_dit.enable_cache(module, cache_config=config, calibrator_config=calibrator)
        yield CachedSteps(module, steps, cache_dit)
    finally:
        cache_dit.disable_cache(module)
        # What it leaves behind: a forward of its own, in the place of diffusers'.
        module.__dict__.pop("forward", None)
        module.__dict__.pop("_is_patched", None)
