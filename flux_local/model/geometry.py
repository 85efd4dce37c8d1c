"""A FLUX transformer's shape in numbers. Knows neither tensors nor layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """The numbers that make one FLUX transformer different from another."""

    heads: int
    head_size: int
    double_blocks: int
    single_blocks: int
    guided: bool
    rotary_axes: tuple[int, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Geometry:
        """From the `config.json` of a `FluxTransformer2DModel`."""
        return cls(
            config["num_attention_heads"], config["attention_head_dim"], config["num_layers"],
            config["num_single_layers"], config["guidance_embeds"], tuple(config["axes_dims_rope"]),
        )  # fmt: skip

    @property
    def width(self) -> int:
        return self.heads * self.head_size
