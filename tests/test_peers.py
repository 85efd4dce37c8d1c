"""What the GPU proof times beside ours, as far as it goes without those packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from proof import peers
from proof.scale import SMALL
from torch import nn

DOUBLE = {
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
    "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
}  # fmt: skip
SINGLE = {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
EXPECTED = {f"transformer_blocks.0.{name}" for name in DOUBLE} | {
    f"single_transformer_blocks.{i}.{name}" for i in range(2) for name in SINGLE
}


@pytest.fixture
def module() -> Iterator[Any]:
    with torch.device("meta"):
        yield FluxTransformer2DModel(**SMALL.transformer)


def names(module: nn.Module, filter_fn: Any) -> set[str]:
    return {name for name, layer in module.named_modules() if filter_fn(layer, name)}


def test_the_products_over_all_tokens_are_quantised_and_no_others(module: Any) -> None:
    assert names(module, peers.quantised) == EXPECTED
    module.compile_repeated_blocks(backend="eager")  # as `gpu_check` has done by then
    assert names(module, peers.quantised) == EXPECTED


def test_a_missing_package_is_an_import_error_and_changes_nothing(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    before = dict(module.__dict__)
    with pytest.raises(ImportError):
        peers.torchao_fp8(module)
    with pytest.raises(ImportError), peers.cache_dit_steps(module, 28):
        pass
    assert module.__dict__ == before
    assert all(block._compiled_call_impl is None for block in module.transformer_blocks)


def cache_dit(calls: list[Any]) -> Any:
    """As much of that package as is called, which leaves its forward in the module as it does."""

    def enable_cache(module: Any, cache_config: Any, calibrator_config: Any) -> None:
        calls.append((cache_config, calibrator_config))
        module.forward, module._is_patched = len, True

    return SimpleNamespace(
        DBCacheConfig=lambda **given: SimpleNamespace(**given),
        TaylorSeerCalibratorConfig=lambda **given: given,
        steps_mask=lambda mask_policy, total_steps: (mask_policy, total_steps),
        enable_cache=enable_cache,
        disable_cache=lambda module: calls.append("disabled"),
        refresh_context=lambda module, num_inference_steps: calls.append(num_inference_steps),
        summary=lambda module, logging: [SimpleNamespace(accumulated_executed_steps=28, cached_steps=[8, 12, 13])],
    )


@pytest.mark.parametrize("policy", [None, "slow"])
def test_the_module_is_diffusers_again_after_cache_dit(
    module: Any, monkeypatch: pytest.MonkeyPatch, policy: str | None
) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "cache_dit", cache_dit(calls))
    before = dict(module.__dict__)
    with suppress(KeyError), peers.cache_dit_steps(module, 28, policy) as cached:
        assert module.forward is len
        cached.begin()
        assert cached.computed() == 25
        raise KeyError("a failed step")
    assert module.__dict__ == before
    (config, calibrator), *rest = calls
    assert rest == [28, "disabled"]
    assert calibrator == {"taylorseer_order": 1}
    assert (config.num_inference_steps, config.max_warmup_steps, config.residual_diff_threshold) == (28, 8, 0.08)
    assert (config.Fn_compute_blocks, config.Bn_compute_blocks) == (2, 0), "a toy of three blocks"
    assert getattr(config, "steps_computation_mask", None) == (("slow", 28) if policy else None)
