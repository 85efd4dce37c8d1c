"""The parts of a checkpoint that are modules: both text encoders, the autoencoder, and for comparison diffusers' own
transformer. Each is made without memory and takes its tensors as they are read.

Knows nothing of how they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from flux_local.errors import FETCH_AGAIN, FluxError, StartError, WeightsError
from flux_local.model import memory
from flux_local.model.autoencoder import AutoencoderKL
from flux_local.model.checkpoint import Checkpoint, Component
from flux_local.model.clip import ClipEncoder
from flux_local.model.fp8 import store_in_fp8
from flux_local.model.layers import Weights
from flux_local.model.memory import Plan
from flux_local.model.t5 import T5Encoder
from flux_local.model.tensors import Tensors
from flux_local.model.text import PromptEncoder
from flux_local.model.tokens import clip_words, t5_words

NO_ROOM = (
    "The device's memory did not suffice. Free some, or name a way that takes less with --memory: "
    + ", ".join(memory.TIERS)
    + "."
)
M = TypeVar("M", bound=torch.nn.Module)


def prompt_encoder(
    checkpoint: Checkpoint, device: str, dtype: torch.dtype, plan: Plan, text_length: int | None = None
) -> PromptEncoder:
    """Both text encoders where the plan has them: on the device, T5 there in fp8, or in host memory.

    Args:
        text_length: tokens at most for T5; its tokenizer's own limit holds too.
    """
    in_host = plan.tier in ("swap", "offload")

    def encoder(make: Callable[[Mapping[str, Any]], M], component: Component, renamed: Callable[[str], str]) -> M:
        packed = plan.tier == "fp8" and component == "text_encoder_2"
        tensors = Tensors(checkpoint.parts[component], "cpu" if in_host or packed else device, dtype)
        with translated(checkpoint.parts[component].headers[0].path.parent):
            module = built(make, checkpoint.config(component), tensors, renamed)
        if in_host:
            bring_in_groups(module, device, plan.pinned)
        elif packed:
            store_in_fp8(module, device)
            module = module.to(device)
        return module

    clip = encoder(ClipEncoder, "text_encoder", lambda name: name.removeprefix("text_model."))
    t5 = encoder(T5Encoder, "text_encoder_2", lambda name: name.replace("encoder.embed_tokens", "shared"))
    with translated(folder := checkpoint.home / "tokenizer"):
        words = clip_words(folder)
    with translated(folder := checkpoint.home / "tokenizer_2"):
        words_2 = t5_words(folder)
        words_2.max_length = min(words_2.max_length, text_length or words_2.max_length)
    with translated(checkpoint.path):
        return PromptEncoder(words, words_2, clip, t5, device, hooked=in_host, packed=plan.tier == "fp8")


def autoencoder(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder with the checkpoint's tensors."""
    part, config = checkpoint.parts["vae"], checkpoint.config("vae")
    tensors: Named = Tensors(part, device, dtype)
    if part.layout == "bfl":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = Held(convert_ldm_vae_checkpoint({name: tensors(name) for name in tensors.names()}, config))
    return built(AutoencoderKL, config, tensors)


class Named(Protocol):
    """Tensors by name, that can be listed: of a file, or `Held`."""

    def names(self) -> list[str]: ...

    def __call__(self, name: str, /) -> Tensor: ...


class Held(dict[str, Tensor]):
    def names(self) -> list[str]:
        return list(self)

    def __call__(self, name: str) -> Tensor:
        return self[name]


class Unfilled(TorchFunctionMode):
    """New modules' tensors stay as they are: without memory, nothing can be drawn for them, and torch would import its
    compiler to do so, a second's work."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == torch.nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def built(
    make: Callable[[Mapping[str, Any]], M],
    config: Mapping[str, Any],
    tensors: Named,
    renamed: Callable[[str], str] = str,
) -> M:
    """A module with the tensors that it has names for; others are passed over.

    Args:
        renamed: a tensor's name in its file → the module's.

    Raises:
        WeightsError: one is missing.
    """
    with torch.device("meta"), Unfilled():
        module = make(config)
    there = {renamed(name): name for name in tensors.names()}
    state = {name: tensors(there.get(name, name)) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def reference_module(checkpoint: Checkpoint, weights: Weights, pinned: bool = False) -> Any:
    """diffusers' own module with these tensors.

    Args:
        pinned: in memory that a GPU may copy by itself. diffusers' hooks do that too, but for all blocks before they
            let go the first one's own.
    """
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        module = FluxTransformer2DModel.from_config(checkpoint.config("transformer"))
    state = {name: weights(name).pin_memory() if pinned else weights(name) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def bring_in_groups(module: Any, device: str, pinned: bool, blocks: bool = False) -> None:
    """Has diffusers' hooks bring a module's weights from host memory, the next group while one is at work.

    Args:
        pinned: whether they wait where the GPU may copy them by itself; else each is brought there first.
        blocks: a transformer block at a time, instead of a layer.
    """
    from diffusers.hooks import apply_group_offloading

    size: dict[str, Any] = (
        {"offload_type": "block_level", "num_blocks_per_group": 1} if blocks else {"offload_type": "leaf_level"}
    )
    apply_group_offloading(
        module, onload_device=torch.device(device), offload_device=torch.device("cpu"),
        use_stream=device.startswith("cuda"), low_cpu_mem_usage=not pinned, **size,
    )  # fmt: skip


class translated:
    """Turns what a foreign loader raises into a `WeightsError` that names the component."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FluxError):
            return
        if error is not None and memory.is_exhausted(error):
            raise StartError(NO_ROOM) from error
        if error is not None and memory.is_fatal(error):
            raise StartError(f"The device failed while loading: {str(error).splitlines()[0]}") from error
        if isinstance(error, (OSError, ValueError, RuntimeError, KeyError)) or (
            error is not None and type(error).__name__ == "SafetensorError"
        ):
            raise WeightsError(f"Cannot load {self.path}: {type(error).__name__}. {FETCH_AGAIN}") from error
