"""A component's tensors by name, out of whatever form its files have, in the precision and on the device asked for.

What is packed (fp8 with or without scales, GGUF's blocks) is unpacked as it is read, a tensor at a time and on the
device, so that the host never holds a copy. Never a pickle, never the network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flux_local.errors import FETCH_AGAIN, WeightsError
from flux_local.model.checkpoint import ASIDE, Part
from flux_local.model.headers import gguf_reader
from flux_local.model.reading import opened

SCALES = ("scale_weight", "weight_scale")
"""ComfyUI's names, older and newer, for what an fp8 weight is to be multiplied by."""


class Tensors:
    """A part's tensors, by their names in the file without the prefix."""

    def __init__(self, part: Part, device: str, dtype: torch.dtype) -> None:
        self.part, self.device, self.dtype = part, device, dtype
        self.stored: dict[str, Callable[[], Tensor]] = {}
        """By a tensor's name in its file: what reads it, as it is there but for GGUF's blocks."""
        for header in part.headers:
            if header.path.suffix.lower() == ".gguf":
                for tensor in gguf_reader(header.path).tensors:
                    self.stored[tensor.name] = partial(unpacked, tensor, device)
            else:
                file = opened(header.path, device)
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    self.stored[name] = partial(file.get_tensor, name)

    def __contains__(self, name: str) -> bool:
        return self.part.prefix + name in self.stored

    def names(self) -> list[str]:
        start = len(self.part.prefix)
        own = (name[start:] for name in self.stored if name.startswith(self.part.prefix))
        return [name for name in own if not ASIDE.search(name)]

    def __call__(self, name: str) -> Tensor:
        """Raises `WeightsError` for one that is not there."""
        full = self.part.prefix + name
        if full not in self.stored:
            raise WeightsError(f"{self.part.headers[0].path.parent} lacks the tensor {full}. {FETCH_AGAIN}")
        found = self.stored[full]()
        if found.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            found = found.float() * self.scale(full, len(found))
        return found.to(self.dtype)

    def scale(self, full: str, rows: int) -> Tensor | float:
        """What an fp8 tensor is to be multiplied by: a number, or one a row."""
        stem = full.removesuffix("weight")
        for name in (stem + scale for scale in SCALES):
            if name in self.stored:
                scale = self.stored[name]().float()
                if scale.numel() not in (1, rows):
                    raise WeightsError(
                        f"{full} has scales by blocks (mxfp8 or the like), which are not read here. "
                        "Get the model in bf16, fp16, fp8 (e4m3) or as GGUF."
                    )
                return scale if scale.numel() == 1 else scale.view(-1, 1)
        return 1.0


def unpacked(entry: Any, device: str) -> Tensor:
    """A GGUF tensor out of its blocks."""
    from diffusers.quantizers.gguf.utils import GGUFParameter, dequantize_functions, dequantize_gguf_tensor

    data = torch.from_numpy(entry.data.copy()).to(device)
    if data.dtype.is_floating_point:
        return data
    if entry.tensor_type not in dequantize_functions:
        raise WeightsError(
            f"{entry.name} is packed as {entry.tensor_type.name}, which is not read here. "
            "Get a GGUF file of Q8_0, Q6_K, Q5_K or Q4_K."
        )
    found: Tensor = dequantize_gguf_tensor(GGUFParameter(data, quant_type=entry.tensor_type))
    return found
