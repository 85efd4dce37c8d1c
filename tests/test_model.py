"""The denoising path against diffusers' own `FluxPipeline`: same weights, same seed, same picture."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flux_local.errors import WeightsError
from flux_local.model import denoiser
from flux_local.model.latents import initial_noise, pack, position_ids, unpack
from flux_local.model.loader import Pipeline, load
from flux_local.model.schedule import FlowSchedule
from flux_local.model.vae import Autoencoder, finished
from tests.servers import MODEL

TOLERANCE = 1e-4
PROMPTS = ("a large red star on a blue background", "", "A small green heart above a white circle, yellow backdrop!")


@pytest.fixture(scope="module")
def reference() -> Any:
    """diffusers' pipeline on the same folder."""
    from diffusers import FluxPipeline

    reference = FluxPipeline.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)
    reference.set_progress_bar_config(disable=True)
    return reference


def drawn(pipeline: Pipeline, prompt: str, width: int, height: int, seed: int, steps: int, guidance: float) -> Any:
    """Latents and pixels of one picture, as the engine makes them."""
    embedding = pipeline.text.encode(prompt)
    picture = pipeline.begin(embedding, width, height, seed=seed, steps=steps, guidance=guidance)
    while picture.steps_left:
        pipeline.denoiser.advance([picture])
    return picture.latents, finished(pipeline.vae.layers(picture.latents, width, height))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 160)])
def test_equal_to_diffusers(pipeline: Pipeline, reference: Any, prompt: str, width: int, height: int) -> None:
    """n = 2 in one call of diffusers, against two pictures of ours with seed and seed + 1."""
    options: dict[str, Any] = {
        "prompt": prompt,
        "width": width,
        "height": height,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "num_images_per_prompt": 2,
        "max_sequence_length": pipeline.text.max_length,
    }
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]
    latents = reference(**options, generator=generators, output_type="latent").images
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (7, 8)]
    pixels = reference(**options, generator=generators, output_type="np").images
    for i in range(2):
        ours, ours_pixels = drawn(pipeline, prompt, width, height, 7 + i, 5, 3.0)
        assert (ours[0] - latents[i]).abs().max() < TOLERANCE
        theirs = torch.from_numpy(pixels[i]).permute(2, 0, 1)
        assert (ours_pixels.clamp(0, 1) - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("passes", [1, 2])
def test_real_guidance_is_that_of_diffusers(
    passes: int, pipeline: Pipeline, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass of two rows, or, where those would be more than a pass has memory for, in two; and with conditions
    made again on the way, as after a want of memory."""
    monkeypatch.setattr(denoiser, "STEP_TOKENS", 128 // passes)
    rows: list[int] = []
    velocity = pipeline.denoiser.transformer.velocity

    def counted(latents: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(latents))
        return velocity(latents, *more)

    monkeypatch.setattr(pipeline.denoiser.transformer, "velocity", counted)
    latents = reference(
        PROMPTS[0], negative_prompt="blue", true_cfg_scale=2.5, width=128, height=128, num_inference_steps=3,
        guidance_scale=3.0, generator=torch.Generator("cpu").manual_seed(1), output_type="latent",
        max_sequence_length=pipeline.text.max_length,
    ).images  # fmt: skip
    ours = pipeline.begin(
        pipeline.text.encode(PROMPTS[0]), 128, 128, seed=1, steps=3, guidance=3.0,
        negative=pipeline.text.encode("blue"), true_cfg_scale=2.5,
    )  # fmt: skip
    while ours.steps_left:
        pipeline.denoiser.advance([ours])
        pipeline.make_room([ours])
        pipeline.prepare([ours], go_fast=False)
    assert rows == [2 // passes] * 3 * passes
    assert (ours.latents - latents).abs().max() < TOLERANCE


def test_the_picture_is_that_of_diffusers_to_the_byte_but_for_rounding(pipeline: Pipeline, reference: Any) -> None:
    latents, _ = drawn(pipeline, PROMPTS[0], 128, 128, 3, 4, 4.5)
    ours = np.frombuffer(pipeline.vae.decode(latents, 128, 128), np.uint8).reshape(128, 128, 3)
    generator = torch.Generator("cpu").manual_seed(3)
    theirs = reference(
        PROMPTS[0], width=128, height=128, num_inference_steps=4, guidance_scale=4.5, generator=generator,
        max_sequence_length=pipeline.text.max_length,
    ).images[0]  # fmt: skip
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(128, 128), (192, 192), (256, 144)])
def test_no_part_of_a_decoding_takes_longer_than_a_step(pipeline: Pipeline, width: int, height: int) -> None:
    """Else a picture that is decoded would stall those that are drawn. The best of several, as other work disturbs."""
    parts: list[float] = []
    step, threads = math.inf, torch.get_num_threads()
    torch.set_num_threads(1)  # other work on the machine then costs this thread nothing
    try:
        for _ in range(8):
            picture = pipeline.begin(pipeline.text.encode(PROMPTS[0]), width, height, seed=0, steps=2, guidance=4.0)
            for _ in range(2):
                began = time.thread_time()
                pipeline.denoiser.advance([picture])
                step = min(step, time.thread_time() - began)
            decoding, seconds = pipeline.vae.decoding(picture.latents, width, height), list[float]()
            while True:
                began = time.thread_time()
                done = next(decoding, b"")
                seconds.append(time.thread_time() - began)
                if done is not None:
                    break
            parts = [min(pair) for pair in zip(parts or seconds, seconds, strict=True)]
    finally:
        torch.set_num_threads(threads)
    assert max(parts) <= step, (max(parts), step)


def test_a_step_moves_all_pictures_or_none(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = pipeline.text.encode(PROMPTS[0])
    pictures = [pipeline.begin(prompt, 128, 128, seed=seed, steps=4, guidance=4.0) for seed in range(2)]
    before = [(picture.step, picture.latents) for picture in pictures]
    move, moved = pipeline.denoiser.move, list[int]()

    def fails_on_the_second(picture: denoiser.Picture, velocity: torch.Tensor) -> None:
        moved.append(picture.step)
        if len(moved) == 2:
            raise torch.OutOfMemoryError
        move(picture, velocity)

    monkeypatch.setattr(pipeline.denoiser, "move", fails_on_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        pipeline.denoiser.advance(pictures)
    assert all(p.step == step and p.latents is latents for p, (step, latents) in zip(pictures, before, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (128, 96), (176, 240)])
def test_a_layer_in_bands_has_the_bits_of_a_whole_one(pipeline: Pipeline, size: tuple[int, int]) -> None:
    latents = initial_noise(0, *size)
    whole = Autoencoder(pipeline.vae.vae)
    whole.in_bands = False
    in_bands = list(pipeline.vae.decoding(latents, *size))
    assert pipeline.vae.decode(latents, *size) == whole.decode(latents, *size)
    assert len(in_bands) >= len(list(whole.decoding(latents, *size)))


@pytest.mark.parametrize("steps", [1, 2, 5, 28, 100])
@pytest.mark.parametrize("tokens", [64, 144, 4096, 10_000])
@pytest.mark.parametrize("dynamic", [True, False])
def test_sigmas_are_those_of_diffusers(steps: int, tokens: int, dynamic: bool) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=3.0)
    mu = calculate_shift(tokens) if dynamic else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=mu)
    ours = FlowSchedule(use_dynamic_shifting=dynamic, shift=3.0).sigmas(steps, tokens)
    assert len(ours) == steps + 1
    np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))
@settings(max_examples=20)
def test_unpack_undoes_pack(batch: int, columns: int, rows: int) -> None:
    latents = torch.randn(batch, 16, 2 * rows, 2 * columns)
    packed = pack(latents)
    assert packed.shape == (batch, rows * columns, 64)
    assert torch.equal(unpack(packed, 16 * columns, 16 * rows), latents)
    assert position_ids(16 * columns, 16 * rows).shape == (rows * columns, 3)


def test_noise_depends_on_seed_and_canvas_alone() -> None:
    assert torch.equal(initial_noise(5, 128, 160), initial_noise(5, 128, 160))
    assert not torch.equal(initial_noise(5, 128, 160), initial_noise(6, 128, 160))
    assert initial_noise(2**63 - 1, 128, 128).shape == (1, 64, 64)


def test_a_long_prompt_is_cut_where_the_encoder_stops_reading(pipeline: Pipeline) -> None:
    prompt = "a red circle " * 50
    embedding = pipeline.text.encode(prompt)
    assert embedding.tokens == pipeline.text.max_length
    assert prompt.startswith(embedding.read)
    assert 0 < len(embedding.read) < len(prompt)
    assert torch.equal(pipeline.text.encode(embedding.read).states, embedding.states)


@pytest.mark.parametrize("prompt", ["", " ", "<pad></s><unk>", "<|endoftext|> red", "\x00\u202e😀猫", "Ω" * 3000])
def test_any_text_can_be_encoded(pipeline: Pipeline, prompt: str) -> None:
    assert torch.isfinite(pipeline.text.encode(prompt).states).all()


class TestDamagedFolders:
    """What cannot be loaded is refused with the name of what is wrong."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """The embedded model, by links, to take apart."""
        for source in MODEL.rglob("*"):
            target = tmp_path / source.relative_to(MODEL)
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(source)
        return tmp_path

    def replace(self, path: Path, content: bytes) -> None:
        path.unlink()
        path.write_bytes(content)

    def test_no_index(self, folder: Path) -> None:
        (folder / "model_index.json").unlink()
        with pytest.raises(WeightsError, match=r"model_index\.json"):
            load(folder)

    def test_another_pipeline(self, folder: Path) -> None:
        self.replace(folder / "model_index.json", b'{"_class_name": "StableDiffusionPipeline"}')
        with pytest.raises(WeightsError, match="StableDiffusionPipeline"):
            load(folder)

    @pytest.mark.parametrize("name", ["transformer", "vae"])
    def test_a_cut_file(self, folder: Path, name: str) -> None:
        path = folder / name / "diffusion_pytorch_model.safetensors"
        self.replace(path, path.read_bytes()[:1000])
        with pytest.raises(WeightsError, match=name):
            load(folder)

    def test_a_missing_file(self, folder: Path) -> None:
        (folder / "text_encoder_2" / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match="text_encoder_2"):
            load(folder)

    def test_a_scheduler_of_another_kind(self, folder: Path) -> None:
        path = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(path.read_text()) | {"use_karras_sigmas": True}
        self.replace(path, json.dumps(config).encode())
        with pytest.raises(WeightsError, match="use_karras_sigmas"):
            load(folder)
