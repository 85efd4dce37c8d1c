"""A diffusers folder on disk → a `Pipeline` ready to draw. Reads safetensors only; never the network."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux_local.errors import NotAvailable, WeightsError
from flux_local.model.denoiser import Denoiser, Keep, Picture, Transformer, noised
from flux_local.model.fp8 import in_fp8
from flux_local.model.latents import initial_noise
from flux_local.model.layers import Weights
from flux_local.model.lora import Adapters, Choice
from flux_local.model.ops import Layout, Ops
from flux_local.model.reference import ReferenceTransformer
from flux_local.model.schedule import FlowSchedule
from flux_local.model.selfcheck import Sizes, accelerated
from flux_local.model.text import PromptCache, PromptEmbedding, PromptEncoder
from flux_local.model.transformer import FluxTransformer, Geometry
from flux_local.model.vae import Autoencoder

PROMPT_CACHE_BYTES = 256 << 20
COMPONENTS = ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")


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

    @property
    def precisions(self) -> tuple[str, ...]:
        """What is loaded, the model's own precision first."""
        dtype = str(self.denoiser.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        if self.fast is None:
            return (dtype,)
        return ("fp8",) if self.fast is self.denoiser else (dtype, "fp8")

    def denoiser_for(self, go_fast: bool, careful: bool = False) -> Denoiser:
        """The one of a precision; `careful` with plain operations instead of kernels and graphs."""
        denoiser = self.fast if go_fast and self.fast is not None else self.denoiser
        if careful and isinstance(denoiser.transformer, FluxTransformer):
            return Denoiser(denoiser.transformer.with_plain_operations())
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
            raise NotAvailable("With --reference no adapter can be used. Leave 'loras' out.", param="loras")

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
        transformer = self.denoiser_for(go_fast).transformer
        return Picture(
            width, height, sigmas, latents, prompt, transformer.condition(prompt, sigmas[:-1], guidance), keep=keep,
            against=None if negative is None else transformer.condition(negative, sigmas[:-1], guidance),
            true_cfg_scale=true_cfg_scale, computed=computed,
        )  # fmt: skip


def load(folder: Path, device: str = "cpu", precisions: str = "both", reference: bool = False) -> Pipeline:
    """Loads the model onto the device: fp32 on the CPU, bf16 on a GPU.

    Args:
        precisions: `full` (the model's own), `fp8` or `both`.
        reference: with diffusers' own transformer instead of ours, in the model's own precision alone.

    Raises:
        WeightsError: a component is missing or cannot be read; the message names it.
    """
    check_folder(folder)
    quieten()
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def model(cls: Any, name: str, **options: Any) -> Any:
        with translated(folder / name):
            loaded = cls.from_pretrained(folder / name, local_files_only=True, use_safetensors=True, **options)
            return loaded.to(device).eval().requires_grad_(False)

    def tokenizer(cls: Any, name: str) -> Any:
        with translated(folder / name):
            return cls.from_pretrained(folder / name, local_files_only=True)

    text = PromptEncoder(
        tokenizer(CLIPTokenizer, "tokenizer"),
        model(CLIPTextModel, "text_encoder", dtype=dtype),
        tokenizer(T5TokenizerFast, "tokenizer_2"),
        model(T5EncoderModel, "text_encoder_2", dtype=dtype),
    )
    with translated(folder / "transformer"):
        geometry = Geometry.of(json.loads((folder / "transformer" / "config.json").read_text()))
    ops = Ops() if reference or device == "cpu" else operations(geometry, device, dtype)
    with translated(folder / "transformer"):
        parts = tensors(folder / "transformer", device, dtype)
    own = transformer(folder / "transformer", geometry, device, dtype, None if reference else ops)
    denoiser, fast = Denoiser(own), None
    if isinstance(own, FluxTransformer) and precisions != "full":
        fast = Denoiser(in_fp8(own))
        denoiser = fast if precisions == "fp8" else denoiser
    vae = Autoencoder(model(AutoencoderKL, "vae", dtype=dtype), ops)
    adapters = None if reference else Adapters(parts)
    return Pipeline(text, denoiser, vae, FlowSchedule.load(folder / "scheduler"), fast, adapters)


def operations(geometry: Geometry, device: str, dtype: torch.dtype) -> Ops:
    """What a GPU is found to do rightly, at the model's own sizes."""
    sizes = Sizes(geometry.heads, geometry.head_size, Layout(1, 512, 1024))
    return accelerated(sizes, device, dtype)[0]


def transformer(folder: Path, geometry: Geometry, device: str, dtype: torch.dtype, ops: Ops | None) -> Transformer:
    """The transformer of a diffusers folder: ours, or without `ops` diffusers' own."""
    with translated(folder):
        if ops is None:
            from diffusers import FluxTransformer2DModel

            module = FluxTransformer2DModel.from_pretrained(folder, local_files_only=True, torch_dtype=dtype)
            return ReferenceTransformer(module.to(device).eval().requires_grad_(False))
        return FluxTransformer(geometry, tensors(folder, device, dtype), ops)


def tensors(folder: Path, device: str, dtype: torch.dtype) -> Weights:
    """The tensors of a component of a diffusers folder, by name, read straight to the device when asked for."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no .safetensors file. Copy or download the model again.")
    where = {}
    for path in files:
        opened = safe_open(path, framework="pt", device=device)
        where.update(dict.fromkeys(opened.keys(), opened))

    def tensor(name: str) -> torch.Tensor:
        if name not in where:
            raise WeightsError(f"{folder} lacks the tensor {name}. Copy or download the model again.")
        found: torch.Tensor = where[name].get_tensor(name)
        return found.to(dtype)

    return tensor


def check_folder(folder: Path) -> None:
    """Raises `WeightsError` unless the folder is a FLUX.1 model with every component in place."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise WeightsError(f"No model at {folder}: model_index.json is missing. Give the path of a diffusers folder.")
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except ValueError as error:
        raise WeightsError(f"{index} is damaged. Copy or download the model again.") from error
    if kind != "FluxPipeline":
        raise WeightsError(f"{folder} holds a {kind}, not a FluxPipeline. flux-local serves FLUX.1 models only.")
    for name in COMPONENTS:
        if not (folder / name).is_dir():
            raise WeightsError(f"{folder / name} is missing. Copy or download the model again.")


class translated:
    """Turns what a foreign loader raises into a `WeightsError` that names the component."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, ValueError, RuntimeError, KeyError)) or (
            error is not None and type(error).__name__ == "SafetensorError"
        ):
            raise WeightsError(
                f"Cannot load {self.path}: {type(error).__name__}. Copy or download the model again."
            ) from error


def quieten() -> None:
    """Keeps the libraries' progress bars and notes for developers off the user's terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
