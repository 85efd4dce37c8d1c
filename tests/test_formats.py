"""The embedded model in every form that FLUX.1 comes in draws the same pictures, and what is missing is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_local import weights
from flux_local.errors import WeightsError
from flux_local.model.bfl import DiffusersNames
from flux_local.model.checkpoint import Part, transformer_config
from flux_local.model.headers import Header
from flux_local.model.loader import Pipeline, load
from flux_local.model.tensors import Tensors
from tests import formats
from tests.servers import MODEL, pictures, running, started

PROMPT = "a large red star on a blue background"
EXACT = [formats.bfl_files, formats.diffusers_file, formats.comfy_folders, formats.all_in_one]
ROUNDED: list[tuple[Callable[[Path], Path], float]] = [
    (formats.fp8_plain, 20),
    (formats.fp8_scaled, 20),
    (partial(formats.fp8_scaled, scale="weight_scale"), 20),
    (partial(formats.gguf_file, kind="Q8_0"), 35),
    (partial(formats.gguf_file, kind="Q5_1"), 22),
    (partial(formats.gguf_file, kind="Q4_0"), 16),
]


def drawn(pipeline: Pipeline, steps: int = 6) -> np.ndarray[Any, Any]:
    picture = pipeline.begin(pipeline.text.encode(PROMPT), 128, 128, seed=5, steps=steps, guidance=4.5)
    while picture.steps_left:
        pipeline.denoiser.advance([picture])
    return np.frombuffer(pipeline.vae.decode(picture.latents, 128, 128), np.uint8).astype(float)


def load_at(path: Path) -> Pipeline:
    weights.verify(path)
    return load(weights.identify(path), precisions="full")


@pytest.fixture(scope="module")
def original(pipeline: Pipeline) -> np.ndarray[Any, Any]:
    return drawn(pipeline)


@pytest.mark.parametrize("write", EXACT, ids=lambda write: write.__name__)
def test_the_same_picture(write: Callable[[Path], Path], original: Any, tmp_path: Path) -> None:
    assert np.array_equal(drawn(load_at(write(tmp_path / "model"))), original)


def test_a_folder_of_single_files_is_a_model(original: Any, tmp_path: Path) -> None:
    folder = formats.bfl_files(tmp_path / "mini-files").parent
    assert weights.info(folder).name == "mini-files"
    assert np.array_equal(drawn(load_at(folder)), original)


def test_of_several_autoencoders_flux_s_own_is_taken(tmp_path: Path) -> None:
    """SD3's has as many channels; its pictures would have other colours."""
    path = formats.comfy_folders(tmp_path / "models")
    vae = tmp_path / "models" / "vae"
    for other in ("SD3_vae", "sd35_vae", "taef1", "aesthetic"):
        shutil.copyfile(vae / "ae.safetensors", vae / f"{other}.safetensors")
    own = vae / "ae.safetensors"
    for name in ("ae", "flux-ae.fp16", "FLUX_AE"):
        own = own.rename(vae / f"{name}.safetensors")
        assert weights.identify(path).parts["vae"].headers[0].path == own


@pytest.mark.parametrize(("write", "decibels"), ROUNDED)
def test_the_same_picture_but_for_rounding(
    write: Callable[[Path], Path], decibels: float, original: Any, tmp_path: Path
) -> None:
    error = float(np.mean((drawn(load_at(write(tmp_path / "model"))) - original) ** 2))
    assert error > 0, "nothing was rounded"
    assert 10 * np.log10(255**2 / error) > decibels


def test_the_reference_reads_them_too(original: Any, tmp_path: Path) -> None:
    path = formats.bfl_files(tmp_path / "model")
    theirs = drawn(load(weights.identify(path), reference=True))
    assert np.abs(theirs - original).max() <= 1


def test_served(tmp_path: Path) -> None:
    """A file of ComfyUI's, by its path, through the server: the same bytes as the folder's."""
    body = {"prompt": PROMPT, "size": "128x128", "steps": 4, "seed": 1, "response_format": "b64_json",
            "output_format": "png"}  # fmt: skip
    (plain := tmp_path / "a").mkdir()
    (single := tmp_path / "b").mkdir()
    flags = ("--png-metadata", "false")
    with running(plain, "--model", str(MODEL), *flags) as server:
        expected = pictures(server.post(body))
    with running(single, "--model", str(formats.all_in_one(tmp_path / "model")), *flags) as server:
        assert pictures(server.post(body)) == expected
        assert "flux1-mini-all" in [model.id for model in server.client().models.list()]


def test_names_are_those_of_diffusers_own_conversion() -> None:
    """At FLUX.1's width, over every tensor and row: each row carries a number of its own."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    width, count = 3072, 0
    stored = {}
    for name, tensor in formats.bfl_transformer(formats.stored("transformer")).items():
        if tensor.ndim == 1 and "norm" in name:
            rows = 128
        else:
            rows = tensor.shape[0] // formats.WIDTH * width if tensor.shape[0] % formats.WIDTH == 0 else 64
        stored[name] = torch.arange(count, count + rows, dtype=torch.float64)
        stored[name] = stored[name] if tensor.ndim == 1 else stored[name][:, None]
        count += rows
    ours = DiffusersNames(lambda name: stored[name], width)  # type: ignore[arg-type]
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    assert set(theirs) == set(formats.stored("transformer"))
    for name, tensor in theirs.items():
        assert torch.equal(ours(name), tensor), name


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "BF16"])
def test_gguf_blocks_are_unpacked_as_its_own_package_does(kind: str, tmp_path: Path) -> None:
    """Random blocks of each kind, with scales that are numbers."""
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    rng = np.random.default_rng(4)
    data = rng.integers(0, 256, (6, 3, size), dtype=np.uint8)
    scales = {"Q8_0": [0], "Q6_K": [208], "Q5_K": [0, 2], "Q4_K": [0, 2], "Q3_K": [108], "Q2_K": [80, 82]}
    for at in scales.get(kind, []):
        data[:, :, at : at + 2] = rng.uniform(0.01, 0.1, (6, 3, 1)).astype(np.float16).view(np.uint8)
    if kind == "BF16":
        data = rng.standard_normal((6, 3 * block)).astype(np.float32).view(np.uint8).reshape(6, -1, 4)[:, :, 2:]
    data = np.ascontiguousarray(data).reshape(6, -1)
    path = tmp_path / "blocks.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor("double_blocks.0.img_mod.lin.weight", data, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = gguf.quants.dequantize(data, wanted)
    found = Tensors(Part((Header(path, {}, {}, 0),)), "cpu", torch.float32)("double_blocks.0.img_mod.lin.weight")
    assert np.allclose(found.numpy(), expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


def test_a_transformer_tells_its_own_configuration(tmp_path: Path) -> None:
    path = formats.bfl_files(tmp_path / "model")
    found = transformer_config(weights.identify(path).parts["transformer"])
    said = json.loads((MODEL / "transformer" / "config.json").read_text())
    ours = {name: value for name, value in found.items() if name in said and name != "axes_dims_rope"}
    assert ours == {name: said[name] for name in ours}
    assert len(ours) >= 8


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        weights.verify(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("ae.safetensors", r"autoencoder \(ae\.safetensors\) is missing"),
        ("clip_l.safetensors", r"CLIP .* is missing"),
        ("t5xxl_fp16.safetensors", r"T5 .* is missing"),
        ("flux1-mini.safetensors", r"no FLUX\.1 transformer"),
        ("tokenizer", r"--only tokenizers"),
    ],
)
def test_what_is_missing_is_named(gone: str, said: str, tmp_path: Path) -> None:
    folder = formats.bfl_files(tmp_path / "model").parent
    shutil.rmtree(folder / gone) if (folder / gone).is_dir() else (folder / gone).unlink()
    assert re.search(said, refusal(folder))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = formats.bfl_files(tmp_path / "model")
    state = load_file(path)

    def changed(**tensors: torch.Tensor) -> Path:
        save_file(state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)
        return path

    packed = changed(double_blocks__0__img_mlp__0__weight=torch.zeros(8, 1, dtype=torch.uint8))
    assert "packed as U8" in refusal(packed)
    assert "filling or control" in refusal(changed(img_in__weight=torch.zeros(len(state["img_in.weight"]), 384)))
    (other := tmp_path / "model" / "other.safetensors").write_bytes(changed().read_bytes())
    assert "several transformers" in refusal(path.parent)
    weights.verify(other)
    (pickle := tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    assert "pickle" in refusal(pickle)
    (cut := tmp_path / "model" / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    assert "damaged" in refusal(cut)
    path.write_bytes(path.read_bytes()[:-10])
    assert "its header says" in refusal(path)


def test_a_start_with_a_part_missing_ends_with_its_name(tmp_path: Path) -> None:
    path = formats.bfl_files(tmp_path / "model")
    (path.parent / "t5xxl_fp16.safetensors").unlink()
    with started(tmp_path, "--model", str(path)) as server:
        assert server.process.wait(timeout=20) == 4
        assert "T5" in server.output


def test_other_models_beside_it_are_left_alone(tmp_path: Path) -> None:
    """A folder of many models: a larger checkpoint of everything, and a T5 of another language, change nothing."""
    path = formats.comfy_folders(tmp_path / "models")
    expected = {name: part.headers[0].path for name, part in weights.identify(path).parts.items()}
    clips = path.parent.parent / "clip"
    stranger = {f"model.diffusion_model.input_blocks.{i}.weight": torch.zeros(500, 500) for i in range(3)}
    for file in ("clip/clip_l", "vae/ae"):
        stranger |= {f"first.{n}": t for n, t in load_file(path.parent.parent / f"{file}.safetensors").items()}
    save_file(stranger, clips / "sdxl.safetensors")
    save_file(stranger, path.parent.parent / "vae" / "sdxl.safetensors")
    t5 = load_file(clips / "t5xxl_fp16.safetensors")
    save_file(t5 | {"shared.weight": torch.zeros(40_000, t5["shared.weight"].shape[1])}, clips / "umt5.safetensors")
    found = {name: part.headers[0].path for name, part in weights.identify(path).parts.items()}
    assert found == expected
    own = formats.all_in_one(tmp_path / "models" / "checkpoints")
    assert set(weights.identify(own).files) == {own}, "what is in the file itself comes first"


def test_layers_that_are_not_in_fp8_need_no_scales(original: Any, tmp_path: Path) -> None:
    """ComfyUI's mixed files keep some layers as they are; scales by blocks are refused, not misread."""
    path = formats.fp8_scaled(tmp_path / "model", scale="weight_scale")
    state, plain = load_file(path), formats.bfl_transformer(formats.stored("transformer"))
    name = "double_blocks.1.img_mlp.0"
    mixed = {n: t for n, t in state.items() if not n.startswith(f"{name}.weight_") and "input" not in n}
    save_file(mixed | {f"{name}.weight": plain[f"{name}.weight"]}, path)
    error = float(np.mean((drawn(load_at(path)) - original) ** 2))
    assert 10 * np.log10(255**2 / error) > 20
    save_file(state | {f"{name}.weight_scale": torch.ones(3, 5)}, path)
    with pytest.raises(WeightsError, match="scales by blocks"):
        load_at(path)


def test_of_several_that_fit_the_finest_is_taken(tmp_path: Path) -> None:
    path = formats.bfl_files(tmp_path / "model")
    fine = path.parent / "t5xxl_fp16.safetensors"
    coarse = {n: t.to(torch.float8_e4m3fn) for n, t in load_file(fine).items()}
    save_file(coarse, path.parent / "a_t5xxl_fp8_e4m3fn.safetensors")
    assert weights.identify(path).parts["text_encoder_2"].headers[0].path == fine
