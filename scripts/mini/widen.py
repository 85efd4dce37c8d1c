"""A narrower transformer's weights as the beginning of a wider one, which draws the same until it is trained.

After Net2Net (arXiv 1511.05641): what is new reads at random and writes nothing. New channels of the residual stream
are closed by their gates, new heads and hidden units by zeros where their outputs are read. A layer norm over more
channels of which the new ones are empty is larger by the root of their ratio; the modulation after it takes that back.
It is not exact, for the mean is taken over more channels, too: of the output's size, a hundredth is off.
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

# For each modulation, what its chunks are.
MODULATIONS = {
    "norm1.linear": ("shift", "scale", "gate", "shift", "scale", "gate"),
    "norm1_context.linear": ("shift", "scale", "gate", "shift", "scale", "gate"),
    "norm.linear": ("shift", "scale", "gate"),
    "norm_out.linear": ("scale", "shift"),
}
WRITERS = ("x_embedder", "context_embedder", "linear_2")
"""Layers whose output is added to the stream, or to the embedding of the modulations, with no gate before."""
READ_LAST = ("to_out.0", "to_add_out", "ff.net.2", "ff_context.net.2", "proj_out", "linear_2")
"""Layers whose input is heads, hidden units or the stream's last state: what is new of it is not read yet."""


@torch.no_grad()
def widened(narrow: FluxTransformer2DModel, wide: FluxTransformer2DModel) -> dict[str, Tensor]:
    """`wide`'s state with the weights of `narrow` in it: as many blocks, heads of the same size, more of them."""
    old, new = (model.config.num_attention_heads * model.config.attention_head_dim for model in (narrow, wide))
    found = {name: value.clone() for name, value in wide.state_dict().items()}
    for name, value in narrow.state_dict().items():
        layer, _, kind = name.rpartition(".")
        chunks = next((c for end, c in MODULATIONS.items() if layer == end or layer.endswith("." + end)), None)
        if chunks is not None:
            found[name] = modulation(value, found[name], chunks, old, new)
            continue
        target = found[name]
        if kind == "weight" and value.ndim == 2 and layer.endswith(READ_LAST):
            target.zero_()
        elif layer.endswith(WRITERS):
            target[value.shape[0] :] = 0
        if layer.startswith("single") and layer.endswith("proj_out") and kind == "weight":
            target[: value.shape[0], :old] = value[:, :old]  # attention's heads, then the hidden units
            target[: value.shape[0], new : new + 4 * old] = value[:, old:]
        else:
            target[tuple(slice(size) for size in value.shape)] = value
        if layer.endswith(WRITERS) and kind == "weight":
            target[value.shape[0] :] = 0
    return found


def modulation(value: Tensor, target: Tensor, chunks: tuple[str, ...], old: int, new: int) -> Tensor:
    """One modulation's weight or bias: a part for each chunk, the new channels of each empty."""
    shrunk = (old / new) ** 0.5
    parts = []
    for chunk, before, after in zip(chunks, value.chunk(len(chunks)), target.chunk(len(chunks)), strict=True):
        part = torch.zeros_like(after)
        if value.ndim == 2:
            torch.nn.init.normal_(part[:old, old:], std=0.02)
            part[:old, :old] = before
        else:
            part[:old] = before
        if chunk == "scale":
            part[:old] *= shrunk
            if value.ndim == 1:
                part += shrunk - 1
        parts.append(part)
    return torch.cat(parts)
