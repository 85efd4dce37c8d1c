"""The device's state: whether its memory is exhausted or itself lost, and how to get memory back. Knows no models."""

from __future__ import annotations

import gc

import torch


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that there was no memory left for what was tried."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: after such an error every further call fails too."""
    return isinstance(error, torch.AcceleratorError)


def has_room(tensor: torch.Tensor) -> bool:
    """Whether a copy of a tensor may stay on its device with as much again to spare for work; always on the host."""
    if tensor.device.type != "cuda":
        return True
    free_bytes, total = torch.cuda.mem_get_info(tensor.device)
    return free_bytes - tensor.nbytes > total // 5


def free() -> None:
    """Gives back what nothing holds any more, the allocator's own reserve too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
