"""LoRA adapters, merged into a transformer's weights in place and taken out again without a trace.

A layer with adapters has the weight base + Σ scale · up · down, computed in fp32 and rounded once, in the memory that
it had before: recorded graphs stay good, and fp8 layers are quantised anew from the sum. The base is never computed
back but loaded again, so that nothing drifts; what a layer held lately is kept where the device has room, so that
going back costs a copy. Key layouts are told apart here: Black Forest Labs' own and Kohya's, which has the same names
(`bfl`); diffusers' names as several trainers write them (`lora_names`); all else diffusers converts.
Knows nothing of where adapters are kept or who may use them.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_local.errors import InvalidValue
from flux_local.model import bfl, lora_names, memory
from flux_local.model.layers import HostLinear, Linear, Weights
from flux_local.model.transformer import FluxTransformer

KEPT = 8
"""Adapters, and sets of them for each layer, that are kept in memory beyond their use."""
KEPT_BYTES = 2 << 30
"""Of host memory, that adapters may take beyond their use: one of rank 128 for all layers has as much."""
STATED = "lora_adapter_metadata"
"""Where diffusers and PEFT write into a file's metadata how strong it is."""

One = tuple[str, float, int]
"""An adapter's path, its scale, and a number that is another when the file has changed."""
Choice = tuple[One, ...]

log = logging.getLogger("flux_local.lora")


@dataclass(frozen=True)
class Factors:
    """A layer's change: `up` [out, rank] · `down` [rank, in], in fp32."""

    up: Tensor
    down: Tensor


Adapter = dict[str, Factors]
"""By the names of layers in diffusers' module."""


class Adapters:
    """Brings transformers of one set of weights to the adapters asked for.

    Args:
        weights: the tensors that the transformers were made of.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.beat: Callable[[], None] = lambda: None
        """Called after each file, and each part of a layer: a change of adapters may take long, but not in silence."""
        self.bases: dict[str, Tensor] = {}
        self.merged: dict[int, Choice | None] = {}
        """What a layer has; None while it is changed, and if that went wrong."""
        self.read: OrderedDict[tuple[str, int], Adapter] = OrderedDict()
        self.held: OrderedDict[tuple[int, Choice], tuple[Tensor, ...]] = OrderedDict()
        """What a layer holds with a set of adapters, of those last used."""
        self.at: tuple[int, Choice] | None = None
        """The transformer last brought anywhere, and where to."""

    def forget(self) -> None:
        """Lets go what can be loaded and computed again."""
        self.bases.clear()
        self.held.clear()

    def use(self, transformer: FluxTransformer, choice: Choice) -> None:
        """Leaves the transformer with these adapters and no others; without effect where it has them.

        Raises:
            InvalidValue: a file that is no adapter for this model. The transformer is then as it was.
        """
        if self.at != (id(transformer), choice):
            self.bring(transformer, choice)

    @torch.inference_mode()
    def bring(self, transformer: FluxTransformer, choice: Choice) -> None:
        """`use`, where there is something to do."""
        chosen = [(one, self.adapter(one[0], one[2], transformer)) for one in choice if one[1]]
        self.at = None
        for linear in transformer.linears():
            names = {name for name, _ in linear.parts}
            acting = [(one, adapter) for one, adapter in chosen if not names.isdisjoint(adapter)]
            wanted = tuple(one for one, _ in acting)
            if self.merged.get(id(linear), ()) != wanted:
                self.merged[id(linear)] = None
                self.change(linear, wanted, acting)
                self.merged[id(linear)] = wanted
        self.at = (id(transformer), choice)

    def change(self, linear: Linear, wanted: Choice, acting: list[tuple[One, Adapter]]) -> None:
        """Brings a layer to what it holds with these adapters: out of what was kept, or computed part by part."""
        key = (id(linear), wanted)
        if key in self.held:
            self.held.move_to_end(key)
            linear.restore(self.held[key])
            self.beat()
            return
        row = 0
        for name, rows in linear.parts:
            linear.load(self.sum(name, acting), row)
            row += rows
            self.beat()
        if isinstance(linear, HostLinear) or not memory.has_room(linear.weight):
            return
        self.held[key] = tuple(tensor.clone() for tensor in linear.state())
        while len(self.held) > KEPT * len(self.merged):
            self.held.popitem(last=False)

    def sum(self, name: str, acting: list[tuple[One, Adapter]]) -> Tensor:
        """A part's base and what the adapters add to it."""
        base = self.base(name)
        found = [(scale, adapter[name]) for (_, scale, _), adapter in acting if name in adapter]
        if not found:
            return base
        total = base.float()
        if total is base:
            total = base.clone()
        for scale, factors in found:
            total.addmm_(factors.up.to(base.device), factors.down.to(base.device), alpha=scale)
        return total.to(base.dtype)

    def base(self, name: str) -> Tensor:
        """A part's weight without adapters; kept where the device has room for it."""
        if (kept := self.bases.get(name)) is not None:
            return kept
        base = self.weights(f"{name}.weight")
        if memory.has_room(base):
            self.bases[name] = base
        return base

    def adapter(self, path: str, version: int, transformer: FluxTransformer) -> Adapter:
        """The file's factors, checked against the transformer.

        Raises:
            InvalidValue: as `read`; or there is another file by now.
        """
        key = (path, version)
        if key not in self.read:
            found = read(path, shapes(transformer))
            if version_of(path) != version:
                raise refused(Path(path).stem, "its file has been changed or removed since the request came")
            self.read[key] = found
            self.beat()
        self.read.move_to_end(key)
        while len(self.read) > KEPT or (len(self.read) > 1 and sum(map(nbytes, self.read.values())) > KEPT_BYTES):
            self.read.popitem(last=False)
        return self.read[key]


def nbytes(adapter: Adapter) -> int:
    return sum(factors.up.nbytes + factors.down.nbytes for factors in adapter.values())


def version_of(path: str) -> int | None:
    """As `loras.located` has it; None if the file is gone."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def shapes(transformer: FluxTransformer) -> dict[str, tuple[int, int]]:
    """[out, in] of every layer that an adapter may change, by its name in diffusers' module."""
    return {name: (rows, linear.weight.shape[1]) for linear in transformer.linears() for name, rows in linear.parts}


def read(path: str, shapes: dict[str, tuple[int, int]]) -> Adapter:
    """A file in diffusers', PEFT's, OneTrainer's, Kohya's, XLabs' or Black Forest Labs' layout.

    Raises:
        InvalidValue: not safetensors, a layout that nobody knows, or layers that this model does not have.
    """
    from diffusers import FluxPipeline
    from safetensors import safe_open

    name = Path(path).stem
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get(STATED)
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if (of_peft := lora_names.is_peft(stored)) and (beside := Path(path).with_suffix(".json")).is_file():
            said = beside.read_text()
        stated = Stated.read(json.loads(said or "{}"))
    except Exception as error:  # a stranger's file: whatever a reader makes of it is about the file
        raise refused(name, f"it cannot be read ({type(error).__name__})") from error
    if of_peft and stated.alpha is None:
        raise refused(name, f"PEFT keeps its strength in adapter_config.json, which has to be beside it as {name}.json")
    stored = only_products(name, stored, stated)
    try:
        if bfl.is_adapter(stored):
            found, alphas = bfl.adapter(stored, shapes, shapes["x_embedder"][0])
        elif (plain := lora_names.plain(stored, shapes)) is not None:
            found, alphas = plain
        else:
            found, alphas = FluxPipeline.lora_state_dict(stored, return_alphas=True)
    except Exception as error:  # a stranger's file: whatever a reader makes of it is about the file
        raise refused(name, f"it cannot be read ({type(error).__name__})") from error
    adapter: Adapter = {}
    for layer, up, down in pairs(name, found):
        if layer not in shapes:
            raise refused(name, f"this model has no layer {layer}")
        if (
            up.ndim != 2
            or down.ndim != 2
            or (up.shape[0], down.shape[1]) != shapes[layer]
            or up.shape[1] != down.shape[0]
        ):
            raise refused(name, f"its {layer} is for another model")
        strength = stated.strength(layer, down.shape[0], (alphas or {}).get(f"transformer.{layer}.alpha"))
        # Copies: what safetensors gives are views of the file, which may be written over.
        adapter[layer] = Factors(up.float() * strength, down.to(torch.float32, copy=True))
        if not bool(torch.isfinite(adapter[layer].up).all() and torch.isfinite(adapter[layer].down).all()):
            raise refused(name, f"its {layer} holds values that are not finite")
    if not adapter:
        raise refused(name, "it changes nothing in the transformer")
    return adapter


@dataclass(frozen=True)
class Stated:
    """What a file's metadata say of its strength, or PEFT's configuration beside it: `lora_alpha`, `alpha_pattern`,
    `use_rslora`, `use_dora`."""

    alpha: float | None = None
    alphas: tuple[tuple[str, float], ...] = ()
    rooted: bool = False
    dora: bool = False

    @classmethod
    def read(cls, found: dict[str, Any]) -> Stated:
        own = {key.removeprefix("transformer."): value for key, value in found.items()}
        alpha, patterns = own.get("lora_alpha"), own.get("alpha_pattern") or {}
        return cls(
            None if alpha is None else float(alpha),
            tuple((str(layer), float(value)) for layer, value in patterns.items()),
            bool(own.get("use_rslora")),
            bool(own.get("use_dora")),
        )

    def strength(self, layer: str, rank: int, alpha: float | None) -> float:
        """What a layer's product is multiplied by. `alpha`: of the file's own tensors, which goes first."""
        if alpha is None:
            alpha = next((a for end, a in self.alphas if f".{layer}".endswith(f".{end}")), self.alpha)
        return 1.0 if alpha is None else float(alpha) / (rank**0.5 if self.rooted else rank)


def only_products(name: str, stored: dict[str, Tensor], stated: Stated) -> dict[str, Tensor]:
    """The tensors without changes of nothing. Some readers leave out what is more than a product of two factors.

    Raises:
        InvalidValue: it is.
    """
    if stated.dora or any("dora_scale" in key for key in stored):
        raise refused(name, "it is a DoRA, which changes more than a LoRA does")
    kept = {}
    for key, tensor in stored.items():
        if not key.endswith((".diff", ".diff_b")):
            kept[key] = tensor
        elif tensor.any():
            raise refused(name, f"it does more than a LoRA does: '{key[:80]}'")
    return kept


def pairs(name: str, found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Layer, up and down of each pair in diffusers' layout."""
    ignored = [key for key in found if key.startswith(lora_names.OF_TEXT)]
    if ignored:
        log.warning("the adapter %s has a part for the text encoder, which is not used", name)
    for key, down in found.items():
        if not key.startswith("transformer."):
            if key not in ignored:
                raise refused(name, f"nobody knows what its '{key[:80]}' is")
        elif key.endswith(".lora_A.weight"):
            layer = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
            up = found.get(f"transformer.{layer}.lora_B.weight")
            if up is None:
                raise refused(name, f"half of its {layer} is missing")
            yield layer, up, down
        elif not key.endswith(".lora_B.weight"):
            raise refused(name, f"it does more than a LoRA does: '{key[:80]}'")


def refused(name: str, why: str) -> InvalidValue:
    return InvalidValue(f"The adapter '{name}' cannot be used: {why}. Leave it out.", param="loras")
