"""A model on disk, in any of its forms → a `Pipeline` ready to draw. Never a pickle, never the network."""

from __future__ import annotations

import logging
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flux_local.errors import NotAvailable, StartError
from flux_local.model import memory, prepared
from flux_local.model.bfl import DiffusersNames
from flux_local.model.checkpoint import Checkpoint, Part, identify
from flux_local.model.denoiser import Denoiser, Keep, Picture, noised
from flux_local.model.fp8 import conversion, has_products, in_fp8
from flux_local.model.fp8_attention import ADVICE
from flux_local.model.geometry import Geometry
from flux_local.model.latents import initial_noise
from flux_local.model.layers import Layers, Weights
from flux_local.model.lora import Adapters, Choice
from flux_local.model.memory import Plan, Precisions, Tier
from flux_local.model.ops import Ops
from flux_local.model.parts import autoencoder, bring_in_groups, prompt_encoder, reference_module, translated
from flux_local.model.prepared import PreparedLayers, Target
from flux_local.model.reference import ReferenceTransformer
from flux_local.model.schedule import FlowSchedule
from flux_local.model.selfcheck import TRIAL, Sizes, accelerated, with_fp8_attention
from flux_local.model.tensors import Tensors
from flux_local.model.text import PromptCache, PromptEmbedding, PromptEncoder
from flux_local.model.transformer import FluxTransformer
from flux_local.model.vae import Autoencoder

PROMPT_CACHE_BYTES = 256 << 20
CONDITIONS = 2
"""Kept: a prompt's, and of what to keep away from. One has 2 MB a step at FLUX.1's size."""


@dataclass(frozen=True)
class Pipeline:
    """FLUX.1 taken apart into its stages; `begin`, then `denoiser.advance` until done, then `vae.decode`."""

    text: PromptEncoder
    denoiser: Denoiser
    vae: Autoencoder
    schedule: FlowSchedule
    fast: Denoiser | None = None
    """In fp8, where both precisions are loaded."""
    adapters: Adapters | None = None
    """None with diffusers' own transformer."""
    plan: Plan = field(default_factory=lambda: Plan("both"))
    conditions: OrderedDict[tuple[Any, ...], tuple[PromptEmbedding, Any]] = field(default_factory=OrderedDict)
    """What the transformers made of the last prompts, schedules and guidance values."""

    @property
    def precisions(self) -> tuple[str, ...]:
        """What is loaded, the model's own precision first."""
        dtype = str(self.denoiser.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        if self.fast is None:
            return (dtype,)
        return ("fp8",) if self.fast is self.denoiser else (dtype, "fp8")

    @property
    def attentions(self) -> tuple[str, ...]:
        """Whose attention each of `precisions` has."""
        return tuple(self.denoiser_for(p == "fp8").transformer.attention_by for p in self.precisions)

    def denoiser_for(self, go_fast: bool, careful: bool = False) -> Denoiser:
        """The one of a precision; `careful` with plain operations instead of kernels and graphs."""
        denoiser = self.fast if go_fast and self.fast is not None else self.denoiser
        if careful and isinstance(denoiser.transformer, FluxTransformer):
            return Denoiser(denoiser.transformer.with_plain_operations(), denoiser.pace)
        return denoiser

    def adapt(self, choice: Choice, go_fast: bool) -> None:
        """Leaves the transformer of a precision with these adapters and no others.

        Raises:
            InvalidValue: an adapter that is none for this model. NotAvailable: there is nothing that could take one.
        """
        transformer = self.denoiser_for(go_fast).transformer
        if self.adapters is not None and isinstance(transformer, FluxTransformer):
            self.adapters.use(transformer, choice)
        elif choice:
            raise NotAvailable(
                "This server runs diffusers' own transformer (--reference, or for lack of memory), which takes no "
                "adapters here. Leave 'loras' out.",
                param="loras",
            )

    def prompt_cache(self) -> PromptCache:
        return PromptCache(self.text.encode, PROMPT_CACHE_BYTES)

    def begin(
        self,
        prompt: PromptEmbedding,
        width: int,
        height: int,
        *,
        seed: int,
        steps: int,
        guidance: float,
        image: bytes | None = None,
        mask: bytes | None = None,
        skip: int = 0,
        negative: PromptEmbedding | None = None,
        true_cfg_scale: float = 1.0,
        go_fast: bool = False,
        computed: tuple[bool, ...] = (),
    ) -> Picture:
        """Noise of the seed, or an image part of the way there, with the noise levels that it will go down.

        Args:
            width, height: of the canvas, multiples of 16.
            image: RGB rows of the canvas.
            skip: steps of the schedule that are left out at its noisy end, because the image is so far already.
            mask: a byte a pixel, not 0 where the image is to be repainted; the rest is held.
            negative: what to keep away from, by `true_cfg_scale`.
            go_fast: in fp8.
            computed: which of the steps that are not skipped are computed; empty for all.
        """
        noise = initial_noise(seed, width, height).to(self.denoiser.device, self.denoiser.dtype)
        sigmas = self.schedule.sigmas(steps, noise.shape[1])[skip:]
        latents, keep = noise, None
        if image is not None:
            original = self.vae.encode(image, width, height).to(noise.dtype)
            keep = None if mask is None else Keep(self.vae.repaint(mask, width, height), original, noise)
            latents = noised(original, noise, sigmas[0])
        picture = Picture(
            width, height, sigmas, latents, prompt, None, guidance, keep=keep, negative=negative,
            true_cfg_scale=true_cfg_scale, computed=computed,
        )  # fmt: skip
        self.prepare([picture], go_fast)
        return picture

    def prepare(self, pictures: Iterable[Picture], go_fast: bool) -> None:
        """Gives pictures the conditions that they have not got, or have no more. The adapters must be theirs."""
        for picture in pictures:
            if picture.condition is None:
                sigmas = picture.sigmas[:-1]
                picture.condition = self.condition(picture.prompt, sigmas, picture.guidance, go_fast)
                if picture.negative is not None:
                    picture.against = self.condition(picture.negative, sigmas, picture.guidance, go_fast)

    def condition(self, prompt: PromptEmbedding, sigmas: list[float], guidance: float, go_fast: bool) -> Any:
        """The transformer's, with the adapters that it has; once for the pictures of one request, which share it."""
        transformer = self.denoiser_for(go_fast).transformer
        adapters = None if self.adapters is None else self.adapters.at
        key = (id(transformer), id(prompt), tuple(sigmas), guidance, adapters)
        if key not in self.conditions:
            self.conditions[key] = (prompt, transformer.condition(prompt, sigmas, guidance))
            while len(self.conditions) > CONDITIONS:
                self.conditions.popitem(last=False)
        return self.conditions[key][1]

    def make_room(self, pictures: Iterable[Picture] = ()) -> None:
        """Gives back what can be made again: CUDA graphs, conditions, copies for adapters, the allocator's reserve.

        Args:
            pictures: under way, which lose their conditions until they are prepared again.
        """
        self.conditions.clear()
        for picture in pictures:
            picture.condition = picture.against = None
        self.text.forget()
        if self.adapters is not None:
            self.adapters.forget()
        for denoiser in (self.denoiser, self.fast):
            if denoiser is not None and isinstance(denoiser.transformer, FluxTransformer):
                denoiser.transformer.forget()
        memory.free()


def load(
    model: Path | Checkpoint,
    device: str = "cpu",
    precisions: Precisions = "both",
    reference: bool = False,
    tier: Tier | None = None,
    largest: int = 1 << 22,
    cache: Path | None = None,
    fp8_attention: bool = False,
    sharing: int = 1,
    text_length: int | None = None,
) -> Pipeline:
    """Loads the model onto the device: fp32 on the CPU, bf16 on a GPU.

    Args:
        precisions: `full` (the model's own), `fp8` or `both`, as far as the memory allows.
        reference: with diffusers' own transformer instead of ours, in the model's own precision alone.
        tier: how the memory is used; the best that fits, if not said.
        largest: pixels of the largest canvas.
        cache: folder of prepared models; one is used where the transformer is wanted in fp8 alone.
        fp8_attention: attention too, where the blocks are in fp8.
        sharing: engines that share the host's memory.
        text_length: T5 tokens that the model was trained with, where its tokenizer has more.

    Raises:
        WeightsError: a component is missing or cannot be read; the message names it. StartError: it does not fit, or
            nothing on this machine does attention in fp8 on this device.
    """
    checkpoint = identify(model) if isinstance(model, Path) else model
    if (index := torch.device(device).index) is not None:
        torch.cuda.set_device(index)  # Triton, streams and graphs take the current one
    if device == "cpu":
        memory.keep_freed()
    quieten_libraries()
    dtype = dtype_of(device)
    with translated(checkpoint.path):
        geometry = Geometry.of(checkpoint.config("transformer"))
        plan = memory.plan(
            memory.Sizes.of(checkpoint), memory.room(device), "full" if reference else precisions, tier, largest,
            not has_products(device), memory.host_room(sharing),
        )  # fmt: skip
        work = memory.step_work(geometry.width, largest)
    text = prompt_encoder(checkpoint, device, dtype, plan, text_length)
    plain = reference or plan.tier == "offload"
    ops = Ops() if plain or device == "cpu" else operations(geometry, device, dtype, fp8_attention)
    with translated(checkpoint.path):
        weights, host = (
            transformer_weights(checkpoint.parts["transformer"], geometry, where, dtype) for where in (device, "cpu")
        )
        fast = None
        if plain:
            denoiser = Denoiser(diffusers_own(checkpoint, weights, host, device, plan))
        elif plan.tier in ("fp8", "swap"):
            convert, native = conversion(torch.device(device), ops)
            ready = None if cache is None else prepared.find(cache, checkpoint, dtype)
            if ready is None:
                layers = Layers(weights, convert, host if plan.modulation_on_host else None, torch.device(device))
            else:
                target = Target(device, native, ops.quantised, plan.modulation_on_host)
                layers = PreparedLayers(ready, target)
                plan = replace(plan, prepared=True)
            denoiser = fast = Denoiser(FluxTransformer(geometry, layers, ops, native, fp8_attention, work))
        else:
            own = FluxTransformer(geometry, Layers(weights), ops, work=work)
            denoiser = Denoiser(own)
            if plan.tier == "both":
                fast = Denoiser(in_fp8(own, attention=fp8_attention), denoiser.pace)
        vae = Autoencoder(autoencoder(checkpoint, device, dtype), ops, plan.tile_above)
    schedule = FlowSchedule.of(checkpoint.scheduler())
    if device != "cpu":
        memory.free()  # what the kernels' trials and weights on their way took is in no plan
    return Pipeline(text, denoiser, vae, schedule, fast, None if plain else Adapters(weights), plan)


def diffusers_own(
    checkpoint: Checkpoint, weights: Weights, host: Weights, device: str, plan: Plan
) -> ReferenceTransformer:
    """Its transformer on the device, or in host memory and brought block by block."""
    if plan.tier == "offload":
        module = reference_module(checkpoint, host, plan.pinned and device != "cpu")
        bring_in_groups(module, device, plan.pinned, blocks=True)
    else:
        module = reference_module(checkpoint, weights)
    return ReferenceTransformer(module, torch.device(device))


def dtype_of(device: str) -> torch.dtype:
    """The model's own precision on a device."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def weights_of(checkpoint: Checkpoint, device: str) -> Weights:
    """The transformer's tensors of a checkpoint, as a device has them."""
    geometry = Geometry.of(checkpoint.config("transformer"))
    return transformer_weights(checkpoint.parts["transformer"], geometry, device, dtype_of(device))


def operations(geometry: Geometry, device: str, dtype: torch.dtype, fp8_attention: bool) -> Ops:
    """What a GPU is found to do rightly, at the model's own sizes.

    Raises:
        StartError: attention is wanted in fp8, and no library here does it.
    """
    sizes = Sizes(geometry.heads, geometry.head_size, TRIAL)
    ops, _ = accelerated(sizes, device, dtype)
    if fp8_attention:
        ops, findings = with_fp8_attention(ops, sizes, device, dtype)
        if not findings[-1].good:
            tried = "; ".join(f"{finding.name.rpartition(' ')[2]}: {finding.reason}" for finding in findings)
            raise StartError(f"Nothing here does attention in fp8 ({tried}). {ADVICE}")
    return ops


def transformer_weights(part: Part, geometry: Geometry, device: str, dtype: torch.dtype) -> Weights:
    """The transformer's tensors by diffusers' names, read straight to the device when asked for."""
    tensors = Tensors(part, device, dtype)
    return DiffusersNames(tensors, geometry.width) if part.layout == "bfl" else tensors


def quieten_libraries() -> None:
    """Keeps the notes for developers of diffusers and transformers off the user's terminal, wherever they are imported
    later."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
