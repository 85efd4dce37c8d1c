"""How long something takes: the median of a few runs after a warm-up, by the device's own events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TIMED = 5
WARM_UPS = 2


def milliseconds(work: Callable[[], Any], device: str, times: int = TIMED) -> float:
    """Median of `times` runs."""
    for _ in range(WARM_UPS):
        work()
    return statistics.median(once(work, device) for _ in range(times))


def once(work: Callable[[], Any], device: str) -> float:
    if not device.startswith("cuda"):
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
