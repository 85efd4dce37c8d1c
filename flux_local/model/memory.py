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


def free() -> None:
    """Gives back what nothing holds any more, the allocator's own reserve too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
