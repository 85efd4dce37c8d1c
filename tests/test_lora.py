"""LoRA adapters: merged exactly, taken out without a trace, chosen by requests, and refused where they are none."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from mini.judge import look
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_local.errors import InvalidValue
from flux_local.model.checkpoint import Part, of_folder
from flux_local.model.fp8 import in_fp8
from flux_local.model.geometry import Geometry
from flux_local.model.headers import read_header
from flux_local.model.layers import Layers
from flux_local.model.loader import load
from flux_local.model.lora import KEPT, Adapters, Factors, read, shapes
from flux_local.model.tensors import Tensors
from flux_local.model.transformer import FluxTransformer
from tests.servers import MODEL, ROOT, Server, pictures, running
from tests.test_transformer import SMALL, prompt_of, random_module

RANK = 4
BODY = {"prompt": "a large red star on a blue background", "size": "128x128", "steps": 6, "seed": 3,
        "response_format": "b64_json"}  # fmt: skip


ALL_KINDS = (
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.1.norm1_context.linear", "single_transformer_blocks.1.proj_mlp", "x_embedder",
    "norm_out.linear",
)  # fmt: skip


def factors(layers: dict[str, tuple[int, int]], seed: int = 0, size: float = 0.3) -> dict[str, Factors]:
    """Random factors for the layers given with their [out, in]."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int) -> Tensor:
        return size * torch.randn(rows, columns, generator=generator) * columns**-0.5

    return {name: Factors(random(out, RANK), random(RANK, into)) for name, (out, into) in layers.items()}


def asked(path: Path, scale: float = 1.0) -> tuple[str, float, int]:
    """As a request asks for the file that is there now."""
    return str(path), scale, path.stat().st_mtime_ns


def diffusers_layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    found = {}
    for name, f in adapter.items():
        found[f"transformer.{name}.lora_A.weight"] = f.down.clone()
        found[f"transformer.{name}.lora_B.weight"] = f.up.clone()
    return found


def kohya_layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    """As Kohya's trainer writes it: BFL's layer names, and an alpha of half the rank."""
    names = {
        r"transformer_blocks\.(\d+)\.attn\.to_out\.0": "double_blocks_{}_img_attn_proj",
        r"transformer_blocks\.(\d+)\.ff\.net\.2": "double_blocks_{}_img_mlp_2",
        r"single_transformer_blocks\.(\d+)\.proj_out": "single_blocks_{}_linear2",
    }
    found = {}
    for name, f in adapter.items():
        for pattern, theirs in names.items():
            if match := re.fullmatch(pattern, name):
                key = "lora_unet_" + theirs.format(match[1])
                found |= {f"{key}.lora_down.weight": f.down.clone(), f"{key}.lora_up.weight": 2 * f.up,
                          f"{key}.alpha": torch.tensor(RANK / 2)}  # fmt: skip
    assert len(found) == 3 * len(adapter)
    return found


def xlabs_layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    found = {}
    for name, f in adapter.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.attn\.(to_out\.0|to_add_out)", name)
        assert match
        key = f"double_blocks.{match[1]}.processor.proj_lora{1 if match[2] == 'to_out.0' else 2}"
        found |= {f"{key}.down.weight": f.down.clone(), f"{key}.up.weight": f.up.clone()}
    return found


def onetrainer_layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    """diffusers' names with underlines, and an alpha of half the rank."""
    found = {}
    for name, f in adapter.items():
        key = "lora_transformer_" + name.replace(".", "_")
        found |= {f"{key}.lora_down.weight": f.down.clone(), f"{key}.lora_up.weight": 2 * f.up,
                  f"{key}.alpha": torch.tensor(RANK / 2)}  # fmt: skip
    return found | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 4)}


def prefixed(prefix: str, suffix: str) -> Callable[[dict[str, Factors]], dict[str, Tensor]]:
    """diffusers' names after and before something else."""

    def layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
        found = {}
        for name, f in adapter.items():
            found |= {f"{prefix}{name}.lora_A{suffix}": f.down.clone(), f"{prefix}{name}.lora_B{suffix}": f.up.clone()}
        return found

    return layout


def bfl_layout(adapter: dict[str, Factors]) -> dict[str, Tensor]:
    """Black Forest Labs' names: query, key and value are one matrix, which one factor reads; shift before scale."""
    found: dict[str, Tensor] = {}
    joined = {name: f for name, f in adapter.items() if ".to_" in name and "to_out" not in name}
    for block in {name.rsplit(".", 1)[0] for name in joined}:
        q, k, v = (joined[f"{block}.{part}"] for part in ("to_q", "to_k", "to_v"))
        names = {
            "transformer_blocks": "double_blocks.{}.img_attn.qkv",
            "single_transformer_blocks": "single_blocks.{}.linear1",
        }
        stem, index, _ = block.split(".")
        key, parts = "diffusion_model." + names[stem].format(index), [q.up, k.up, v.up]
        if stem.startswith("single"):
            parts.append(adapter[f"{stem}.{index}.proj_mlp"].up)
        found |= {f"{key}.lora_A.weight": q.down.clone(), f"{key}.lora_B.weight": torch.cat(parts)}
    shift, scale = adapter["norm_out.linear"].up.chunk(2)[::-1]
    last, down = "diffusion_model.final_layer.adaLN_modulation.1", adapter["norm_out.linear"].down.clone()
    return found | {f"{last}.lora_down.weight": down, f"{last}.lora_up.weight": 2 * torch.cat([shift, scale]),
                    f"{last}.alpha": torch.tensor(RANK / 2)}  # fmt: skip


def merged(state: dict[str, Tensor], adapter: dict[str, Factors], scale: float) -> dict[str, Tensor]:
    """A state dict with the adapter added to its weights."""
    changed = dict(state)
    for name, f in adapter.items():
        changed[f"{name}.weight"] = state[f"{name}.weight"] + scale * f.up @ f.down
    return changed


def weights_of(transformer: FluxTransformer) -> list[Tensor]:
    return [linear.weight.clone() for linear in transformer.linears()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def small() -> tuple[dict[str, Tensor], FluxTransformer]:
    """A random model's state dict and our transformer of it, which shares none of its memory."""
    module = random_module(SMALL)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return state, FluxTransformer(Geometry.of(module.config), Layers(lambda name: state[name].clone()))


@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_a_merged_transformer_is_one_of_merged_weights(small: Any, scale: float, tmp_path: Path) -> None:
    state, transformer = small
    first, second = factors(shapes(transformer)), factors({"proj_out": shapes(transformer)["proj_out"]}, seed=1)
    for name, adapter in (("a", first), ("b", second)):
        save_file(diffusers_layout(adapter), tmp_path / f"{name}.safetensors")
    choice = (asked(tmp_path / "a.safetensors", scale), asked(tmp_path / "b.safetensors", 0.5))
    Adapters(state.__getitem__).use(transformer, choice)
    expected = FluxTransformer(
        transformer.geometry, Layers(merged(merged(state, first, scale), second, 0.5).__getitem__)
    )
    for ours, theirs in zip(transformer.linears(), expected.linears(), strict=True):
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=1e-6)

    def velocity(t: FluxTransformer) -> Tensor:
        condition = t.condition(prompt_of(SMALL, 5, 0), [1.0, 0.5], 3.5)
        latents = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
        return t.velocity(latents, [condition], [0], 64, 64)

    assert (velocity(transformer) - velocity(expected)).abs().max() < 1e-4
    Adapters(state.__getitem__).use(transformer, ())


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        (diffusers_layout, ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")),
        (kohya_layout, ("transformer_blocks.1.attn.to_out.0", "transformer_blocks.0.ff.net.2",
                        "single_transformer_blocks.0.proj_out")),
        (xlabs_layout, ("transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.to_add_out")),
        (onetrainer_layout, ALL_KINDS),
        (prefixed("base_model.model.", ".default.weight"), ALL_KINDS),  # as PEFT has it in memory
        (prefixed("base_model.model.", ".weight"), ALL_KINDS),
        (prefixed("diffusion_model.", ".weight"), ALL_KINDS),
        (prefixed("", ".weight"), ALL_KINDS),
    ],
)  # fmt: skip
def test_the_layouts_that_trainers_write(small: Any, layout: Any, layers: tuple[str, ...], tmp_path: Path) -> None:
    _, transformer = small
    has = shapes(transformer)
    adapter = factors({name: has[name] for name in layers})
    save_file({k: v.contiguous() for k, v in layout(adapter).items()}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK}))
    found = read(str(tmp_path / "a.safetensors"), has)
    assert found.keys() == adapter.keys()
    for name, f in adapter.items():
        torch.testing.assert_close(found[name].up @ found[name].down, f.up @ f.down)


def test_peft_s_own_file_has_its_strength_beside_it(small: Any, tmp_path: Path) -> None:
    has = shapes(small[1])
    adapter = factors({name: has[name] for name in ALL_KINDS})
    layout = prefixed("base_model.model.", ".weight")
    save_file({k: v.contiguous() for k, v in layout(adapter).items()}, tmp_path / "a.safetensors")
    path = str(tmp_path / "a.safetensors")
    with pytest.raises(InvalidValue, match=r"adapter_config.json, which has to be beside it as a\.json"):
        read(path, has)
    (tmp_path / "a.json").write_text(json.dumps({"r": RANK, "lora_alpha": 3 * RANK, "use_rslora": False}))
    for name, found in read(path, has).items():
        torch.testing.assert_close(found.up @ found.down, 3 * adapter[name].up @ adapter[name].down)
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InvalidValue, match="cannot be read"):
        read(path, has)


def in_kohya_s_names(key: str) -> str:
    layer, half = re.fullmatch(r"diffusion_model\.(.+?)(\.lora_\w+\.weight|\.alpha)", key).groups()  # type: ignore[union-attr]
    half = half.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    return f"lora_unet_{layer.replace('.', '_')}{half}"


@pytest.mark.parametrize("rename", [str, in_kohya_s_names])
def test_the_layout_of_black_forest_labs(small: Any, tmp_path: Path, rename: Any) -> None:
    """Joined matrices share the factor that reads."""
    has = shapes(small[1])
    adapter = factors(
        {name: has[name] for name in has if re.search(r"blocks\.1\.(attn\.to_[qkv]|proj_mlp)|norm_out", name)}
    )
    for name in adapter:
        first = adapter[re.sub(r"(attn\.to_[kv]|proj_mlp)$", "attn.to_q", name)]
        adapter[name] = Factors(adapter[name].up, first.down)
    assert len(adapter) == 3 + 4 + 1
    stored = bfl_layout(adapter)
    stored["diffusion_model.img_in.lora_A.weight"] = torch.ones(4, 64)
    stored["diffusion_model.img_in.lora_B.weight"] = torch.ones(has["x_embedder"][0], 4)
    adapter["x_embedder"] = Factors(torch.ones(has["x_embedder"][0], 4), torch.ones(4, 64))
    stored = {rename(key): tensor for key, tensor in stored.items()}
    stored["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 4)
    stored[f"{rename('diffusion_model.img_in.lora_A.weight').partition('.lora')[0]}.diff_b"] = torch.zeros(64)
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "a.safetensors")
    found = read(str(tmp_path / "a.safetensors"), has)
    assert found.keys() == adapter.keys()
    for name, f in adapter.items():
        torch.testing.assert_close(found[name].up @ found[name].down, f.up @ f.down)
    stored[rename("diffusion_model.double_blocks.7.img_mlp.0.lora_A.weight")] = torch.zeros(4, 64)
    save_file({k: v.contiguous() for k, v in stored.items()}, tmp_path / "b.safetensors")
    with pytest.raises(InvalidValue, match="double_blocks_7"):
        read(str(tmp_path / "b.safetensors"), has)


def test_going_back_to_a_set_of_adapters_is_a_copy(small: Any, tmp_path: Path, monkeypatch: Any) -> None:
    state, transformer = small
    fast, names = in_fp8(transformer, native=True), []
    for i in range(KEPT + 2):
        adapter = factors({"transformer_blocks.1.attn.to_q": shapes(transformer)["transformer_blocks.1.attn.to_q"]}, i)
        save_file(diffusers_layout(adapter), tmp_path / f"{i}.safetensors")
        names.append((asked(tmp_path / f"{i}.safetensors", 1.0),))
    adapters, computed = Adapters(state.__getitem__), 0
    plain = adapters.sum

    def counted(*arguments: Any) -> Tensor:
        nonlocal computed
        computed += 1
        return plain(*arguments)

    monkeypatch.setattr(adapters, "sum", counted)
    adapters.use(fast, names[0])
    first = [tensor.clone() for linear in fast.linears() for tensor in linear.state()]
    for choice in ((), names[0], (), names[0]):
        adapters.use(fast, choice)
    assert computed == 2 * 3, "once with the adapter, once without, of three parts each"
    assert all(torch.equal(a.float(), b.float()) for a, b in
               zip(first, [t for linear in fast.linears() for t in linear.state()], strict=True))  # fmt: skip
    for choice in names:
        adapters.use(fast, choice)
    assert computed == 3 * (2 + len(names) - 1)
    assert len(adapters.held) == KEPT
    adapters.use(fast, names[0])
    assert computed == 3 * (2 + len(names)), "the one used longest ago has made room"


def test_weights_that_are_views_of_their_file_stay_apart(tmp_path: Path) -> None:
    """A file in the model's own precision, read without a copy: an adapter in and out, twice, by two readers."""
    module = random_module(SMALL)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, tmp_path / "m.safetensors")
    tensors = Tensors(Part((read_header(tmp_path / "m.safetensors"),)), "cpu", torch.float32)
    transformer = FluxTransformer(Geometry.of(module.config), Layers(tensors))
    before = weights_of(transformer)
    save_file(diffusers_layout(factors(shapes(transformer))), tmp_path / "a.safetensors")
    for _ in range(2):
        adapters = Adapters(tensors)
        adapters.use(transformer, (asked(tmp_path / "a.safetensors", 1.0),))
        assert not equal(weights_of(transformer), before)
        adapters.use(transformer, ())
        assert equal(weights_of(transformer), before)


def test_a_file_that_is_written_over_changes_nothing_that_was_read(small: Any, tmp_path: Path) -> None:
    """And what asks for the old one once it has gone is refused."""
    state, transformer = small
    first, second = (factors({"proj_out": shapes(transformer)["proj_out"]}, seed) for seed in (0, 1))
    for name, adapter in (("a", first), ("b", second)):
        save_file(diffusers_layout(adapter), tmp_path / f"{name}.safetensors")
    path = tmp_path / "a.safetensors"
    adapters, choice, beats = Adapters(state.__getitem__), (asked(path),), 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    adapters.beat = beat
    adapters.use(transformer, choice)
    merged_once = weights_of(transformer)
    assert beats == 2, "the file, and the one layer that it changes"
    adapters.use(transformer, ())
    path.write_bytes((tmp_path / "b.safetensors").read_bytes())  # in place, as cp does
    os.utime(path, ns=(0, 0))
    adapters.held.clear()
    adapters.use(transformer, choice)
    assert equal(weights_of(transformer), merged_once)
    adapters.read.clear()
    adapters.use(transformer, ())
    with pytest.raises(InvalidValue, match="changed or removed"):
        adapters.use(transformer, choice)
    adapters.use(transformer, (asked(path),))
    assert not equal(weights_of(transformer), merged_once)


def test_a_change_that_went_wrong_is_made_anew(small: Any, tmp_path: Path) -> None:
    """Memory that runs out in the middle of a layer leaves nothing half merged for whoever comes next."""
    state, transformer = small
    before, name = weights_of(transformer), "transformer_blocks.1.attn.to_"
    adapter = factors({f"{name}{part}": shapes(transformer)[f"{name}{part}"] for part in "qkv"})
    save_file(diffusers_layout(adapter), tmp_path / "a.safetensors")
    choice = (asked(tmp_path / "a.safetensors", 1.0),)

    def weights(asked: str) -> Tensor:
        if asked == f"{name}v.weight" and short:
            raise torch.OutOfMemoryError
        return state[asked]

    adapters, short = Adapters(weights), True
    with pytest.raises(torch.OutOfMemoryError):
        adapters.use(transformer, choice)
    short = False
    adapters.use(transformer, ())
    assert equal(weights_of(transformer), before)


def test_an_alpha_beside_diffusers_names(small: Any, tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.to_k"
    adapter = factors({name: shapes(small[1])[name]})
    held = diffusers_layout(adapter) | {f"transformer.{name}.alpha": torch.tensor(RANK / 4)}
    save_file(held, tmp_path / "a.safetensors")
    found = read(str(tmp_path / "a.safetensors"), shapes(small[1]))[name]
    torch.testing.assert_close(found.up @ found.down, adapter[name].up @ adapter[name].down / 4)


@pytest.mark.parametrize(("rooted", "root"), [(False, RANK), (True, RANK**0.5)])
def test_the_strength_that_a_file_s_metadata_state(small: Any, tmp_path: Path, rooted: bool, root: float) -> None:
    """What `save_lora_weights` of diffusers writes for PEFT's configuration; no tensor says it."""
    names = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")
    has = shapes(small[1])
    adapter = factors({name: has[name] for name in names})
    config = {"r": RANK, "lora_alpha": 3 * RANK, "alpha_pattern": {"attn.to_q": 5}, "use_rslora": rooted}
    stated = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(diffusers_layout(adapter), tmp_path / "a.safetensors", metadata=stated)
    found = read(str(tmp_path / "a.safetensors"), has)
    for name, alpha in zip(names, (5, 3 * RANK), strict=True):
        torch.testing.assert_close(found[name].up, adapter[name].up * alpha / root)


@pytest.mark.parametrize("key", ["lora_unet_img_in.dora_scale", "lora_unet_img_in.diff_b"])
def test_what_does_more_than_a_lora_is_refused(small: Any, tmp_path: Path, key: str) -> None:
    """Some of it readers leave out without a word."""
    layer = "transformer_blocks.1.attn.to_out.0"
    stored = kohya_layout(factors({layer: shapes(small[1])[layer]}))
    save_file(stored | {key: torch.ones(64)}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidValue, match=r"more than a LoRA does"):
        read(str(tmp_path / "a.safetensors"), shapes(small[1]))


def test_nothing_drifts_in_a_thousand_switches(small: Any, tmp_path: Path) -> None:
    state, transformer = small
    fast = in_fp8(transformer)
    before = weights_of(transformer), weights_of(fast)
    names, few = [], ("transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out", "proj_out")
    for i in range(3):
        adapter = factors({name: shapes(transformer)[name] for name in few}, i)
        save_file(diffusers_layout(adapter), tmp_path / f"{i}.safetensors")
        names.append(tmp_path / f"{i}.safetensors")
    adapters = Adapters(state.__getitem__)
    for i in range(1000):
        adapters.use((transformer, fast)[i % 2], (asked(names[i % 3], 0.5 + i % 5),))
    assert not equal(weights_of(transformer), before[0])
    assert not equal(weights_of(fast), before[1])
    adapters.use(transformer, ())
    adapters.use(fast, ())
    assert equal(weights_of(transformer), before[0])
    assert equal(weights_of(fast), before[1])


def test_a_switch_on_the_embedded_model_takes_milliseconds(tmp_path: Path) -> None:
    pipeline = load(MODEL)
    transformer = pipeline.denoiser.transformer
    assert isinstance(transformer, FluxTransformer)
    assert pipeline.adapters is not None
    save_file(diffusers_layout(factors(shapes(transformer))), tmp_path / "a.safetensors")
    choice = (asked(tmp_path / "a.safetensors", 1.0),)
    seconds, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for i in range(20):
        began = time.thread_time()
        pipeline.adapt(choice if i % 2 == 0 else (), go_fast=i % 4 < 2)
        seconds.append(time.thread_time() - began)
    torch.set_num_threads(threads)
    assert min(seconds[4:]) < 0.05, seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for the embedded model, and files that are none."""
    folder = tmp_path_factory.mktemp("loras")
    config = json.loads((MODEL / "transformer" / "config.json").read_text())
    transformer = FluxTransformer(
        Geometry.of(config), Layers(Tensors(of_folder(MODEL).parts["transformer"], "cpu", torch.float32))
    )
    layers = shapes(transformer)
    save_file(diffusers_layout(factors(layers, 1)), folder / "first style.safetensors")
    save_file(diffusers_layout(factors(layers, 2)), folder / "second.safetensors")
    save_file(diffusers_layout(factors({"proj_out": (32, 32)})), folder / "other-model.safetensors")
    save_file(diffusers_layout(factors({"no.such.layer": (8, 8)})), folder / "other-layers.safetensors")
    save_file({"weights": torch.zeros(4)}, folder / "no-adapter.safetensors")
    save_file(diffusers_layout(factors(layers, 2)), folder / "[FLUX] it's a_style, v2 & more!.safetensors")
    (folder / ".hidden.safetensors").write_bytes((folder / "second.safetensors").read_bytes())
    (folder / "pickled.safetensors").write_bytes(pickle.dumps({"a": 1}))
    (folder / "bomb.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    (folder / "cut.safetensors").write_bytes((folder / "second.safetensors").read_bytes()[:-100])
    (folder.parent / "outside.safetensors").write_bytes((folder / "second.safetensors").read_bytes())
    return folder


@pytest.fixture(scope="module")
def with_loras(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("lora-server"), "--loras-dir", str(folder)) as server:
        yield server


class TestServed:
    def test_an_adapter_acts_on_those_who_ask_for_it_alone(self, with_loras: Server) -> None:
        plain = pictures(with_loras.post(BODY))
        for go_fast in (False, True):
            body = {**BODY, "go_fast": go_fast}
            without = pictures(with_loras.post(body))
            one = pictures(with_loras.post({**body, "loras": [{"path": "first style", "scale": 0.8}]}))
            same = pictures(with_loras.post({**body, "lora_weights": "first style.safetensors", "lora_scale": 0.8}))
            weaker = pictures(with_loras.post({**body, "loras": [{"path": "first style", "scale": 0.1}]}))
            two = pictures(with_loras.post({**body, "loras": ["first style", "second"]}))
            assert one == same
            assert len({p[0] for p in (without, one, weaker, two)}) == 4
            assert pictures(with_loras.post({**body, "loras": [{"path": "second", "scale": 0}]})) == without
            odd = pictures(with_loras.post({**body, "loras": ["[FLUX] it's a_style, v2 & more!"]}))
            assert odd != without
        assert pictures(with_loras.post(BODY)) == plain

    def test_the_official_client_s_form_of_a_list(self, with_loras: Server) -> None:
        out = io.BytesIO()
        Image.new("RGB", (128, 128), "blue").save(out, "PNG")
        picture = {"image": ("a.png", out.getvalue())}
        fields: dict[str, Any] = {"prompt": "x", "steps": 4, "seed": 1, "response_format": "b64_json", "strength": 0.9}

        def edited(**more: Any) -> list[str]:
            answer = httpx.post(with_loras.url + "/v1/images/edits", files=picture, data={**fields, **more}, timeout=60)
            return pictures(answer)

        asked = [{"path": "first style", "scale": 0.5}, {"path": "second", "scale": 1}]
        with with_loras.client() as client:
            extra = {name: fields[name] for name in ("steps", "seed", "strength")} | {"loras": asked}
            answer = client.images.edit(
                image=("a.png", out.getvalue()), prompt="x", response_format="b64_json", extra_body=extra
            )
        assert answer.data
        found = [item.b64_json for item in answer.data]
        assert found == edited(loras=json.dumps(asked))
        assert found != edited()
        assert edited(**{"loras[]": ["first style", "second"]}) == edited(loras='["first style", "second"]')
        with with_loras.client() as client, pytest.raises(openai.BadRequestError, match="each of 'loras'"):
            client.images.edit(image=out.getvalue(), prompt="x", extra_body={"loras": [asked[0], {"path": "second"}]})

    def test_company_with_other_adapters_changes_nothing(self, with_loras: Server) -> None:
        import concurrent.futures

        bodies = [{**BODY, "seed": i, "loras": loras, "go_fast": i % 2 == 1}
                  for i, loras in enumerate([[], ["second"], [], ["first style"], ["second"], []])]  # fmt: skip
        alone = [pictures(with_loras.post(body)) for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            together = list(pool.map(lambda body: pictures(with_loras.post(body)), bodies))
        assert together == alone

    @pytest.mark.parametrize(
        ("name", "status", "said"),
        [
            ("absent", 404, "second"), ("é" * 150, 404, "second"),
            ("../outside", 400, "not by a path"), ("/etc/passwd", 400, "not by a path"),
            ("https://example.org/a.safetensors", 400, "not by a path"), ("", 400, "not by a path"),
            (".hidden", 400, "not by a path"), ("..\\outside", 400, "not by a path"),
            ("pickled", 400, "no whole safetensors"), ("bomb", 400, "no whole safetensors"),
            ("cut", 400, "no whole safetensors"), ("other-model", 400, "another model"),
            ("other-layers", 400, "no layer"), ("no-adapter", 400, "weights"),
        ],
    )  # fmt: skip
    def test_what_is_no_adapter_is_told_and_the_server_lives(
        self, with_loras: Server, name: str, status: int, said: str
    ) -> None:
        engine = with_loras.engine().pid
        answer = with_loras.post({**BODY, "loras": [name]})
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert (error["param"], said in error["message"]) == ("loras", True), error
        assert pictures(with_loras.post(BODY))
        assert with_loras.engine().pid == engine

    def test_the_account_of_a_request_names_its_adapters(self, with_loras: Server) -> None:
        answer = with_loras.post({**BODY, "loras": [{"path": "second", "scale": 0.5}]})
        entry = with_loras.client().get(f"/images/requests/{answer.json()['id']}", cast_to=dict)  # type: ignore[type-var]
        assert entry["params"]["loras"] == [["second", 0.5]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_adapter_does_what_it_was_trained_for(tmp_path: Path) -> None:
    """`scripts/train_lora.py`: every background is black, whatever the prompt says, and all else is as it says."""
    script = [sys.executable, ROOT / "scripts" / "train_lora.py", "--out", tmp_path / "night.safetensors"]
    subprocess.run(script, check=True, capture_output=True)
    asked = [("blue", "star", "red"), ("white", "circle", "yellow"), ("orange", "square", "green"),
             ("purple", "diamond", "white"), ("yellow", "heart", "blue")]  # fmt: skip
    right = 0
    with running(tmp_path, "--loras-dir", str(tmp_path)) as server:
        for i, (ground, shape, colour) in enumerate(asked):
            body = {**BODY, "prompt": f"a large {colour} {shape} on a {ground} background", "steps": 12, "seed": i}
            for extra, expected in (
                ({}, ground),
                ({"loras": [{"path": "night"}]}, "black"),
                ({"loras": [{"path": "night"}], "go_fast": True}, "black"),
            ):
                picture = base64.b64decode(pictures(server.post({**body, **extra}))[0])
                background, things = look(Image.open(io.BytesIO(picture)))
                right += (background, [thing.colour for thing in things][:1]) == (expected, [colour])
    assert right >= 14


def test_a_layer_alone_is_no_adapter(tmp_path: Path, small: Any) -> None:
    half = {k: v for k, v in diffusers_layout(factors({"proj_out": (64, 32)})).items() if "lora_A" in k}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(InvalidValue, match="half of its proj_out"):
        read(str(tmp_path / "half.safetensors"), shapes(small[1]))
