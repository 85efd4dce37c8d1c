"""A diffusers folder on disk → a `Pipeline` ready to draw. Reads safetensors only; never the network."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux_local.errors import WeightsError
from flux_local.model.denoiser import Denoiser, Keep, Picture, noised
from flux_local.model.latents import initial_noise
from flux_local.model.schedule import FlowSchedule
from flux_local.model.text import PromptCache, PromptEmbedding, PromptEncoder
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
    ) -> Picture:
        """Noise of the seed, or an image part of the way there, with the noise levels that it will go down.

        Args:
            width, height: of the canvas, multiples of 16.
            image: RGB rows of the canvas.
            skip: steps of the schedule that are left out at its noisy end, because the image is so far already.
            mask: a byte a pixel, not 0 where the image is to be repainted; the rest is held.
        """
        noise = initial_noise(seed, width, height).to(self.denoiser.device, self.denoiser.dtype)
        sigmas = self.schedule.sigmas(steps, noise.shape[1])
        if image is None:
            return Picture(width, height, prompt, guidance, sigmas, noise)
        original = self.vae.encode(image, width, height).to(noise.dtype)
        sigmas = sigmas[skip:]
        keep = None if mask is None else Keep(self.vae.repaint(mask, width, height), original, noise)
        start = noised(original, noise, sigmas[0])
        return Picture(width, height, prompt, guidance, sigmas, start, keep=keep)


def load(folder: Path, device: str = "cpu") -> Pipeline:
    """Loads the model onto the device: fp32 on the CPU, bf16 on a GPU.

    Raises:
        WeightsError: a component is missing or cannot be read; the message names it.
    """
    check_folder(folder)
    quieten()
    from diffusers import AutoencoderKL, FluxTransformer2DModel
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
    denoiser = Denoiser(model(FluxTransformer2DModel, "transformer", dtype=dtype))
    vae = Autoencoder(model(AutoencoderKL, "vae", dtype=dtype))
    return Pipeline(text, denoiser, vae, FlowSchedule.load(folder / "scheduler"))


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
