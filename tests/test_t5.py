"""T5 against transformers' own, and when a GPU takes the fused attention."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flux_local.model import text
from flux_local.model.fp8 import store_in_fp8
from flux_local.model.ops import quantised
from flux_local.model.t5 import T5Encoder, efficient_attention, fastest, torch_attention
from flux_local.model.text import PromptEncoder
from tests.servers import MODEL

CPU = torch.device("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    assert bias.stride(-1) == 1, "no fused attention takes another"
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


@cache
def theirs(name: str) -> Any:
    """`embedded`: that of the embedded model; `random`: a small one whose bias weighs as much as its scores."""
    from transformers import T5Config, T5EncoderModel

    if name == "embedded":
        return T5EncoderModel.from_pretrained(MODEL / "text_encoder_2", dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=300, d_model=64, d_kv=16, num_heads=6, d_ff=160, num_layers=5, feed_forward_proj="gated-gelu",
        relative_attention_max_distance=40,
    )  # fmt: skip
    made = T5EncoderModel(config).eval().requires_grad_(False)
    for norm in made.modules():
        if type(norm).__name__ == "T5LayerNorm":
            norm.weight.uniform_(0.5, 2)
    made.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=2)
    return made


@cache
def module(name: str) -> T5Encoder:
    """Ours, with the same weights."""
    made = T5Encoder(theirs(name).config.to_dict())
    state = theirs(name).state_dict()
    made.load_state_dict({key: state[key] for key in made.state_dict()})
    return made.eval().requires_grad_(False)


def ids(length: int, pads: int = 0) -> Tensor:
    drawn = torch.randint(2, 300, (1, length), generator=torch.Generator().manual_seed(length))
    drawn[0, length - pads :] = 0
    return drawn


def off(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("name", ["embedded", "random"])
@pytest.mark.parametrize(("length", "pads"), [(1, 0), (7, 2), (64, 50), (77, 0), (200, 9)])
def test_equal_to_transformers(name: str, length: int, pads: int) -> None:
    expected = theirs(name)(ids(length, pads)).last_hidden_state
    for attend in (torch_attention, attention):
        torch.testing.assert_close(module(name)(ids(length, pads), attend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["embedded", "random"])
def test_rounding_costs_no_more_than_transformers_own(name: str) -> None:
    truth = theirs(name)(ids(77, 20)).last_hidden_state
    cost = off(deepcopy(theirs(name)).to(torch.bfloat16)(ids(77, 20)).last_hidden_state, truth)
    assert off(deepcopy(module(name)).to(torch.bfloat16)(ids(77, 20), attention), truth) < 1.05 * cost


def test_layers_in_fp8_are_the_rounded_ones() -> None:
    packed, rounded = deepcopy(module("random")), deepcopy(module("random"))
    store_in_fp8(packed, "cpu")
    for linear in (part for part in rounded.modules() if isinstance(part, torch.nn.Linear)):
        values, scale = quantised(linear.weight)
        linear.weight.copy_(values.float() * scale)
    assert packed.state_dict().keys() != rounded.state_dict().keys()
    torch.testing.assert_close(packed(ids(50)), rounded(ids(50)), rtol=1e-5, atol=1e-5)


def test_torch_has_the_attention_that_is_asked_for() -> None:
    """Its signature and shapes; what it computes, a GPU has to say."""
    q = torch.empty(1, 77, 6, 16, device="meta", dtype=torch.bfloat16).transpose(1, 2)
    bias = torch.empty(1, 6, 77, 80, device="meta", dtype=torch.bfloat16)[..., :77]
    assert efficient_attention(q, q, q, bias).shape == q.shape


def test_a_gpu_takes_the_fused_attention_only_if_it_agrees(caplog: pytest.LogCaptureFixture) -> None:
    def taken(attention: Callable[..., Tensor]) -> bool:
        reader = fastest(module("embedded"), 64, CPU, attention)
        assert reader(ids(64)).shape == (1, 64, module("embedded").shared.embedding_dim)
        return not isinstance(reader, T5Encoder)

    assert taken(attention)
    assert not caplog.records
    assert not taken(lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, scale=1.0))
    assert not taken(lambda q, k, v, bias: v * float("nan"))
    assert not taken(efficient_attention), "a CPU has none"
    assert [record.message[:21] for record in caplog.records] == 3 * ["T5 runs with torch's "]

    def exhausted(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        taken(exhausted)


@pytest.mark.parametrize(
    ("hooked", "packed", "recorded"), [(False, False, ["t5", "clip"]), (False, True, ["clip"]), (True, False, [])]
)
def test_what_is_recorded(
    hooked: bool, packed: bool, recorded: list[str], monkeypatch: pytest.MonkeyPatch, pipeline: Any
) -> None:
    names: list[str] = []

    lengths: list[int] = []

    def record(function: Any, device: torch.device, work: int = 0, beside: Any = None) -> Any:
        name = "clip" if beside else "t5"
        names.append(name)

        def seen(ids: Tensor) -> Tensor:
            if name == "t5":
                lengths.append(ids.shape[1])
            found: Tensor = function(ids)
            return found

        return seen

    monkeypatch.setattr(text, "recorded", record)
    monkeypatch.setattr(text, "fastest", lambda module, length, device: partial(module, attention=attention))
    known = pipeline.text
    made = PromptEncoder(known.words, known.words_2, known.clip, known.t5, "cuda", hooked=hooked, packed=packed)
    assert names == recorded
    made.device = CPU
    for length in (None, 20):
        expected = known.encode("a red circle", max_length=length).states
        torch.testing.assert_close(made.encode("a red circle", max_length=length).states, expected)
    assert lengths == ([made.max_length] if "t5" in recorded else []), "none of a prompt that is cut shorter"
