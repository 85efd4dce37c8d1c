"""FlashAttention-3 is taken from whichever package brings it; its kernels need a Hopper GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flux_local.model import flash3
from flux_local.model.selfcheck import ATTENTIONS, attentions


def test_without_a_package_both_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in flash3.PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"flash_attn_interface: .*; fa3_fwd_interface: "):
        flash3.function()


def test_one_that_does_not_work_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = flash3.PACKAGES
    monkeypatch.setitem(sys.modules, first, ModuleType(first))
    module = ModuleType(second)
    monkeypatch.setattr(module, "flash_attn_func", print, raising=False)
    monkeypatch.setitem(sys.modules, second, module)
    assert flash3.function() is print
    monkeypatch.delattr(module, "flash_attn_func")
    monkeypatch.setattr(flash3, "suits", lambda _: True)
    assert attentions("cuda") == ATTENTIONS


@pytest.mark.parametrize("package", flash3.PACKAGES)
@pytest.mark.parametrize("sums", [False, True])
def test_it_is_called_with_tokens_before_heads(monkeypatch: pytest.MonkeyPatch, package: str, sums: bool) -> None:
    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
        assert q.shape == (2, 5, 3, 8)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return (out, None) if sums else out

    module = ModuleType(package)
    monkeypatch.setattr(module, "flash_attn_func", flash_attn_func, raising=False)
    monkeypatch.setitem(sys.modules, package, module)
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    assert torch.equal(flash3.attention()(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_it_is_for_hopper_alone() -> None:
    assert not flash3.suits("cpu")
    assert attentions("cpu") == ATTENTIONS
