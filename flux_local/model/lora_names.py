"""Keys of an adapter's file that say diffusers' names for layers, however a trainer wrote them around and between.

diffusers itself reads its own form alone. Here are the others: OneTrainer's, with underlines for dots; PEFT's, with
what PEFT wraps a model in; names with another prefix or none; an alpha beside them. Knows nothing of what layers do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

KEY = re.compile(
    r"(?:lora_transformer_|lora_unet_|(?:base_model\.|model\.|diffusion_model\.|transformer\.)*)"
    r"(?P<layer>.+)\.(?:lora_(?P<half>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
HALVES = {"down": "A", "up": "B"}
OF_TEXT = ("text_encoder", "lora_te")
"""How keys of a text encoder's part begin."""


def is_peft(keys: Iterable[str]) -> bool:
    """Whether PEFT wrote it by itself, and how strong it is into another file; a trainer that is like it has alphas."""
    keys = [*keys]
    wrapped = any(key.startswith("base_model.") and "transformer_blocks." in key for key in keys)
    return wrapped and not any(key.endswith(".alpha") for key in keys)


def plain(stored: dict[str, Tensor], layers: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """The file as diffusers' state dict and its alphas; None if it has anything else for the transformer.

    Args:
        layers: of diffusers' module, all of them.
    """
    known = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in stored.items():
        if key.startswith(OF_TEXT):
            found[key] = tensor
            continue
        match = KEY.fullmatch(key)
        if match is None or (layer := known.get(match["layer"].replace(".", "_"))) is None:
            return None
        if match["alpha"]:
            alphas[f"transformer.{layer}.alpha"] = float(tensor)
        else:
            found[f"transformer.{layer}.lora_{HALVES.get(match['half'], match['half'])}.weight"] = tensor
    return found, alphas
