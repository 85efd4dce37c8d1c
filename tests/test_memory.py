"""What fits on which card, and that every way to use the memory draws the picture."""

from __future__ import annotations

import json
import resource
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux_local import weights
from flux_local.errors import StartError
from flux_local.model import hostmemory, memory
from flux_local.model.checkpoint import Checkpoint, identify
from flux_local.model.flux1 import CONFIGS, SCHEDULER, TRANSFORMER
from flux_local.model.layers import HostLinear, Linear
from flux_local.model.loader import Pipeline, load
from flux_local.model.memory import Plan, Sizes, Tier, plan, step_work
from flux_local.model.vae import Autoencoder
from flux_local.sizes import RATIOS, canvas_for, table_size
from tests.servers import MODEL, pictures, running, started
from tests.test_formats import drawn

GB = 1_000_000_000
CARDS: list[tuple[str, int, Tier]] = [
    ("H200", 150 * GB, "both"),
    ("A100 80 GB", 85 * GB, "both"),
    ("64 GB", 64 * GB, "both"),
    ("RTX 6000 Ada, 48 GB", 50 * GB, "both"),
    ("A100 40 GB", 42 * GB, "full"),
    ("RTX 5090, 32 GB", 33 * GB, "fp8"),
    ("RTX 4090, 24 GB", 25 * GB, "fp8"),
    ("RTX 4000 Ada, 20 GB", 21 * GB, "fp8"),
    ("RTX 4080, 16 GB", 16 * GB, "swap"),
    ("12 GB", 12 * GB, "offload"),
    ("8 GB", 8 * GB, "offload"),
]


def headers_of(module: torch.nn.Module, path: Path) -> None:
    """A safetensors file with the module's names and shapes and no numbers, of tensors that are one the first."""
    at, entries = 0, {}
    for name, tensor in module.named_parameters():
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


@pytest.fixture(scope="module")
def krea(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """FLUX.1's real shapes, without a number."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("krea")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for name in ("tokenizer", "tokenizer_2", "scheduler"):
        (folder / name).mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    with torch.device("meta"):
        modules = {
            "transformer": FluxTransformer2DModel.from_config(TRANSFORMER),
            "vae": AutoencoderKL.from_config(CONFIGS["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CONFIGS["text_encoder"])),
            "text_encoder_2": T5EncoderModel(T5Config(**CONFIGS["text_encoder_2"])),
        }
    for name, module in modules.items():
        (folder / name).mkdir()
        headers_of(module, folder / name / "model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(TRANSFORMER))
    return identify(folder)


def test_the_real_model_has_its_known_sizes(krea: Checkpoint) -> None:
    """12 billion, 4.8 billion, 123 and 84 million; and what a shape alone tells is the whole configuration."""
    sizes = Sizes.of(krea)
    assert sizes.transformer == pytest.approx(11.9e9, rel=0.01)
    assert sizes.blocks == 912 * 3072**2
    assert sizes.modulation == 344 * 3072**2
    assert sizes.t5 == pytest.approx(4.762e9, rel=0.001)
    assert sizes.clip == pytest.approx(123e6, rel=0.01)
    assert sizes.vae == pytest.approx(84e6, rel=0.01)
    assert (sizes.width, sizes.channels) == (3072, 256)
    (krea.home / "transformer" / "config.json").rename(krea.home / "aside")
    told = krea.config("transformer")
    (krea.home / "aside").rename(krea.home / "transformer" / "config.json")
    assert {name: told[name] for name in TRANSFORMER} == TRANSFORMER


@pytest.mark.parametrize(("card", "room", "tier"), CARDS)
def test_cards(card: str, room: int, tier: Tier, krea: Checkpoint) -> None:
    made = plan(Sizes.of(krea), room)
    assert made.tier == tier, f"{card}: {made}"
    assert made.needed <= room
    assert str(made.tier) in str(made)


def test_less_room_never_gets_a_better_way(krea: Checkpoint) -> None:
    sizes, order = Sizes.of(krea), ["both", "full", "fp8", "swap", "offload"]
    found = [order.index(plan(sizes, room * GB).tier) for room in range(140, 8, -1)]
    assert found == sorted(found)
    assert set(found) == set(range(5))


def test_what_does_not_fit_is_refused_with_what_would(krea: Checkpoint) -> None:
    with pytest.raises(StartError, match=r"4\.0 GB are free .* needs [67]\.\d GB at least"):
        plan(Sizes.of(krea), 4 * GB)
    with pytest.raises(StartError, match=r"needs \d\d\.\d GB at least\. --precisions both needs less"):
        plan(Sizes.of(krea), 10 * GB, "fp8")
    with pytest.raises(StartError, match="does not go with"):
        plan(Sizes.of(krea), 100 * GB, "full", "swap")


def test_precisions_and_memory_choose(krea: Checkpoint) -> None:
    sizes = Sizes.of(krea)
    assert plan(sizes, 150 * GB, "full").tier == "full"
    assert plan(sizes, 150 * GB, "fp8").tier == "fp8"
    assert plan(sizes, 25 * GB, "full").tier == "offload"
    assert plan(sizes, 150 * GB, "both", "swap").tier == "swap"
    assert plan(sizes, 5 * GB, "both", "full").needed > 30 * GB, "what is asked for is tried"
    assert plan(sizes, None, "fp8") == Plan("fp8")


def test_a_cpu_needs_memory_for_all_of_it_in_fp32(krea: Checkpoint) -> None:
    sizes = Sizes.of(krea)
    found = [plan(sizes, None, host_room=room * GB).tier for room in (128, 104, 96, 70)]
    assert found == ["both", "both", "full", "full"]
    assert plan(sizes, None, tier="swap", host_room=GB).tier == "swap", "what is asked for is tried"
    with pytest.raises(StartError, match=r"On the CPU this model needs 6\d GB of memory; 30 GB are free"):
        plan(sizes, None, host_room=30 * GB)


def test_engines_share_the_memory_of_their_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hostmemory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hostmemory, "OWN_GROUPS", tmp_path / "none")
    hostmemory.MEMINFO.write_text("MemTotal:       64000000 kB\nMemAvailable:   40000000 kB\n")
    assert [memory.host_room(sharing) // 1_024_000 for sharing in (1, 2, 4)] == [40000, 32000, 16000]


def test_a_container_s_limit_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own group's and those that it is in; what it keeps of files gives way."""
    monkeypatch.setattr(hostmemory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(hostmemory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(hostmemory, "GROUPS", tmp_path / "groups")
    hostmemory.MEMINFO.write_text("MemTotal:       64000000 kB\nMemAvailable:   40000000 kB\n")

    def group(path: str, files: dict[str, str]) -> None:
        (tmp_path / "groups" / path).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (tmp_path / "groups" / path / name).write_text(text + "\n")

    def room() -> tuple[int, int]:
        return hostmemory.total() // GB, hostmemory.available() // GB

    hostmemory.OWN_GROUPS.write_text("0::/pod/box\n")
    assert room() == (65, 40), "no such folders, no limit"
    stat = f"anon {5 * GB}\ninactive_file {2 * GB}\nactive_file {GB}"
    group("pod/box", {"memory.max": "max", "memory.current": str(8 * GB), "memory.stat": stat})
    assert room() == (65, 40)
    group("pod", {"memory.max": str(32 * GB), "memory.current": str(8 * GB), "memory.stat": stat})
    assert room() == (32, 27)
    group("pod/box", {"memory.max": str(16 * GB)})
    assert room() == (16, 11)
    hostmemory.OWN_GROUPS.write_text("5:devices:/\n4:cpu,memory:/docker/0123\n")  # version 1, as a container sees it
    old = {"memory.limit_in_bytes": str(12 * GB), "memory.usage_in_bytes": str(8 * GB)}
    group("memory", old | {"memory.stat": f"total_inactive_file {GB}\ntotal_active_file 0"})
    assert room() == (12, 5)
    assert memory.host_room(3) // GB == 4


@pytest.mark.parametrize("free", [24.5, 24.75, 24.95, 25.2, 25.4])
def test_whether_a_usual_picture_is_tiled_is_no_matter_of_what_is_free(krea: Checkpoint, free: float) -> None:
    laid_out = plan(Sizes.of(krea), int(free * GB))
    largest = max(canvas_for(table_size(ratio, "1K"), weights.KREA.canvas).area for ratio in RATIOS)
    assert laid_out.tile_above is None or laid_out.tile_above >= largest


def test_without_products_in_fp8_its_weights_are_no_smaller(krea: Checkpoint) -> None:
    sizes = Sizes.of(krea)
    real, emulated = (plan(sizes, 100 * GB, "both", "fp8", emulated=e) for e in (False, True))
    assert emulated.needed - real.needed == sizes.blocks
    assert (plan(sizes, 24 * GB).tier, plan(sizes, 24 * GB, emulated=True).tier) == ("fp8", "swap")


def test_what_is_short_goes_to_the_host(krea: Checkpoint) -> None:
    roomy, short = plan(Sizes.of(krea), 33 * GB), plan(Sizes.of(krea), 21 * GB)
    assert (roomy.modulation_on_host, short.modulation_on_host) == (False, True)
    assert (roomy.host, short.host) == (0, 1 << 33), "pinned memory comes in powers of two"
    assert roomy.tile_above is None
    assert short.tile_above is not None
    assert step_work(Sizes.of(krea).width, 1 << 20) < step_work(Sizes.of(krea).width, 1 << 22)


def test_what_waits_in_host_memory_has_to_fit_there(krea: Checkpoint) -> None:
    sizes = Sizes.of(krea)

    def laid_out(host: int, room: int = 12, tier: Tier | None = None) -> Plan:
        return plan(sizes, room * GB, tier=tier, host_room=host * GB)

    roomy, short = laid_out(60), laid_out(40)
    assert (roomy.tier, roomy.pinned, short.tier, short.pinned) == ("offload", True, "offload", False)
    assert short.host == pytest.approx(2 * (11.9e9 + 4.9e9), rel=0.02)
    assert 45 * GB < roomy.host < 55 * GB
    assert "not pinned" in str(short)
    with pytest.raises(StartError, match=r"of that 28\.0 GB are free and 33\.\d GB are needed"):
        laid_out(28)
    assert laid_out(28, tier="offload").tier == "offload", "what is asked for is tried"
    assert laid_out(10, room=21).tier == "fp8"
    with pytest.raises(StartError, match=r"of that 5\.0 GB are free and 8\.6 GB are needed"):
        laid_out(5, room=21)


def go_fast(pipeline: Pipeline) -> np.ndarray[Any, Any]:
    assert pipeline.fast is not None
    prompt = pipeline.text.encode("a large red star on a blue background")
    picture = pipeline.begin(prompt, 128, 128, seed=5, steps=6, guidance=4.5, go_fast=True)
    while picture.steps_left:
        pipeline.fast.advance([picture])
    return np.frombuffer(pipeline.vae.decode(picture.latents, 128, 128), np.uint8).astype(float)


def test_weights_in_host_memory_draw_the_same_bytes(pipeline: Pipeline) -> None:
    swapped = load(MODEL, tier="swap")
    assert swapped.precisions == ("fp8",)
    assert isinstance(swapped.denoiser.transformer.modulation, HostLinear)
    assert np.array_equal(drawn(swapped), go_fast(pipeline))


def test_blocks_brought_one_by_one_draw_what_the_reference_does() -> None:
    offloaded = load(MODEL, tier="offload")
    assert offloaded.precisions == ("fp32",)
    assert "_diffusers_hook" in vars(next(iter(offloaded.denoiser.transformer.module.transformer_blocks)))
    assert np.array_equal(drawn(offloaded), drawn(load(MODEL, reference=True)))


def test_a_text_encoder_in_fp8_reads_nearly_the_same(pipeline: Pipeline) -> None:
    small = load(MODEL, tier="fp8")
    prompt = "a large red star on a blue background"
    ours, theirs = small.text.encode(prompt).states, pipeline.text.encode(prompt).states
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.08
    error = float(np.mean((drawn(small) - go_fast(pipeline)) ** 2))
    assert 10 * np.log10(255**2 / error) > 18


def test_a_layer_in_host_memory_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from flux_local.model import layers

    monkeypatch.setattr(layers, "HOST_ROWS", 5)
    plain = Linear(torch.randn(12, 8), torch.randn(12))
    host, x = HostLinear.of(plain, torch.device("cpu")), torch.randn(3, 8)
    torch.testing.assert_close(host(x), plain(x))
    host.into(out := torch.empty(3, 12), x)
    assert torch.equal(out, host(x))


def test_pictures_of_one_request_share_what_their_steps_do(pipeline: Pipeline) -> None:
    prompt, sigmas = pipeline.text.encode("a red circle"), [1.0, 0.5]
    first = pipeline.condition(prompt, sigmas, 4.5, False)
    assert pipeline.condition(prompt, sigmas, 4.5, False) is first
    for other in ((prompt, sigmas, 4.5, True), (prompt, sigmas, 4.0, False), (prompt, [1.0, 0.6], 4.5, False)):
        assert pipeline.condition(*other) is not first
    pipeline.make_room()
    again = pipeline.condition(prompt, sigmas, 4.5, False)
    assert again is not first
    assert torch.equal(again.modulation, first.modulation)


def test_tiles_join_without_seams(pipeline: Pipeline) -> None:
    """A canvas of several tiles, against one piece."""
    latents = torch.cat([pipeline.vae.encode(bytes(384 * 384 * 3), 384, 384)])
    picture = pipeline.begin(pipeline.text.encode("a red circle"), 128, 128, seed=5, steps=6, guidance=4.5)
    while picture.steps_left:
        pipeline.denoiser.advance([picture])
    small = picture.latents.view(8, 8, 64)
    latents = small.repeat_interleave(3, 0).repeat_interleave(3, 1).reshape(1, 576, 64)
    tiled = Autoencoder(pipeline.vae.vae, tile_above=256 * 256)
    whole = np.frombuffer(pipeline.vae.decode(latents, 384, 384), np.uint8).astype(float)
    parts = np.frombuffer(tiled.decode(latents, 384, 384), np.uint8).astype(float)
    error = float(np.mean((whole - parts) ** 2))
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 24
    assert tiled.decode(picture.latents, 128, 128) == pipeline.vae.decode(picture.latents, 128, 128)


def test_served_from_host_memory(tmp_path: Path) -> None:
    with running(tmp_path, "--memory", "swap") as server:
        assert "memory    swap: " in server.output
        body = {"prompt": "a red star", "size": "128x128", "steps": 4, "seed": 1, "response_format": "b64_json"}
        first = server.post(body)
        assert pictures(first) == pictures(server.post(body | {"go_fast": True}))
        refused = server.post(body | {"go_fast": False})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "go_fast")
        ready = server.client().get("/../ready", cast_to=object)
        assert ready["precisions"] == ["fp8"]  # type: ignore[index]


def test_served_block_by_block(tmp_path: Path) -> None:
    with running(tmp_path, "--memory", "offload") as server:
        assert pictures(server.post({"prompt": "a red star", "size": "128x128", "steps": 4, "n": 2, "seed": 1,
                                     "response_format": "b64_json"}))  # fmt: skip


def test_a_picture_is_drawn_in_the_memory_of_the_one_before() -> None:
    """Pages that the kernel brought for a picture after the first two: thousands if what was freed went back to it."""
    pipeline = load(MODEL, precisions="full")

    def pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        drawn(pipeline)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert statistics.median([pages() for _ in range(7)][2:]) < 500


def test_settings_that_contradict_end_the_start(tmp_path: Path) -> None:
    with started(tmp_path, "--memory", "swap", "--precisions", "full") as server:
        assert server.process.wait(timeout=60) != 0
        assert "does not go with" in server.output


def test_a_model_that_says_less_gets_flux1s_own(krea: Checkpoint) -> None:
    assert weights.info(krea.path).canvas.max_area > 4_000_000
    assert krea.scheduler()["use_dynamic_shifting"] is True


def test_what_an_error_means() -> None:
    """CUDA's own errors carry its numbers: 2 is cudaErrorMemoryAllocation, 700 an illegal address."""
    short, lost = (torch.AcceleratorError("CUDA error") for _ in range(2))
    short.error_code, lost.error_code = 2, 700  # type: ignore[attr-defined]
    assert memory.is_exhausted(short)
    assert not memory.is_fatal(short)
    assert memory.is_fatal(lost)
    assert not memory.is_exhausted(lost)
    assert memory.is_exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    for harmless in (RuntimeError("shapes do not match"), ValueError("no"), torch.OutOfMemoryError("CUDA")):
        assert not memory.is_fatal(harmless)
