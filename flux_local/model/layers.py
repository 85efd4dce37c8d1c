"""Matrix products with their weights: single layers, and several of the same input as one.

A layer remembers of which layers of diffusers' module it is made, so that what is said of those (an adapter, say) finds
its rows here. Knows nothing of where the layers stand in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model.ops import Activation

Weights = Callable[[str], Tensor]
"""A tensor by its name in diffusers' state dict, in the precision and on the device that it is to have."""

LinearGelu = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`ops.linear_gelu`."""

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

    def load(self, weight: Tensor, row: int = 0) -> None:
        """Other weights [rows, in] from a row on, in the same memory, so that what was recorded with it stays good."""
        self.weight[row : row + len(weight)].copy_(weight)

    def state(self) -> tuple[Tensor, ...]:
        """What `load` changes."""
        return (self.weight,)

    def restore(self, state: tuple[Tensor, ...]) -> None:
        """A copy of an earlier `state`, in the same memory."""
        for tensor, held in zip(self.state(), state, strict=True):
            tensor.copy_(held)

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)

    def into(self, out: Tensor, x: Activation) -> None:
        """Writes y to `out` [rows, out]; both of any row stride."""
        assert isinstance(x, Tensor)
        torch.addmm(self.bias, x, self.weight.t(), out=out)

    def gelu_into(self, out: Tensor, x: Activation, linear_gelu: LinearGelu) -> None:
        """Writes GELU(y) to `out` by one of the forms of `ops.linear_gelu`."""
        assert isinstance(x, Tensor)
        linear_gelu(x, self.weight, self.bias, out)

    def of_both(self, first: Tensor, second: Tensor) -> Tensor:
        """y of two inputs side by side, which are not brought together for that."""
        width = first.shape[1]
        y = F.linear(second, self.weight[:, width:], self.bias)
        return y.addmm_(first, self.weight[:, :width].t())

    def divided(self, outputs: int) -> tuple[Linear, Linear]:
        """The layers of the first so many outputs and of the others, with this one's memory."""
        weights, biases = (tensor.tensor_split([outputs]) for tensor in (self.weight, self.bias))
        first, rest = (replace(self, weight=w, bias=b, parts=()) for w, b in zip(weights, biases, strict=True))
        return first, rest


@dataclass(frozen=True)
class HostLinear(Linear):
    """One whose weight waits in host memory and crosses to the input's device in pieces, for layers that are rarely
    used and would take room that is short."""

    @classmethod
    def of(cls, linear: Linear, device: torch.device) -> HostLinear:
        """Pinned for a GPU; a weight that is already is not copied."""
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


def same(linear: Linear) -> Linear:
    return linear


class Layers:
    """The layers of a transformer, made of a module's tensors by diffusers' names.

    Args:
        convert: what becomes of each matrix product of the blocks as soon as it is read.
        host: the same tensors in host memory, if modulation is to stay there; then `device` is where its input is.
    """

    def __init__(
        self,
        weights: Weights,
        convert: Callable[[Linear], Linear] = same,
        host: Weights | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.weights, self.convert, self.host, self.device = weights, convert, host, device

    def linear(self, *names: str) -> Linear:
        """A layer, or several of the same input as one: their outputs side by side."""
        return joined(self.weights, *names)

    def block(self, *names: str) -> Linear:
        """As `linear`, of a transformer block."""
        return self.convert(joined(self.weights, *names))

    def modulation(self, *names: str) -> Linear:
        """As `linear`, of what is used once a picture."""
        if self.host is None:
            return joined(self.weights, *names)
        device = self.device or torch.device("cpu")
        return HostLinear.of(joined(self.host, *names, pinned=device.type == "cuda"), device)

    def mlp(self, name: str) -> Mlp:
        return Mlp(self.linear(f"{name}.linear_1"), self.linear(f"{name}.linear_2"))

    def norms(self, *names: str) -> Tensor:
        """[len(names), size]: the weights of several normalisations."""
        return torch.stack([self.weights(f"{name}.weight") for name in names])


def joined(weights: Weights, *names: str, pinned: bool = False) -> Linear:
    """Several layers of the same input as one: their outputs side by side. No more than one is held twice.

    Args:
        pinned: in host memory that a GPU may copy from by itself.
    """
    biases = [weights(f"{name}.bias") for name in names]
    parts = tuple((name, len(bias)) for name, bias in zip(names, biases, strict=True))
    weight = weights(f"{names[0]}.weight")
    if len(names) == 1 and not pinned:
        # On a CPU it may be a view of its file, which others see too; this one may be written to.
        return Linear(weight.clone() if weight.device.type == "cpu" else weight, biases[0], parts=parts)
    whole, at = weight.new_empty((sum(rows for _, rows in parts), weight.shape[1]), pin_memory=pinned), 0
    for name, rows in parts:
        whole[at : at + rows] = weights(f"{name}.weight")
        at += rows
    return Linear(whole, torch.cat(biases), parts=parts)
