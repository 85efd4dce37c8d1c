"""FlashAttention-3 (arXiv 2407.08608) for Hopper, where a package brings it: its own, or fa3-fwd with its forward pass.

Knows no layout of rows and no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("flash_attn_interface", "fa3_fwd_interface")
HOPPER = 9
"""CUDA capability that it is written for; elsewhere it is FlashAttention-2."""


def function() -> Callable[..., Any]:
    """`flash_attn_func`: query, key and value [B, N, heads, size] → the same.

    Raises:
        ImportError: neither package is installed, or what is there does not work; why, package by package.
    """
    reasons = []
    for name in PACKAGES:
        try:
            found: Callable[..., Any] = import_module(name).flash_attn_func
        except Exception as error:  # whatever a library does that was built for another torch
            reasons.append(f"{name}: {error}")
        else:
            return found
    raise ImportError("; ".join(reasons))


def output(found: Any) -> Tensor:
    """What was computed, without the sums that some versions give beside it."""
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """As an `ops.Backend`. Raises `ImportError` as `function` does."""
    call = function()

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return output(call(*(x.transpose(1, 2) for x in (q, k, v)))).transpose(1, 2)

    return attended


def suits(device: torch.device | str) -> bool:
    """Whether a device is what it is written for."""
    return torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER
