"""FlashAttention-3 is taken from whichever package brings it; its kernels need a Hopper GPU."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from flux_local.model import flash3
from flux_local.model.selfcheck import ATTENTIONS, attentions


def test_without_a_package_both_are_named() -> None:
    with pytest.raises(ImportError, match="neither flash_attn_interface nor fa3_fwd_interface"):
        flash3.function()


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
