"""The device's memory: when it is exhausted, and how to get some back. Knows nothing of pictures or models."""

from __future__ import annotations

import gc

import torch


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that there was no memory left for what was tried."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def free() -> None:
    """Gives back what nothing holds any more, the allocator's own reserve too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
