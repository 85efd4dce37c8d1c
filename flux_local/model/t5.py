"""T5's encoder as a GPU computes it fastest, with the layers of transformers' module, whatever form their weights have.

transformers' own pass takes several times as long as its matrix products: before 5.23 its bias lies in memory as no
fused attention takes it, so that torch goes through scores in fp32, and norms and GELU are several operations each.
Knows nothing of prompts, nor of where weights wait.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model import memory

ALIGNED = 8
"""Of so many numbers a row of the bias is a multiple in memory, as `efficient_attention` wants it."""
TOLERANCE = 0.1
"""Largest ‖ours − transformers'‖ / ‖transformers'‖: both are a few hundredths off in bf16, a wrong pass is wholly."""

log = logging.getLogger("flux_local.t5")

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Query, key and value [1, heads, L, size] with a bias [1, heads, L, L] → softmax(q·kᵀ + bias)·v of the same shape."""


def efficient_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """xFormers' memory-efficient attention as torch brings it: the one that takes a bias on every GPU with bf16."""
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=1.0)[0]
    return out


class T5Encoder:
    """T5 1.1 (arXiv 1910.10683, section 2.1, with the gated GELU of arXiv 2002.05202), for one prompt at a time.

    Norms have no mean, products no bias, and scores are not scaled but shifted by a number of their head and distance,
    the same in every layer.

    Args:
        module: transformers' `T5EncoderModel`.
    """

    def __init__(self, module: Any, attention: Attention = efficient_attention) -> None:
        self.stack = module.encoder
        self.attention = attention

    def __call__(self, ids: Tensor) -> Tensor:
        """Token numbers [1, L] → last hidden states [1, L, D]."""
        x = self.stack.embed_tokens(ids)
        bias = self.bias(ids.shape[1])
        for block in self.stack.block:
            mixing, feeding = block.layer
            x = x + self.mixed(mixing.SelfAttention, normed(mixing.layer_norm, x), bias)
            mlp, y = feeding.DenseReluDense, normed(feeding.layer_norm, x)
            x = x + mlp.wo(F.gelu(mlp.wi_0(y), approximate="tanh") * mlp.wi_1(y))
        return normed(self.stack.final_layer_norm, x)

    def bias(self, length: int) -> Tensor:
        """[1, heads, L, L], rows contiguous and `ALIGNED`."""
        values: Tensor = self.stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
        return values.new_zeros(*values.shape[:3], -(-length // ALIGNED) * ALIGNED)[..., :length].copy_(values)

    def mixed(self, layer: Any, x: Tensor, bias: Tensor) -> Tensor:
        """What tokens [1, L, D] tell each other."""
        q, k, v = (
            linear(x).unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for linear in (layer.q, layer.k, layer.v)
        )
        out: Tensor = layer.o(self.attention(q, k, v, bias).transpose(1, 2).flatten(2))
        return out


def normed(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.inference_mode()
def fastest(
    module: Any, length: int, device: torch.device, attention: Attention = efficient_attention
) -> Callable[[Tensor], Tensor]:
    """Token numbers [1, L] → states: by `T5Encoder`, if it gives there what the module itself gives, else by that.

    Args:
        length: tokens to try both with.
    """

    def theirs(ids: Tensor) -> Tensor:
        states: Tensor = module(ids).last_hidden_state
        return states

    ours = T5Encoder(module, attention)
    ids = torch.arange(length, device=device)[None] % module.config.vocab_size
    expected = theirs(ids).float()
    try:
        off = float((ours(ids).float() - expected).norm() / expected.norm())
    except Exception as error:  # another transformers, or a GPU without such a kernel
        if memory.is_exhausted(error):
            raise
        log.warning("T5 runs as transformers has it: %s", str(error).partition("\n")[0])
        return theirs
    if not off <= TOLERANCE:
        log.warning("T5 runs as transformers has it: ours is off by %.1e here", off)
        return theirs
    return ours
