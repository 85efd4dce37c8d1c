"""Black Forest Labs' own names for FLUX.1's layers, and diffusers' names for the same: of tensors, and of adapters.

There query, key and value are one matrix, in single blocks with the MLP's hidden layer too, and the last modulation has
shift before scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class DiffusersNames:
    """A transformer's tensors in Black Forest Labs' layout, by their names in diffusers' module."""

    def __init__(self, tensors: Callable[[str], Tensor], width: int) -> None:
        self.tensors = tensors
        self.width = width
        self.last: tuple[str, Tensor] | None = None
        """The joined matrix read last: its parts are asked for one after another."""

    def __call__(self, name: str) -> Tensor:
        layer, kind = name.rsplit(".", 1)
        stored, first, rows = bfl_name(layer, self.width)
        if rows is None or kind != "weight":
            return part_of(self.tensors(f"{stored}.{'scale' if '.norm.' in stored else kind}"), layer, self.width)
        if self.last is None or self.last[0] != stored:
            self.last = None
            self.last = (stored, self.tensors(f"{stored}.weight"))
        return self.last[1][first : first + rows].clone()


EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
DOUBLE_ROWS = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
}
SINGLE = {
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
    "proj_out": "linear2",
}
SINGLE_ROWS = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2, "proj_mlp": 3}


def bfl_name(layer: str, width: int) -> tuple[str, int, int | None]:
    """A layer of diffusers' module → its name in Black Forest Labs' layout, and which rows of that it is; None for all.

    Raises:
        KeyError: no layer of FLUX.1's transformer.
    """
    if layer in EMBEDDERS:
        return EMBEDDERS[layer], 0, None
    blocks, index, rest = layer.split(".", 2)
    if blocks == "transformer_blocks":
        block = f"double_blocks.{index}"
        if rest in DOUBLE_ROWS:
            joined, place = DOUBLE_ROWS[rest]
            return f"{block}.{joined}", place * width, width
        return f"{block}.{DOUBLE[rest]}", 0, None
    block = f"single_blocks.{index}"
    if rest in SINGLE_ROWS:
        place = SINGLE_ROWS[rest]
        return f"{block}.linear1", place * width, width if place < 3 else 4 * width
    return f"{block}.{SINGLE[rest]}", 0, None


def part_of(stored: Tensor, layer: str, width: int) -> Tensor:
    """The rows of a stored tensor that are a layer of diffusers' module."""
    if layer == "norm_out.linear":
        return torch.cat(stored.chunk(2)[::-1])
    _, first, rows = bfl_name(layer, width)
    return stored if rows is None else stored[first : first + rows]


ADAPTER = re.compile(
    r"(?:lora_unet_|(?:model\.|diffusion_model\.|base_model\.|transformer\.)*)"
    r"(?P<layer>(?:double|single)_blocks[._]\d+[._].+?|(?:img|txt)_in|(?:time|vector|guidance)_in[._]\w+"
    r"|final_layer[._].+?)\.(?:lora_(?P<half>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
"""A key of an adapter's file: which layer it is of, and which of its two factors, or their alpha. Kohya's trainer has
these names too, with underlines for dots."""


def is_adapter(keys: Iterable[str]) -> bool:
    """Whether the keys of an adapter's file are in this layout."""
    return any(ADAPTER.fullmatch(key) for key in keys)


def adapter(found: dict[str, Tensor], layers: Iterable[str], width: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An adapter in this layout → diffusers' state dict and its alphas; keys that nobody knows come through.

    The factor that reads is shared by all layers that are one matrix here, and the one that writes is theirs in turn.

    Args:
        layers: of diffusers' module, all of them.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    converted: dict[str, Tensor] = {}
    for key, tensor in found.items():
        match = ADAPTER.fullmatch(key)
        if match is None:
            converted[key] = tensor
        else:
            half = {"down": "A", "up": "B"}.get(match["half"], match["half"])
            halves.setdefault(match["layer"].replace(".", "_"), {})[half or "alpha"] = tensor
    alphas, used = dict[str, float](), set[str]()
    for layer in layers:
        stored = bfl_name(layer, width)[0].replace(".", "_")
        if stored not in halves:
            continue
        used.add(stored)
        name = f"transformer.{layer}"
        for half, tensor in halves[stored].items():
            if half == "alpha":
                alphas[f"{name}.alpha"] = float(tensor)
            else:
                converted[f"{name}.lora_{half}.weight"] = part_of(tensor, layer, width) if half == "B" else tensor
    for stored in halves.keys() - used:
        converted |= {f"{stored}.lora_{half}": tensor for half, tensor in halves[stored].items()}
    return converted, alphas
