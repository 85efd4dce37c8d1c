"""What the GPU proof builds and measures: FLUX.1 as it is, or a toy of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flux_local.model.flux1 import TRANSFORMER

LATENTS = {
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Configurations for diffusers' and transformers' classes, and the sizes at which they are run."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    t5: dict[str, Any]
    text: int
    """T5 tokens."""
    sides: tuple[int, ...]
    """Square canvases in pixels, the largest first."""
    batches: tuple[int, ...]
    steps: int
    ceiling: int
    """Side of the square matmul that stands for the card's limit."""


REAL = Scale(
    transformer=TRANSFORMER,
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32, **LATENTS},
    t5={"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64},
    text=512,
    sides=(1024, 768, 512),
    batches=(1, 2, 4),
    steps=28,
    ceiling=8192,
)
SMALL = Scale(
    transformer=TRANSFORMER | {
        "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
    },
    vae={"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, **LATENTS},
    t5={"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16},
    text=8,
    sides=(64, 48),
    batches=(1, 2),
    steps=3,
    ceiling=128,
)  # fmt: skip
