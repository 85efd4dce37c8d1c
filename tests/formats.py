"""Writes the embedded model in the forms that other tools give FLUX.1 in."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_local.model.bfl import bfl_name
from tests.servers import MODEL

WIDTH = int(json.loads((MODEL / "transformer" / "config.json").read_text())["num_attention_heads"]) * int(
    json.loads((MODEL / "transformer" / "config.json").read_text())["attention_head_dim"]
)
Tensors = dict[str, Tensor]


def stored(component: str) -> Tensors:
    """A component of the embedded model, as its folder has it."""
    found: Tensors = {}
    for path in (MODEL / component).glob("*.safetensors"):
        found |= load_file(path)
    return found


def bfl_transformer(state: Tensors, width: int = WIDTH) -> Tensors:
    """diffusers' names → Black Forest Labs'."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        joined, first, _ = bfl_name(layer, width)
        if layer == "norm_out.linear":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        pieces.setdefault(f"{joined}.{'scale' if '.norm.' in joined else kind}", {})[first] = tensor
    return {name: torch.cat([rows[first] for first in sorted(rows)]).contiguous() for name, rows in pieces.items()}


def bfl_autoencoder(state: Tensors) -> Tensors:
    """diffusers' names → the original ones, in which the decoder's blocks are numbered from the picture's side."""
    blocks = 1 + max(int(match[1]) for name in state if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name)))
    found = {}
    for name, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[name] = tensor
    return found


def surroundings(folder: Path) -> Path:
    """What no single file holds: tokenizers, and configurations that are not FLUX.1's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        shutil.copytree(MODEL / name, folder / name)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        (folder / name).mkdir()
        shutil.copy(MODEL / name / "config.json", folder / name)
    shutil.copy(MODEL / "flux-local.json", folder)
    return folder


def companions(folder: Path) -> None:
    """The files that lie beside a transformer on its own."""
    save_file(bfl_autoencoder(stored("vae")), folder / "ae.safetensors")
    save_file({f"text_model.{name}": tensor for name, tensor in stored("text_encoder").items()},
              folder / "clip_l.safetensors")  # fmt: skip
    save_file(stored("text_encoder_2"), folder / "t5xxl_fp16.safetensors")


def bfl_files(folder: Path) -> Path:
    surroundings(folder)
    companions(folder)
    save_file(bfl_transformer(stored("transformer")), folder / "flux1-mini.safetensors")
    return folder / "flux1-mini.safetensors"


def diffusers_file(folder: Path) -> Path:
    """The transformer of a diffusers folder, taken out of it."""
    surroundings(folder)
    companions(folder)
    save_file(stored("transformer"), folder / "diffusion_pytorch_model.safetensors")
    return folder / "diffusion_pytorch_model.safetensors"


def comfy_folders(folder: Path) -> Path:
    """ComfyUI's `models` folder: every part in a folder of its kind."""
    surroundings(folder / "unet")
    for name in ("vae", "clip"):
        (folder / name).mkdir()
    companions(folder / "clip")
    (folder / "clip" / "ae.safetensors").rename(folder / "vae" / "ae.safetensors")
    save_file(bfl_transformer(stored("transformer")), folder / "unet" / "flux1-mini.safetensors")
    return folder / "unet" / "flux1-mini.safetensors"


def all_in_one(folder: Path) -> Path:
    """ComfyUI's checkpoint of everything."""
    surroundings(folder)
    whole = {f"model.diffusion_model.{n}": t for n, t in bfl_transformer(stored("transformer")).items()}
    whole |= {f"vae.{n}": t for n, t in bfl_autoencoder(stored("vae")).items()}
    whole |= {f"text_encoders.clip_l.transformer.text_model.{n}": t for n, t in stored("text_encoder").items()}
    whole |= {f"text_encoders.t5xxl.transformer.{n}": t.clone() for n, t in stored("text_encoder_2").items()}
    save_file(whole, folder / "flux1-mini-all.safetensors")
    return folder / "flux1-mini-all.safetensors"


def fp8_plain(folder: Path) -> Path:
    """ComfyUI's `fp8_e4m3fn`: the matrices rounded as they are."""
    path = bfl_files(folder)
    state = load_file(path)
    save_file({n: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for n, t in state.items()}, path)
    return path


def fp8_scaled(folder: Path, scale: str = "scale_weight") -> Path:
    """ComfyUI's `fp8_scaled`: the matrices divided by their largest number first; T5's likewise."""
    path = bfl_files(folder)
    for file in (path, folder / "t5xxl_fp16.safetensors"):
        found = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
        for name, tensor in load_file(file).items():
            if tensor.ndim != 2 or "embed" in name or "shared" in name:
                found[name] = tensor
                continue
            factor = tensor.float().abs().max() / 448
            found[name] = (tensor.float() / factor).to(torch.float8_e4m3fn)
            found[name.removesuffix("weight") + scale] = factor
            found[name.removesuffix("weight") + "scale_input"] = torch.tensor(1.0)
        save_file(found, file)
    return path


def gguf_file(folder: Path, kind: str) -> Path:
    """The transformer as llama.cpp's tools write it: what a block does not divide stays in fp16."""
    import gguf

    path = bfl_files(folder)
    out = path.with_suffix(".gguf")
    writer = gguf.GGUFWriter(out, "flux")
    wanted = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    for name, tensor in load_file(path).items():
        data = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
        else:
            writer.add_tensor(name, data.astype("float16" if tensor.ndim == 2 else "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    return out
