"""How long something takes: the median of a few runs after a warm-up, by the device's own events on a GPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TIMED = 5
WARM_UPS = 2


LEAST_MS = 20.0


def milliseconds(work: Callable[[], Any], device: str, times: int = TIMED, least_ms: float = LEAST_MS) -> float:
    """Median of `times` measurements, after `WARM_UPS` runs.

    Args:
        least_ms: between two events on a GPU: shorter work is repeated, so that launches do not count as work. With 0
            each measurement is one run, `times + WARM_UPS` in all.
    """
    for _ in range(WARM_UPS):
        work()
    repeats = 1
    if device.startswith("cuda") and least_ms:
        repeats = max(1, min(200, math.ceil(least_ms / max(once(work, device), 1e-3))))
    return statistics.median(once(work, device, repeats) for _ in range(times))


def once(work: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Milliseconds of one of `repeats` runs in a row."""
    if not device.startswith("cuda"):
        began = time.perf_counter()
        work()
        return 1000 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats
