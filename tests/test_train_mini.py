"""The training script, from nothing to a folder that serves, in as few steps as will run."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel
from mini import finish, flow, outlines, practice, vae
from mini.drawings import COLOURS, FIRST, RADII, WHOLE, Scene, Thing, draw, on_lattice, outline, random_scene, unit
from mini.judge import judge
from mini.pools import Pools, encoded
from mini.run import Run, between
from mini.text import byte_pairs, lend_words
from mini.vae import as_tensor, psnr, rendered
from mini.widen import widened
from safetensors.torch import load_file

from flux_local.model.latents import position_ids
from flux_local.sizes import Size, canvas_for
from tests.servers import ROOT

STAGES = ("practice", "outlines", "finish")


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
def test_it_trains_goes_on_exports_and_evaluates(tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    command = [sys.executable, ROOT / "scripts" / "train_mini.py", "--out", folder, "--work", work,
               "--world", "first", "--batch", "8", "--eager"]  # fmt: skip

    def run(*flags: str) -> str:
        done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("--scale", "0.001")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    first, vocabulary = weights.read_bytes(), tokenizer.read_bytes()
    assert (work / "losses.png").stat().st_size > 1000
    assert [len(list(work.glob(f"{stage}-*.png"))) for stage in ("samples", *STAGES)] == [1, 1, 1, 1]
    weights.unlink()
    run("--scale", "0.001")
    assert weights.read_bytes() == first, "a run that has ended must not train on"
    assert tokenizer.read_bytes() == vocabulary, "another process gives the words the same numbers"
    begun, text = tmp_path / "begun", Path("text_encoder_2") / "model.safetensors"
    warm = ["--begin", str(folder), "--known", "--out", str(begun), "--work", str(tmp_path / "warm")]
    run(*warm, "--scale", "0.001")
    assert (begun / text).read_bytes() == (folder / text).read_bytes()
    assert (begun / weights.relative_to(folder)).read_bytes() != first
    outlined = begun.parent / "outlined"
    run(*warm[:2], "--only", "outlines", "--out", str(outlined), "--seed", "5", "--work", str(tmp_path / "outlines"),
        "--scale", "0.0002", "--batch", "40", "--workers", "2")  # fmt: skip
    assert not list((tmp_path / "outlines").glob("practice*"))
    assert (outlined / text).read_bytes() == (folder / text).read_bytes()
    assert "_name_or_path" not in (outlined / "vae" / "config.json").read_text()
    assert (outlined / "tokenizer" / "tokenizer.json").read_bytes() == vocabulary
    assert (outlined / weights.relative_to(folder)).read_bytes() != first
    decoder = Path("vae") / "diffusion_pytorch_model.safetensors"
    finished = begun.parent / "finished"
    run(*warm[:2], "--only", "finish", "--out", str(finished), "--work", str(tmp_path / "finish"), "--scale", "0.002")
    assert (finished / weights.relative_to(folder)).read_bytes() == first
    before, after = load_file(folder / decoder), load_file(finished / decoder)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    for kept in (begun, outlined):
        assert (kept / decoder).read_bytes() == (folder / decoder).read_bytes()
    wider = begun.parent / "wider"
    run(*warm[:2], "--world", "whole", "--out", str(wider), "--work", str(tmp_path / "wider work"), "--scale", "0.0002")
    for part in (text, decoder, weights.relative_to(folder)):
        assert (wider / part).read_bytes() != (folder / part).read_bytes(), "a larger world is new to all parts"
    output = run("--evaluate", "--brief", "--count", "6", "--canvases", "128x128", "--steps", "2")
    assert "128x128" in output
    assert (folder / "samples.png").stat().st_size > 1000


def test_prompts_are_false_only_where_the_picture_can_be_told() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, 128, 128) for _ in range(2000)]

    def fits(prompt: str, scene: Scene) -> bool:
        return all(f"{thing.colour} {thing.shape}" in prompt.lower() for thing in scene.things)

    def shares(level: float) -> Counter[str]:
        prompts = flow.worded(scenes, torch.full((len(scenes),), level), random.Random(1), FIRST)
        return Counter(
            "none" if not prompt else "own" if fits(prompt, scene) else "other"
            for scene, prompt in zip(scenes, prompts, strict=True)
        )

    assert shares(1.0)["other"] < 0.02 * len(scenes)
    assert 0.25 * len(scenes) < shares(0.3)["other"] < 0.32 * len(scenes)
    assert all(0.08 * len(scenes) < shares(level)["none"] < 0.12 * len(scenes) for level in (0.3, 1.0))


CORNERS = [(240, 64), (64, 256), (384, 96), (96, 384)]  # as wide and as tall as canvases may be


@pytest.mark.parametrize("canvas", [flow.SQUARE, *flow.OTHER_SHAPES, *flow.LARGEST_SHAPES, *CORNERS])
def test_what_is_drawn_fits_its_canvas_and_is_as_large_as_in_a_square(canvas: tuple[int, int]) -> None:
    rng = random.Random(0)
    for _ in range(60):
        scene = random_scene(rng, *canvas)
        pixels = unit(scene, *canvas)
        assert pixels > 0.5 * math.sqrt(canvas[0] * canvas[1]) or 2 * min(canvas) < max(canvas)
        for thing in scene.things:
            x, y = (part * side for part, side in zip(thing.centre, canvas, strict=True))
            points = outline(thing.shape, x, y, thing.radius * pixels)
            assert all(-1 <= px <= canvas[0] + 1 and -1 <= py <= canvas[1] + 1 for px, py in points)
        assert judge(draw(scene, *canvas), scene).size is not False
    assert unit(random_scene(rng, 128, 128, things=1), *canvas) == min(
        math.sqrt(canvas[0] * canvas[1]), 1.3 * min(canvas)
    )


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(ROOT / "weights" / "flux-krea-mini" / "vae", torch_dtype=torch.float32)


def mended(
    folder: Path, vae: AutoencoderKL, scenes: list[Scene], pictures: list[Scene], canvas: tuple[int, int]
) -> list[Scene]:
    """What the scenes should have been where `pictures` were drawn; every other prompt leaves the background open."""
    run = Run(folder, 0, torch.device("cpu"), FIRST)
    latents = encoded(run, vae, pictures, *canvas)
    return practice.mended(run, vae, scenes, [i % 2 == 0 for i in range(len(scenes))], latents, *canvas)


def test_the_autoencoder_gives_drawings_back_crisp_and_without_halos(autoencoder: AutoencoderKL) -> None:
    assert psnr(autoencoder, torch.device("cpu"), 128, WHOLE, count=32) >= 34
    rng, beyond = random.Random(0), []
    for _ in range(16):
        scene = random_scene(rng, 128, 128, 1, WHOLE, pattern="plain")
        drawing = rendered([scene], 128, 128)
        with torch.no_grad():
            back = autoencoder.decode(autoencoder.encode(drawing).latent_dist.mean).sample.clamp(-1, 1)
        first, second = (
            torch.tensor(COLOURS[name])[:, None, None] / 127.5 - 1
            for name in (scene.background, scene.things[0].colour)
        )
        way = second - first
        right, found = (((x[0] - first) * way).sum(0) / way.square().sum() for x in (drawing, back))  # from 0 to 1
        low, high = (F.max_pool2d(sign * right[None], 5, 1, 2)[0] * sign for sign in (-1, 1))
        beside = (high - low > 0) & ((right < 0.001) | (right > 0.999))  # of one colour, two pixels from the other
        beyond.append(((-found).clamp(min=0) + (found - 1).clamp(min=0))[beside].mean().item())
    assert sum(beyond) / len(beyond) < 0.01, "of the difference between both colours"


def test_practice_goes_over_every_canvas_that_the_model_may_be_asked_for() -> None:
    asked = {tuple(canvas_for(Size(w, h), flow.CANVAS)) for w in range(64, 512, 16) for h in range(64, 512, 16)}
    assert asked - set(practice.CANVASES) <= {c for c in asked if c[0] * c[1] > flow.CANVAS.max_area}  # the 5% over
    assert all(practice.CANVASES.count(canvas) > 1 for canvas in (flow.SQUARE, *flow.LARGEST_SHAPES))


def test_words_that_were_never_heard_are_read_as_what_they_mean() -> None:
    painter = flow.Painter(0)
    apart = [painter.read([text]) for text in ("a small red circle", "a TINY crimson disc")]
    assert not torch.equal(apart[0][0], apart[1][0])
    lend_words(FIRST, 0, (painter.tokenizer, painter.text_encoder), (painter.tokenizer_2, painter.text_encoder_2))
    read = painter.read(
        ["a small red circle", "a TINY crimson disc", "a simple circle", "a beautiful cat", "a blue disc"]
    )
    for states in read:
        assert torch.equal(states[0], states[1])
        assert not torch.equal(states[2], states[4])
    assert torch.equal(painter.read(["a small red circle"])[0], apart[0][0])
    assert torch.equal(painter.read(["a simple simple"])[0], painter.read(["a beautiful cat"])[0])


@pytest.mark.parametrize("canvas", [flow.SQUARE, *flow.OTHER_SHAPES[-4:], *flow.LARGEST_SHAPES[:1], *CORNERS[-2:]])
def test_a_right_drawing_is_mended_to_itself(
    canvas: tuple[int, int], tmp_path: Path, autoencoder: AutoencoderKL
) -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng, *canvas) for _ in range(40)]
    assert mended(tmp_path, autoencoder, scenes, scenes, canvas) == scenes


def test_a_thing_is_as_large_as_it_was_drawn_if_a_sentence_leaves_it_open(
    tmp_path: Path, autoencoder: AutoencoderKL
) -> None:
    drawn = [
        on_lattice(Scene("green", (Thing("red", "star", "large", (0.5, 0.5), radius),)), *flow.SQUARE)
        for radius in RADII["single"]["large"]
    ]
    assert len(set(drawn)) == 2
    assert mended(tmp_path, autoencoder, drawn[::-1], drawn, flow.SQUARE) == drawn


def test_a_wrong_drawing_is_mended_to_what_was_asked(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    def pair(background: str, left: tuple[str, str], right: tuple[str, str]) -> Scene:
        things = (Thing(*left, "small", (0.265, 0.5), 0.145), Thing(*right, "large", (0.735, 0.5), 0.215))
        return on_lattice(Scene(background, things, "left of"), *flow.SQUARE)

    asked = pair("blue", ("red", "star"), ("yellow", "circle"))
    drawn = [
        pair("blue", ("red", "heart"), ("yellow", "circle")),  # another shape
        pair("green", ("red", "star"), ("yellow", "circle")),  # a background that the prompt leaves open
        pair("blue", ("red", "star"), ("orange", "square")),  # another colour and shape
        Scene("white", ()),  # nothing
    ]
    found = mended(tmp_path, autoencoder, [asked] * len(drawn), drawn, flow.SQUARE)
    assert [scene.background for scene in found] == ["blue", "green", "blue", "white"]
    for scene in found:
        assert [(t.colour, t.shape, t.size) for t in scene.things] == [
            ("red", "star", "small"), ("yellow", "circle", "large"),
        ]  # fmt: skip
        assert [(t.centre, t.radius) for t in scene.things] == [(t.centre, t.radius) for t in asked.things]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast, in the encoders' norms
@pytest.mark.slow
def test_outlines_are_learnt_as_pixels_where_a_drawing_can_be_told(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    run = Run(tmp_path, 0, torch.device("cpu"), FIRST, batch=4)
    pools = Pools(run, autoencoder, [(128, 96)], run.batch, 1, 0)
    lessons = [lesson for turn in range(3) for lesson in outlines.told(run, flow.Painter(0).eval(), pools, turn)]
    assert all(0 < lesson.sigma.min() <= lesson.sigma.max() < outlines.TOLD for lesson in lessons)
    assert 0 < sum(lesson.guidance.eq(flow.GUIDANCE).sum().item() for lesson in lessons) < 4 * len(lessons)
    lesson = lessons[0]
    right = lesson.noisy - lesson.sigma[:, None, None] * lesson.wanted
    assert torch.allclose(right, pools(0)[1], atol=1e-5), "it leads to the drawing"
    by_the_prompt = practice.usual(run, pools, 0, alone=1)
    assert by_the_prompt.guidance.tolist() == [1.0] * 4
    assert practice.usual(run, pools, 0).guidance[1] > 1.0
    assert outlines.seen(run, autoencoder, lesson.wanted, lesson) == 0, "the right velocity leads to the right picture"
    errors = []
    for size in (0.1, 0.5):
        wrong = (lesson.wanted + size * torch.randn_like(lesson.wanted)).requires_grad_()
        error = outlines.seen(run, autoencoder, wrong, lesson)
        error.backward()  # type: ignore[no-untyped-call]
        errors.append(error.item())
        assert wrong.grad is not None
        moved = wrong.grad.abs().amax(dim=(1, 2))
        assert (moved > 0).tolist() == [True, True, False, False], "the first half is decoded"
    assert 0 < errors[0] < errors[1]


@pytest.mark.filterwarnings("ignore:Mismatch dtype", "ignore:.torch_dtype. is deprecated")
@pytest.mark.slow
def test_the_decoder_learns_what_the_painter_meant(tmp_path: Path, autoencoder: AutoencoderKL) -> None:
    run = Run(tmp_path, 0, torch.device("cpu"), WHOLE, batch=10)
    painter = flow.kept(ROOT / "weights" / "flux-krea-mini", 0).eval()
    lessons = finish.lessons(run, painter, autoencoder, 0)
    rng = random.Random(f"{run.seed} finish 0")
    drawn = sum(len(meant) for _, meant in finish.drawn(run, painter, autoencoder, 0, rng))
    assert drawn == finish.AT_A_TIME * 8, "one or two in ten are astray"
    windows = [lesson for lesson in lessons if lesson.meant.shape[1:3] == (finish.WINDOW, finish.WINDOW)]
    assert sum(len(lesson.meant) for lesson in windows) == finish.REUSE * drawn
    assert finish.WHOLE_EVERY - 1.5 < len(lessons) / (len(lessons) - len(windows)) < finish.WHOLE_EVERY + 1.5
    errors = []
    for lesson in lessons:
        with torch.no_grad():
            made = autoencoder.decode(lesson.latents).sample
        wanted = as_tensor(lesson.meant)
        assert made.shape == wanted.shape
        errors.append((made - wanted).abs().mean())
    assert max(errors) < 0.3
    assert sum(errors) / len(errors) < 0.05, "what was drawn is what was meant, but for outlines"
    flat = [(picture == picture[0, 0]).all() for lesson in windows for picture in (*lesson.meant, *lesson.others)]
    assert sum(flat) / len(flat) < 0.1, "most windows have edges"


def test_latents_are_turned_as_pictures_are(autoencoder: AutoencoderKL) -> None:
    x = rendered([random_scene(random.Random(3), 96, 64, 2, WHOLE)], 96, 64)
    pixels = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with torch.no_grad():
        latents = autoencoder.encode(x).latent_dist.mean[0]
        for way in range(8):
            turned = as_tensor(np.ascontiguousarray(vae.turned(pixels, way))[None])
            expected = autoencoder.encode(turned).latent_dist.mean[0]
            assert (vae.turned_latents(latents, way) - expected).abs().max() < 0.01, way


def test_the_finish_wants_edges_as_steep_as_they_are_wherever_they_lie() -> None:
    scene = Scene("blue", (Thing("red", "star", "large", (0.5, 0.5), 0.33),))
    right = rendered([scene], 128, 128)
    moved = right.roll(1, 3)
    kernel = torch.full((3, 1, 3, 3), 1 / 9)
    soft = F.conv2d(F.pad(right, (1, 1, 1, 1), "replicate"), kernel, groups=3)
    halos = right + 0.5 * (right - soft)
    steep = finish.steepest(right)

    def off(made: torch.Tensor) -> float:
        return float((finish.steepest(made) - steep).abs().mean() / steep.mean())

    assert off(right) == 0
    assert off(moved) < min(off(soft), off(halos))
    loss, *others = [float(finish.difference(made, right)) for made in (right, soft, halos)]
    assert loss < min(others)


@pytest.mark.slow
def test_what_is_returned_of_outlines_is_between_the_weights_before_and_after() -> None:
    first, second = flow.Painter(0), flow.Painter(0)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1.0)
    old, new = ([p.detach().clone() for p in painter.parameters()] for painter in (first, second))
    found = list(between(first, second, 0.25).parameters())
    assert all(torch.allclose(f, 0.75 * a + 0.25 * b, atol=1e-6) for f, a, b in zip(found, old, new, strict=True))
    assert all(torch.equal(a, p) for a, p in zip(old, first.parameters(), strict=True))


def test_practice_is_at_all_noise_levels() -> None:
    """At a few alone, the painter would do there what it was practised in, and elsewhere something else."""
    rng = random.Random(0)
    found = [practice.noise_levels(rng, 64) for _ in range(200)]
    for levels in found:
        assert (levels[0], levels[-1]) == (1.0, 0.0)
        assert levels == sorted(set(levels), reverse=True)
        assert practice.DRAWN_IN[0] <= len(levels) - 1 <= practice.DRAWN_IN[1]
    assert len({round(level, 3) for levels in found for level in levels}) > 400


def test_merges_do_not_depend_on_the_order_of_words() -> None:
    words = {"low": 10, "lot": 10, "new": 10, "net": 10, "rare": 3}
    merges = byte_pairs(Counter(words))
    assert merges == byte_pairs(Counter(dict(reversed(words.items()))))
    assert merges[:2] == [("l", "o"), ("n", "e")]
    assert {"".join(pair) for pair in merges} >= {"low</w>", "lot</w>", "new</w>", "net</w>"}
    assert ("r", "a") not in merges


def test_a_widened_transformer_draws_the_same_and_all_of_it_can_learn() -> None:
    narrow = FluxTransformer2DModel.from_pretrained(
        ROOT / "weights" / "flux-krea-mini" / "transformer", torch_dtype=torch.float32
    )
    torch.manual_seed(0)
    wide = FluxTransformer2DModel(**{**narrow.config, "num_attention_heads": narrow.config.num_attention_heads + 1})
    flow.start_closed(wide)
    wide.load_state_dict(widened(narrow, wide))
    inputs = {
        "hidden_states": torch.randn(2, 64, 64),
        "encoder_hidden_states": torch.randn(2, 32, narrow.config.joint_attention_dim),
        "pooled_projections": torch.randn(2, narrow.config.pooled_projection_dim),
        "timestep": torch.tensor([0.9, 0.2]),
        "guidance": torch.full((2,), 4.5),
        "img_ids": position_ids(128, 128),
        "txt_ids": torch.zeros(32, 3),
        "return_dict": False,
    }
    expected, found = narrow(**inputs)[0], wide(**inputs)[0]
    assert (found - expected).square().mean() < 0.03**2 * expected.square().mean()
    (found - torch.randn_like(found)).square().mean().backward()
    heads, old = wide.config.num_attention_heads, narrow.config.num_attention_heads * narrow.config.attention_head_dim
    new = heads * wide.config.attention_head_dim
    gradients = {name: parameter.grad for name, parameter in wide.named_parameters()}
    for name, rows in (
        ("x_embedder.weight", slice(old, new)),
        ("time_text_embed.text_embedder.linear_2.weight", slice(old, new)),
        ("transformer_blocks.0.norm1.linear.bias", slice(2 * new + old, 3 * new)),
    ):
        assert gradients[name][rows].abs().min() > 0, name
    assert gradients["transformer_blocks.0.attn.to_out.0.weight"][:old, old:].abs().min() > 0
