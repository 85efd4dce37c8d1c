"""A model on disk, in any of its forms → a `Pipeline` ready to draw. Never a pickle, never the network."""

from __future__ import annotations

import logging
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from flux_local.errors import FETCH_AGAIN, FluxError, NotAvailable, StartError, WeightsError
from flux_local.model import memory, prepared
from flux_local.model.bfl import DiffusersNames
from flux_local.model.checkpoint import Checkpoint, Component, Part, identify
from flux_local.model.denoiser import Denoiser, Keep, Picture, noised
from flux_local.model.fp8 import conversion, has_products, in_fp8, store_in_fp8
from flux_local.model.fp8_attention import ADVICE
from flux_local.model.geometry import Geometry
from flux_local.model.latents import initial_noise
from flux_local.model.layers import Layers, Weights
from flux_local.model.lora import Adapters, Choice
from flux_local.model.memory import Plan, Precisions, Tier
from flux_local.model.ops import Ops
from flux_local.model.prepared import PreparedLayers, Target
from flux_local.model.reference import ReferenceTransformer
from flux_local.model.schedule import FlowSchedule
from flux_local.model.selfcheck import TRIAL, Sizes, accelerated, with_fp8_attention
from flux_local.model.tensors import Tensors
from flux_local.model.text import PromptCache, PromptEmbedding, PromptEncoder
from flux_local.model.transformer import FluxTransformer
from flux_local.model.vae import Autoencoder

NO_ROOM = (
    "The device's memory did not suffice. Free some, or name a way that takes less with --memory: "
    + ", ".join(memory.TIERS)
    + "."
)
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
        return Picture(
            width, height, sigmas, latents, prompt, self.condition(prompt, sigmas[:-1], guidance, go_fast), keep=keep,
            against=None if negative is None else self.condition(negative, sigmas[:-1], guidance, go_fast),
            true_cfg_scale=true_cfg_scale, computed=computed,
        )  # fmt: skip

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

    def make_room(self) -> None:
        """Gives back what can be made again: CUDA graphs, conditions, copies for adapters, the allocator's reserve."""
        self.conditions.clear()
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

    Raises:
        WeightsError: a component is missing or cannot be read; the message names it. StartError: it does not fit, or
            nothing on this machine does attention in fp8 on this device.
    """
    checkpoint = identify(model) if isinstance(model, Path) else model
    if (index := torch.device(device).index) is not None:
        torch.cuda.set_device(index)  # Triton, streams and graphs take the current one
    if device == "cpu":
        memory.keep_freed()
    import_libraries()
    dtype = dtype_of(device)
    with translated(checkpoint.path):
        geometry = Geometry.of(checkpoint.config("transformer"))
        plan = memory.plan(
            memory.Sizes.of(checkpoint), memory.room(device), "full" if reference else precisions, tier, largest,
            not has_products(device), memory.host_room(sharing),
        )  # fmt: skip
        work = memory.step_work(geometry.width, largest)
    text = prompt_encoder(checkpoint, device, dtype, plan)
    plain = reference or plan.tier == "offload"
    ops = Ops() if plain or device == "cpu" else operations(geometry, device, dtype, fp8_attention)
    with translated(checkpoint.path):
        part = checkpoint.parts["transformer"]
        weights = transformer_weights(part, geometry, device, dtype)
        host = transformer_weights(part, geometry, "cpu", dtype)
        fast = None
        if plain:
            module = reference_module(checkpoint, host if plan.tier == "offload" else weights)
            if plan.tier == "offload":
                bring_in_groups(module, device, plan.pinned, blocks=True)
            denoiser = Denoiser(ReferenceTransformer(module, torch.device(device)))
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
    return Pipeline(text, denoiser, vae, schedule, fast, None if plain else Adapters(weights), plan)


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


def reference_module(checkpoint: Checkpoint, weights: Weights) -> Any:
    """diffusers' own module with these tensors."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    with init_empty_weights():
        module = FluxTransformer2DModel.from_config(checkpoint.config("transformer"))
    module.load_state_dict({name: weights(name) for name in module.state_dict()}, assign=True)
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


def prompt_encoder(checkpoint: Checkpoint, device: str, dtype: torch.dtype, plan: Plan) -> PromptEncoder:
    """Both text encoders where the plan has them: on the device, T5 there in fp8, or in host memory."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    def tokenizer(cls: Any, name: str) -> Any:
        with translated(checkpoint.home / name):
            return cls.from_pretrained(checkpoint.home / name, local_files_only=True)

    in_host = plan.tier in ("swap", "offload")

    def encoder(cls: Any, config: Any, component: Component) -> Any:
        packed = plan.tier == "fp8" and component == "text_encoder_2"
        place = "cpu" if in_host or packed else device
        with translated(path := checkpoint.parts[component].headers[0].path.parent):
            tensors = Tensors(checkpoint.parts[component], place, dtype)
            state = {name: tensors(name) for name in tensors.names()}
            module, report = cls.from_pretrained(
                None, config=config(**checkpoint.config(component)), state_dict=state, dtype=dtype,
                device_map={"": place}, output_loading_info=True,
            )  # fmt: skip
        if report["missing_keys"]:
            lost = sorted(report["missing_keys"])[0]
            raise WeightsError(f"{path} lacks the tensor {lost}. {FETCH_AGAIN}")
        module = module.eval().requires_grad_(False)
        if in_host:
            bring_in_groups(module, device, plan.pinned)
        elif packed:
            state.clear()
            store_in_fp8(module, device)
            module = module.to(device)
        return module

    with translated(checkpoint.path):
        return PromptEncoder(
            tokenizer(CLIPTokenizer, "tokenizer"),
            encoder(CLIPTextModel, CLIPTextConfig, "text_encoder"),
            tokenizer(T5TokenizerFast, "tokenizer_2"),
            encoder(T5EncoderModel, T5Config, "text_encoder_2"),
            device, hooked=in_host, packed=plan.tier == "fp8",
        )  # fmt: skip


def autoencoder(checkpoint: Checkpoint, device: str, dtype: torch.dtype) -> Any:
    """diffusers' `AutoencoderKL` with the checkpoint's tensors."""
    from diffusers import AutoencoderKL

    part, config = checkpoint.parts["vae"], checkpoint.config("vae")
    tensors = Tensors(part, device, dtype)
    state = {name: tensors(name) for name in tensors.names()}
    if part.layout == "bfl":
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        state = convert_ldm_vae_checkpoint(state, config)
    module = AutoencoderKL.from_config(config)
    module.load_state_dict(state)
    return module.to(device, dtype).eval().requires_grad_(False)


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


def import_libraries() -> None:
    """Imports what loading needs, which takes seconds, and keeps its progress bars and notes for developers off the
    user's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from diffusers import AutoencoderKL  # noqa: F401
    from diffusers.utils import logging as diffusers_logging
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast  # noqa: F401
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
