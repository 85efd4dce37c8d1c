"""Matrix products with their weights: single layers, and several of the same input as one.

A layer remembers of which layers of diffusers' module it is made, so that what is said of those (an adapter, say) finds
its rows here. Knows nothing of where the layers stand in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model.ops import Activation

Weights = Callable[[str], Tensor]
"""A tensor by its name in diffusers' state dict, in the precision and on the device that it is to have."""

HOST_ROWS = 1 << 15
"""Outputs whose weights cross from host memory at a time: 200 MB in bf16 at FLUX.1's width."""


@dataclass(frozen=True)
class Linear:
    """y = x·Wᵀ + b. `weight` is [out, in].

    `parts`: the layers of diffusers' module that it is made of, by name, and how many outputs each of them has.
    """

    weight: Tensor
    bias: Tensor
    parts: tuple[tuple[str, int], ...] = field(default=(), kw_only=True)

    def load(self, weight: Tensor) -> None:
        """Another weight [out, in] in the same memory, so that what was recorded with it stays good."""
        self.weight.copy_(weight)

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def into(self, out: Tensor, x: Activation) -> None:
        """Writes y to `out` [rows, out]; both of any row stride."""
        assert isinstance(x, Tensor)
        torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass(frozen=True)
class HostLinear(Linear):
    """One whose weight waits in host memory and crosses to the input's device in pieces, for layers that are rarely
    used and would take room that is short."""

    @classmethod
    def of(cls, linear: Linear, device: torch.device) -> HostLinear:
        weight = linear.weight.cpu()
        return cls(weight.pin_memory() if device.type == "cuda" else weight, linear.bias.to(device), parts=linear.parts)

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        pieces = zip(self.weight.split(HOST_ROWS), self.bias.split(HOST_ROWS), strict=True)
        return torch.cat([F.linear(x, w.to(x.device, non_blocking=True), b) for w, b in pieces], dim=-1)

    def into(self, out: Tensor, x: Activation) -> None:
        out.copy_(self(x))


@dataclass(frozen=True)
class Mlp:
    """Two layers with SiLU between."""

    first: Linear
    second: Linear

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


def linear(weights: Weights, name: str) -> Linear:
    weight = weights(f"{name}.weight")
    return Linear(weight, weights(f"{name}.bias"), parts=((name, len(weight)),))


def joined(weights: Weights, *names: str) -> Linear:
    """Several layers of the same input as one: their outputs side by side."""
    layers = [linear(weights, name) for name in names]
    return Linear(
        torch.cat([layer.weight for layer in layers]),
        torch.cat([layer.bias for layer in layers]),
        parts=tuple(part for layer in layers for part in layer.parts),
    )


def mlp(weights: Weights, name: str) -> Mlp:
    return Mlp(linear(weights, f"{name}.linear_1"), linear(weights, f"{name}.linear_2"))
