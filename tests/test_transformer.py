"""Our transformer against diffusers' `FluxTransformer2DModel`, on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flux_local.model.denoiser import Denoiser, Picture
from flux_local.model.flux1 import TRANSFORMER
from flux_local.model.geometry import Geometry
from flux_local.model.latents import initial_noise
from flux_local.model.layers import Layers
from flux_local.model.loader import Pipeline
from flux_local.model.ops import Layout, gathered, scattered
from flux_local.model.reference import ReferenceTransformer
from flux_local.model.text import PromptEmbedding
from flux_local.model.transformer import FluxTransformer
from tests.servers import MODEL

TOLERANCE = 1e-5
FULL_WIDTHS = TRANSFORMER | {"num_layers": 2, "num_single_layers": 2}
SMALL = FULL_WIDTHS | {"num_attention_heads": 2, "attention_head_dim": 16, "axes_dims_rope": (4, 6, 6)}


def random_module(config: dict[str, Any]) -> Any:
    """diffusers' transformer with weights that keep activations of about one, as trained ones do."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        module = FluxTransformer2DModel(**config)
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm_q.weight") or name.endswith("norm_k.weight") or "norm_added" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0.0, 0.5 * parameter.shape[-1] ** -0.5, generator=generator)
    return module.eval().requires_grad_(False)


def prompt_of(config: dict[str, Any], text: int, seed: int) -> PromptEmbedding:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, text, config["joint_attention_dim"], generator=generator)
    return PromptEmbedding(states, torch.randn(1, config["pooled_projection_dim"], generator=generator), text, "")


def both(module: Any) -> tuple[ReferenceTransformer, FluxTransformer]:
    return ReferenceTransformer(module), FluxTransformer(
        Geometry.of(module.config), Layers(module.state_dict().__getitem__)
    )


def velocities(module: Any, batch: int, width: int, height: int, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pictures through both, each at a step, guidance and prompt of its own."""
    sigmas = [1.0, 0.7, 0.4]
    latents = torch.cat([initial_noise(i, width, height) for i in range(batch)])
    prompts = [prompt_of(module.config, text, i) for i in range(batch)]
    steps = [i % len(sigmas) for i in range(batch)]
    found = []
    for transformer in both(module):
        conditions = [transformer.condition(prompt, sigmas, 1.0 + 1.3 * i) for i, prompt in enumerate(prompts)]
        found.append(transformer.velocity(latents, conditions, steps, width, height))
    return found[0], found[1]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize(("batch", "width", "height", "text"), [(1, 64, 64, 8), (2, 96, 32, 5), (3, 16, 112, 1)])
def test_equal_to_diffusers(batch: int, width: int, height: int, text: int, guided: bool) -> None:
    theirs, ours = velocities(random_module(SMALL | {"guidance_embeds": guided}), batch, width, height, text)
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.05


@pytest.mark.slow
def test_equal_at_the_real_widths() -> None:
    """FLUX.1's own widths, heads and prompt length, two blocks of each kind."""
    theirs, ours = velocities(random_module(FULL_WIDTHS), 2, 256, 192, 512)
    assert (ours - theirs).abs().max() < TOLERANCE
    assert theirs.std() > 0.05


def final_latents(transformer: Any, prompt: PromptEmbedding, sigmas: list[float]) -> torch.Tensor:
    latents = initial_noise(11, 128, 128).to(transformer.dtype)
    condition = transformer.condition(prompt, sigmas[:-1], 4.5)
    picture = Picture(128, 128, sigmas, latents, prompt, condition)
    denoiser = Denoiser(transformer)
    while picture.steps_left:
        denoiser.advance([picture])
    return picture.latents.double()


def test_bf16_is_as_near_to_the_truth_as_that_of_diffusers(pipeline: Pipeline) -> None:
    """Over a whole picture of the embedded model: error of the latents against fp32."""
    from diffusers import FluxTransformer2DModel

    errors: dict[str, list[float]] = {"theirs": [], "ours": []}
    for text in ("a large red star on a blue background", "a small white heart on a green background"):
        prompt = pipeline.text.encode(text)
        sigmas = pipeline.schedule.sigmas(6, 64)
        truth = final_latents(pipeline.denoiser.transformer, prompt, sigmas)
        module = FluxTransformer2DModel.from_pretrained(MODEL / "transformer", torch_dtype=torch.bfloat16)
        rounded = PromptEmbedding(prompt.states.bfloat16(), prompt.pooled.bfloat16(), prompt.tokens, prompt.read)
        for name, transformer in zip(errors, both(module.eval().requires_grad_(False)), strict=True):
            errors[name].append(float((final_latents(transformer, rounded, sigmas) - truth).norm() / truth.norm()))
    assert 0 < sum(errors["ours"]) <= 1.1 * sum(errors["theirs"])


def test_a_picture_does_not_know_how_many_steps_it_has_left_out(pipeline: Pipeline) -> None:
    """The modulation of a step is that of its noise level, wherever in the schedule it lies."""
    prompt = pipeline.text.encode("a small white heart on a green background")
    transformer = pipeline.denoiser.transformer
    whole = transformer.condition(prompt, [1.0, 0.5, 0.25], 3.0).modulation
    rest = transformer.condition(prompt, [0.5, 0.25], 3.0).modulation
    torch.testing.assert_close(whole[1:], rest, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_scattered_undoes_gathered(batch: int) -> None:
    layout = Layout(batch, 5, 7)
    rows = torch.arange(layout.rows * 2).view(layout.rows, 2)
    together = gathered(rows, layout)
    assert together.shape == (batch, 12, 2)
    assert torch.equal(together[-1, 0], rows[(batch - 1) * 5])
    assert torch.equal(together[-1, 5], rows[batch * 5 + (batch - 1) * 7])
    assert torch.equal(scattered(together, layout), rows)
