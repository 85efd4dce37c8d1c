"""CLIP's text encoder: what transformers' `CLIPTextModel` computes, with tensors of its names.

transformers' own classes bring seconds of imports with them. Knows nothing of prompts, nor of where weights wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIGHEST = 2
"""An `eos_token_id` that old configurations have wrongly: the end is the highest token number then."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D], each token from those up to itself."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, between: int, quick: bool) -> None:
        super().__init__()
        self.quick = quick
        self.fc1, self.fc2 = nn.Linear(width, between), nn.Linear(between, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        out: Tensor = self.fc2(y * torch.sigmoid(1.702 * y) if self.quick else F.gelu(y))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, between: int, quick: bool, epsilon: float) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, epsilon), nn.LayerNorm(width, epsilon)
        self.self_attn, self.mlp = Attention(width, heads), Mlp(width, between, quick)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class ClipEncoder(nn.Module):
    """CLIP's text half (arXiv 2103.00020, section 2.4) without its projection.

    Args:
        config: transformers' `CLIPTextConfig` as it is written down.

    Raises:
        KeyError, ValueError: the configuration lacks something, or asks for another activation.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, epsilon = config["hidden_size"], config.get("layer_norm_eps", 1e-5)
        activation = config.get("hidden_act", "quick_gelu")
        if activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"a text encoder with {activation}")
        self.end: int = config.get("eos_token_id", HIGHEST)
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config["vocab_size"], width),
                "position_embedding": nn.Embedding(config["max_position_embeddings"], width),
            }
        )
        shape = width, config["num_attention_heads"], config["intermediate_size"], activation == "quick_gelu", epsilon
        layers = nn.ModuleList([Layer(*shape) for _ in range(config["num_hidden_layers"])])
        self.encoder = nn.ModuleDict({"layers": layers})
        self.walk = tuple(layers)
        self.final_layer_norm = nn.LayerNorm(width, epsilon)

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers [1, L] → the last state of the token that ends the prompt, [1, D]."""
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](places)
        for layer in self.walk:
            x = layer(x)
        ends = ids if self.end == HIGHEST else (ids == self.end).int()
        at = ends.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[2])
        pooled: Tensor = self.final_layer_norm(x).gather(1, at)[:, 0]
        return pooled
