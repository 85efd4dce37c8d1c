"""T5's encoder: what transformers' `T5EncoderModel` computes, with tensors of its names, as fast as a GPU allows.

transformers' own classes bring seconds of imports with them, and their pass takes several times as long as its matrix
products: before 5.23 its bias lies in memory as no fused attention takes it, so that torch goes through scores in fp32,
and norms and GELU are several operations each. Knows nothing of prompts, nor of where weights wait.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux_local.model import memory

ALIGNED = 8
"""Of so many numbers a row of the bias is a multiple in memory, as `efficient_attention` wants it."""
TOLERANCE = 0.1
"""Largest ‖fused − torch's‖ / ‖torch's‖: both are a few hundredths off in bf16, a wrong one is wholly."""

log = logging.getLogger("flux_local.t5")

Fused = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query, key and value [1, heads, L, size] with a bias [1, heads, L, L] → softmax(q·kᵀ + bias)·v of the same shape."""


def torch_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    return out


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """xFormers' memory-efficient attention as torch brings it: the one that takes a bias on every GPU with bf16."""
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=1.0)[0]
    return out


class Attention(nn.Module):
    """Scores are not scaled but shifted by a number of their head and distance, the same in every layer."""

    def __init__(self, width: int, heads: int, size: int, buckets: int | None, furthest: int) -> None:
        super().__init__()
        self.heads, self.furthest = heads, furthest
        self.q, self.k, self.v = (nn.Linear(width, heads * size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * size, width, bias=False)
        if buckets is not None:  # the first layer's are for all
            self.relative_attention_bias = nn.Embedding(buckets, heads)

    def forward(self, x: Tensor, bias: Tensor, attention: Fused) -> Tensor:
        """[1, L, D]."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        out: Tensor = self.o(attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return out

    def bias(self, length: int, device: torch.device) -> Tensor:
        """[1, heads, L, L], rows contiguous and `ALIGNED`."""
        table = self.relative_attention_bias
        places = torch.arange(length, device=device)
        values = table(bucket(places - places[:, None], table.num_embeddings, self.furthest)).permute(2, 0, 1)[None]
        out: Tensor = values.new_zeros(*values.shape[:3], -(-length // ALIGNED) * ALIGNED)[..., :length]
        return out.copy_(values)


def bucket(distance: Tensor, buckets: int, furthest: int) -> Tensor:
    """Distances → numbers of their buckets: a half for each direction, of which half are one distance each and the
    others grow with the logarithm up to the furthest."""
    half = buckets // 2
    exact, away = half // 2, distance.abs()
    far = exact + (torch.log(away.float() / exact) / math.log(furthest / exact) * (half - exact)).long()
    return (distance > 0).long() * half + torch.where(away < exact, away, far.clamp(max=half - 1))


class Mlp(nn.Module):
    """With a gated GELU (arXiv 2002.05202)."""

    def __init__(self, width: int, between: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(width, between, bias=False) for _ in range(2))
        self.wo = nn.Linear(between, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))
        return out


class Part(nn.Module):
    """A norm and what follows it; the two in a block have other names for the latter."""

    def __init__(self, name: str, part: nn.Module, width: int, epsilon: float) -> None:
        super().__init__()
        self.name = name
        self.layer_norm = nn.RMSNorm(width, epsilon)
        setattr(self, name, part)

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        out: Tensor = x + getattr(self, self.name)(self.layer_norm(x), *more)
        return out


class Block(nn.Module):
    def __init__(self, *parts: Part) -> None:
        super().__init__()
        self.layer = nn.ModuleList(parts)


class Stack(nn.Module):
    def __init__(self, blocks: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.block, self.final_layer_norm = blocks, norm


class T5Encoder(nn.Module):
    """T5 1.1 (arXiv 1910.10683, section 2.1), for one prompt at a time. Norms have no mean, products no bias.

    Args:
        config: transformers' `T5Config` as it is written down.

    Raises:
        KeyError, ValueError: the configuration lacks something, or is of another T5.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if (kind := config.get("feed_forward_proj")) != "gated-gelu":
            raise ValueError(f"a T5 with {kind}")
        width, epsilon = config["d_model"], config.get("layer_norm_epsilon", 1e-6)
        buckets = config.get("relative_attention_num_buckets", 32)
        furthest = config.get("relative_attention_max_distance", 128)

        heads, size, count = config["num_heads"], config["d_kv"], config["num_layers"]
        mixing = [Attention(width, heads, size, None if i else buckets, furthest) for i in range(count)]
        self.parts = tuple(
            (
                Part("SelfAttention", mixed, width, epsilon),
                Part("DenseReluDense", Mlp(width, config["d_ff"]), width, epsilon),
            )
            for mixed in mixing
        )
        self.mixing = tuple(mixing)
        self.shared = nn.Embedding(config["vocab_size"], width)
        self.encoder = Stack(nn.ModuleList([Block(*parts) for parts in self.parts]), nn.RMSNorm(width, epsilon))

    def forward(self, ids: Tensor, attention: Fused = torch_attention) -> Tensor:
        """Token numbers [1, L] → last hidden states [1, L, D]."""
        x = self.shared(ids)
        bias = self.mixing[0].bias(ids.shape[1], ids.device)
        for mixing, feeding in self.parts:
            x = feeding(mixing(x, bias, attention))
        out: Tensor = self.encoder.final_layer_norm(x)
        return out


@torch.inference_mode()
def fastest(
    module: T5Encoder, length: int, device: torch.device, attention: Fused = efficient_attention
) -> Callable[[Tensor], Tensor]:
    """Token numbers [1, L] → states: with the fused attention, if it gives what torch's gives there, else with that.

    Args:
        length: tokens to try both with.
    """

    def fused(ids: Tensor) -> Tensor:
        states: Tensor = module(ids, attention)
        return states

    ids = torch.arange(length, device=device)[None] % module.shared.num_embeddings
    expected = module(ids).float()
    try:
        off = float((fused(ids).float() - expected).norm() / expected.norm())
    except Exception as error:  # a GPU without such a kernel
        if memory.is_exhausted(error):
            raise
        log.warning("T5 runs with torch's attention: %s", str(error).partition("\n")[0])
        return module
    if not off <= TOLERANCE:
        log.warning("T5 runs with torch's attention: the fused one is off by %.1e here", off)
        return module
    return fused
