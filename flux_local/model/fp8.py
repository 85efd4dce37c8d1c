"""fp8 (e4m3) for the blocks' matrix products: weights with a scale an output, activations with a scale a row.

Both scales come from the numbers themselves, so that nothing is calibrated and the same request gives the same bytes
after a restart; a row's scale depends on that row alone, so that company changes nothing. Embedders, modulation and the
last layer stay as they are: they are few operations, and errors there reach every pixel. Where the device has no fp8
product the same rounding is emulated in the model's own precision: slower, but the same kind of picture.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from flux_local.model.layers import Linear, LinearGelu
from flux_local.model.ops import Activation, Ops, Rows, quantised
from flux_local.model.transformer import FluxTransformer

ADA = (8, 9)
"""CUDA capability from which there are fp8 products."""
MENDED_FOR_ADA = (2, 12)
"""The torch from which on they run there on the stream that is current; before, they wait for another, in vain (pytorch
issue 177651)."""
PRODUCT_TOLERANCE = 3e-2
"""Relative, of a product in fp8 against the emulation, which rounds to bf16 before it multiplies. Fast accumulation
costs more than that: up to 2% of a number in sums of 4096 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""
PRODUCTS = ((77, 512, 256), (512, 21504, 3072), (1541, 21504, 3072), (4096, 3072, 15360))
"""Rows, outputs and inputs that are tried: libraries take other code for other shapes."""
ROWS_ROUNDED = 1024
"""At a time, by the emulation."""

log = logging.getLogger("flux_local.fp8")


def rounded(rows: Tensor) -> Tensor:
    """[rows, N] as fp8 would have them, in their own dtype; some at a time, since they are in fp32 on the way."""
    out = torch.empty_like(rows)
    for piece, into in zip(rows.split(ROWS_ROUNDED), out.split(ROWS_ROUNDED), strict=True):
        values, scale = quantised(piece)
        into.copy_(values.float() * scale)
    return out


@dataclass(frozen=True)
class Fp8Linear(Linear):
    """`weight` is e4m3 [out, in]; `scale` [1, out] fp32."""

    scale: Tensor
    quantise: Callable[[Tensor], Rows]
    """For what does not come in fp8 yet."""

    @classmethod
    def of(cls, linear: Linear, quantise: Callable[[Tensor], Rows] = quantised) -> Fp8Linear:
        values, scale = quantised(linear.weight)
        return cls(values, linear.bias, scale.t().contiguous(), quantise, parts=linear.parts)

    def load(self, weight: Tensor, row: int = 0) -> None:
        values, scale = quantised(weight)
        self.weight[row : row + len(weight)].copy_(values)
        self.scale[:, row : row + len(weight)].copy_(scale.t())

    def state(self) -> tuple[Tensor, ...]:
        return (self.weight, self.scale)

    def __call__(self, x: Activation) -> Tensor:
        values, scale = x if isinstance(x, Rows) else self.quantise(x)
        return torch._scaled_mm(
            values, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=self.bias.dtype, use_fast_accum=True
        )

    def into(self, out: Tensor, x: Activation) -> None:
        values, scale = x if isinstance(x, Rows) else self.quantise(x)
        torch._scaled_mm(
            values, self.weight.t(), scale, self.scale, bias=self.bias, out_dtype=out.dtype, use_fast_accum=True,
            out=out,
        )  # fmt: skip


@dataclass(frozen=True)
class RoundedLinear(Linear):
    """The emulation: a weight that holds what fp8 would, and rows rounded on their way in."""

    @classmethod
    def of(cls, linear: Linear) -> RoundedLinear:
        return cls(rounded(linear.weight), linear.bias, parts=linear.parts)

    def load(self, weight: Tensor, row: int = 0) -> None:
        super().load(rounded(weight), row)

    def __call__(self, x: Activation) -> Tensor:
        assert isinstance(x, Tensor)
        return super().__call__(rounded(x))

    def into(self, out: Tensor, x: Activation) -> None:
        assert isinstance(x, Tensor)
        super().into(out, rounded(x))

    def gelu_into(self, out: Tensor, x: Activation, linear_gelu: LinearGelu) -> None:
        assert isinstance(x, Tensor)
        super().gelu_into(out, rounded(x), linear_gelu)

    def of_both(self, first: Tensor, second: Tensor) -> Tensor:
        return self(torch.cat([first, second], dim=1))


def conversion(device: torch.device, ops: Ops, native: bool | None = None) -> tuple[Callable[[Linear], Linear], bool]:
    """How a matrix product gets into fp8 on a device, and whether it then takes fp8 rows.

    Args:
        native: with products in fp8, or with the emulation; as the device can, if not said.
    """
    if native is None:
        native = has_products(device)
    return (partial(Fp8Linear.of, quantise=ops.quantised), True) if native else (RoundedLinear.of, False)


def has_products(device: torch.device | str) -> bool:
    """Whether a device has matrix products in fp8, and they are right. Tried once."""
    device = torch.device(device)
    if device.type != "cuda":
        return False
    return tried(torch.cuda.current_device() if device.index is None else device.index)


@cache
def tried(index: int) -> bool:
    """As `has_products`, of the GPU of that index."""
    capability = torch.cuda.get_device_capability(index)
    if capability == ADA and torch_version() < MENDED_FOR_ADA:
        log.warning("products in fp8 hang on this card with torch %s and are emulated; update it", torch.__version__)
        return False
    return capability >= ADA and agrees(torch.device("cuda", index))


def torch_version() -> tuple[int, ...]:
    return tuple(map(int, torch.__version__.split(".")[:2]))


def agrees(device: torch.device) -> bool:
    """Whether a product in fp8 gives there what the emulation gives."""
    for rows, outputs, inputs in PRODUCTS:
        try:
            off = product_error(rows, outputs, inputs, device)
        except RuntimeError as error:
            log.warning("products in fp8 fail here and are emulated: %s", error)
            return False
        if not off <= PRODUCT_TOLERANCE:
            log.warning("products in fp8 are off by %.1e here and are emulated", off)
            return False
    return True


def product_error(rows: int, outputs: int, inputs: int, device: torch.device) -> float:
    """‖fp8 − emulated‖ / ‖emulated‖ of a layer with a bias as large as its products, in place among other rows."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    linear, x = Linear(random(outputs, inputs), inputs**0.5 * random(outputs)), random(rows, inputs)
    expected = RoundedLinear.of(linear)(x).float()
    whole = random(rows + 16, outputs)
    Fp8Linear.of(linear).into(whole[16:], x)
    return float((whole[16:].float() - expected).norm() / expected.norm())


def in_fp8(transformer: FluxTransformer, native: bool | None = None, attention: bool = False) -> FluxTransformer:
    """The same transformer with its blocks in fp8 (see `conversion`); everything else is shared with the given one.

    Args:
        attention: in fp8 too.
    """
    return transformer.with_blocks(*conversion(transformer.device, transformer.ops, native), attention)


class Fp8Storage(torch.nn.Module):
    """A layer of a module that is not ours, kept in e4m3 with a scale an output and unpacked for each use.

    For text encoders where memory is short: they run once a prompt, so that time matters little.
    """

    def __init__(self, linear: torch.nn.Linear, device: str) -> None:
        super().__init__()
        self.values: Tensor
        self.scale: Tensor
        for name, tensor in zip(("values", "scale"), quantised(linear.weight.detach().to(device)), strict=True):
            self.register_buffer(name, tensor)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, (self.values.float() * self.scale).to(self.dtype), self.bias)


def store_in_fp8(module: torch.nn.Module, device: str) -> None:
    """Has every linear layer of a module keep its weight in fp8 on a device, to which each goes by itself."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, Fp8Storage(child, device))
