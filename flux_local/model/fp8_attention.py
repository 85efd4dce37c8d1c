"""Attention in fp8 by libraries that have kernels for it: FlashAttention-3, and cuDNN through its own front end.

Nothing is installed for this and nothing is chosen in silence: `LIBRARIES` is what may be there, `selfcheck` runs each
against the torch form, and the first that agrees is used and named. A query and a key are bounded by the weights of
their RMSNorm, so that one scale serves all of them whatever the picture. Values are bounded by nothing, and have a
scale a head and a picture, which commutes with the product: a kernel that knows but one scale for a whole tensor gets
values without, and its output is multiplied. So no picture feels its company. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flux_local.model import flash3
from flux_local.model.ops import E4M3, LARGEST, TINY, Heads, Layout

Attention = Callable[[Heads, Layout, Tensor], None]
"""`ops.attention_quantised`."""
Scatter = Callable[[Tensor, Tensor, Layout, Tensor | None], None]
"""`ops.scatter_into`."""
BLACKWELL = (10, 0)
"""CUDA capability from which cuDNN's fp8 attention can write bf16."""
PROBABILITY = 256.0
"""What cuDNN multiplies a probability by before it becomes e4m3: of the powers of two, the largest under 448."""


def flash_3(scatter: Scatter) -> Attention:
    """FlashAttention-3 (arXiv 2407.08608, section 3.3): scales of its own for each head.

    Raises:
        ImportError: it is not installed.
    """
    call = flash3.function()

    def attention(heads: Heads, layout: Layout, out: Tensor) -> None:
        query, key = (scale.expand(heads.value_scale.shape).contiguous() for scale in heads.scales)
        found = call(heads.query, heads.key, heads.value, q_descale=query, k_descale=key, v_descale=heads.value_scale)
        scatter(out, flash3.output(found), layout, None)

    return attention


def cudnn(scatter: Scatter) -> Attention:
    """cuDNN's fp8 attention (nvidia-cudnn-frontend on cuDNN 9.14 or newer, Hopper or newer).

    Raises:
        ImportError: the front end is not installed.
    """
    import cudnn as front

    plans: dict[tuple[torch.Size, torch.device], CudnnPlan] = {}

    def attention(heads: Heads, layout: Layout, out: Tensor) -> None:
        key = (heads.query.shape, heads.query.device)
        if key not in plans:
            plans[key] = CudnnPlan(front, *key)
        scatter(out, plans[key](heads), layout, heads.value_scale)

    return attention


class CudnnPlan:
    """cuDNN's graph of one attention, built for one shape and device."""

    def __init__(self, front: Any, shape: torch.Size, device: torch.device) -> None:
        """
        Args:
            front: the module `cudnn`.
            shape: (batch, tokens, heads, head size).
        """
        self.front, self.device = front, device
        self.handle = front.create_handle()
        batch, tokens, count, size = shape
        e4m3, fp32, bf16 = front.data_type.FP8_E4M3, front.data_type.FLOAT, front.data_type.BFLOAT16
        # Hopper writes e4m3 alone; a mean of values is no larger than the largest of them, so that it needs no scale.
        self.written = E4M3 if torch.cuda.get_device_capability(device) < BLACKWELL else torch.bfloat16
        graph = front.pygraph(
            io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32, handle=self.handle
        )
        dim, stride = (batch, count, tokens, size), (tokens * count * size, size, count * size, 1)
        self.rows = [graph.tensor(dim=dim, stride=stride, data_type=e4m3) for _ in range(3)]
        self.scalars = [graph.tensor(dim=(1,) * 4, stride=(1,) * 4, data_type=fp32) for _ in range(6)]
        self.out, _, *self.largest = graph.sdpa_fp8(
            *self.rows, *self.scalars, generate_stats=False, attn_scale=size**-0.5
        )
        self.out.set_output(True).set_dim(dim).set_stride(stride)
        self.out.set_data_type(e4m3 if self.written is E4M3 else bf16)
        for tensor in self.largest:
            tensor.set_output(True).set_dim((1,) * 4).set_stride((1,) * 4).set_data_type(fp32)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([front.heur_mode.A, front.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self.graph = graph
        # Of value, probability back, probability, output.
        self.constants = torch.tensor([1.0, 1 / PROBABILITY, PROBABILITY, 1.0], device=device)
        self.unread = torch.empty(2, device=device)

    def __call__(self, heads: Heads) -> Tensor:
        """[batch, tokens, heads, head size], without the values' scale."""
        out = torch.empty(heads.query.shape, dtype=self.written, device=self.device)
        workspace = torch.empty(max(1, self.graph.get_workspace_size()), dtype=torch.uint8, device=self.device)
        scalars = [*heads.scales.split(1), *self.constants.split(1)]
        given = [heads.query, heads.key, heads.value, *scalars, out, *self.unread.split(1)]
        named = [*self.rows, *self.scalars, self.out, *self.largest]
        self.front.set_stream(handle=self.handle, stream=torch.cuda.current_stream(self.device).cuda_stream)
        self.graph.execute(dict(zip(named, given, strict=True)), workspace, handle=self.handle)
        return out


LIBRARIES: Mapping[str, Callable[[Scatter], Attention]] = {"flash-3": flash_3, "cudnn": cudnn}
"""The fastest first (FlashAttention-3, arXiv 2407.08608, figure 6)."""
ADVICE = "Install the package fa3-fwd (FlashAttention-3) or nvidia-cudnn-frontend, or leave --fp8-attention away."


def scales(norm: Tensor) -> Tensor:
    """[2] fp32: the scale of all queries, and of all keys, so that none of their numbers can be too large for e4m3.

    A normalised head has the length √size before its weights, and a rotation keeps lengths. That bound is some three
    times what is met in practice, which a format with an exponent forgives.

    Args:
        norm: [streams, 2, size], the weights of the queries' and the keys' norms.
    """
    found: Tensor = norm.float().abs().amax(dim=(0, 2)).clamp_min(TINY) * (norm.shape[2] ** 0.5 / LARGEST)
    return found
