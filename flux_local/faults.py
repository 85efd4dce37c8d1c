"""Failures on demand, for tests: there only if the environment variable FLUX_LOCAL_FAULTS is set.

It holds faults separated by `;`, each a kind and conditions: `crash prompt=boom step=3`, `slow seconds=0.2`. Kinds:
crash (SIGSEGV), abort, hang, oom (out of memory), nan (the latents become NaN), slow. Conditions: `prompt=TEXT`
(some job's prompt holds the text), `step=K` (it has K steps behind it), `batch=N` (at least N pictures), `times=N`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flux_local.model.denoiser import Picture

VARIABLE = "FLUX_LOCAL_FAULTS"


@dataclass
class Fault:
    kind: str
    prompt: str = ""
    step: int | None = None
    batch: int = 1
    times: int = 1_000_000
    seconds: float = 0.0

    def strike(self, prompts: Sequence[str], pictures: Sequence[Picture]) -> None:
        hit = [i for i, p in enumerate(pictures) if self.prompt in prompts[i] and self.step in (None, p.step)]
        if not hit or len(pictures) < self.batch or self.times < 1:
            return
        self.times -= 1
        match self.kind:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "abort":
                os.abort()
            case "hang":
                time.sleep(3600)
            case "oom":
                raise MemoryError("injected")
            case "nan":
                for i in hit:
                    pictures[i].latents = pictures[i].latents * float("nan")
            case "slow":
                time.sleep(self.seconds)
            case _:
                raise ValueError(f"no such fault: {self.kind}")


class Faults:
    """All faults of the environment; none of them without the variable."""

    def __init__(self) -> None:
        self.faults = [parsed(text) for text in os.environ.get(VARIABLE, "").split(";") if text.strip()]

    def before_step(self, prompts: Sequence[str], pictures: Sequence[Picture]) -> None:
        for fault in self.faults:
            fault.strike(prompts, pictures)


def parsed(text: str) -> Fault:
    kind, *conditions = text.split()
    fault = Fault(kind)
    for condition in conditions:
        name, _, value = condition.partition("=")
        setattr(fault, name, {"prompt": str, "seconds": float}.get(name, int)(value))
    return fault
