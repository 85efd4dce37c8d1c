"""What all stages of training share: device, precision, checkpoints, learning-rate schedule, progress bar, record.

Knows nothing of what is being trained.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .drawings import WHOLE, World

CHECKPOINT_EVERY = 250

M = TypeVar("M", bound=torch.nn.Module)


def between(first: M, second: M, share: float) -> M:
    """The second with its weights moved to (1 − share)·first + share·second."""
    with torch.no_grad():
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            new.lerp_(old.to(new.device), 1 - share)
    return second


def bf16_is_fast(device: torch.device) -> bool:
    """Whether a bf16 matmul beats fp32 here: not so on CPUs that have to emulate it."""
    if device.type != "cpu":
        return True
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(8):  # the first ones warm up threads and kernels
            began = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < seconds[torch.float32]


class Optimiser(Protocol):
    """What a run needs of one: of PyTorch's own, or of several as one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...

    def step(self) -> Any: ...


@dataclass
class Run:
    """One training run: its seed, its device, what it draws and how, and the folder with its checkpoints and record."""

    work: Path
    seed: int
    device: torch.device
    world: World = WHOLE
    batch: int = 48  # pictures that the transformer learns from in a step
    workers: int = 0  # processes that draw; with 0 this one does

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        self.bf16 = bf16_is_fast(self.device)

    def generator(self, number: int) -> torch.Generator:
        """Of the device's own chance, for the given number under this run's seed."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + number)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def resume(self, stage: str, model: torch.nn.Module, optimiser: Optimiser, **more: Any) -> int:
        """Loads the stage's checkpoint into what is given; returns the number of steps already done."""
        path = self.work / f"{stage}.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        for name, module in more.items():
            module.load_state_dict(state[name])
        return int(state["step"])

    def checkpoint(
        self, stage: str, step: int, steps: int, model: torch.nn.Module, optimiser: Optimiser, **more: Any
    ) -> None:
        """Saves every `CHECKPOINT_EVERY` steps and at the end; a kill during the save leaves the older one."""
        if step % CHECKPOINT_EVERY and step != steps:
            return
        state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        state |= {name: module.state_dict() for name, module in more.items()}
        partial = self.work / f"{stage}.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / f"{stage}.pt")

    def one_cycle(self, steps: int, warm_up: int = 100, floor: float = 0.02) -> Callable[[int], float]:
        """The share of the peak learning rate at a step: linear warm-up, then a cosine down to `floor`."""

        def share(step: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
            return min(1.0, (step + 1) / warm_up) * (floor + (1 - floor) * cosine)

        return share

    def step(self, optimiser: Optimiser, loss: torch.Tensor, model: torch.nn.Module, share: float) -> None:
        """One optimiser step at `share` of the peak rate, gradients clipped to norm 1."""
        for group in optimiser.param_groups:
            group["lr"] = share * group.setdefault("peak", group["lr"])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    @contextlib.contextmanager
    def progress(self, title: str, steps: int, start: int) -> Iterator[Callable[..., None]]:
        """A bar on a terminal, a line every 100 steps elsewhere; adds the seconds spent to the run's record."""
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
        )  # fmt: skip
        began = time.monotonic()
        smooth: dict[str, float] = {}
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(title, total=steps, completed=start, figures="")

            def update(step: int, **figures: float) -> None:
                for name, value in figures.items():
                    smooth[name] = 0.98 * smooth.get(name, value) + 0.02 * value
                text = " ".join(f"{name} {value:.4f}" for name, value in smooth.items())
                bar.update(task, completed=step, figures=text)
                if not self.console.is_terminal and step % 100 == 0:
                    print(f"{title} {step}/{steps} {time.monotonic() - began:.0f}s {text}", flush=True)
                if step % CHECKPOINT_EVERY == 0:
                    self.record(title, step, time.monotonic() - began, smooth)

            yield update
        self.record(title, steps, time.monotonic() - began, smooth)

    def record(self, title: str, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Appends a line to `log.jsonl`, which the model card is made from too, and draws `losses.png` anew, where
        there is matplotlib."""
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps({"stage": title, "step": step, "seconds": round(seconds, 1), **figures}) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            from . import plots

            plots.losses(self.work / "log.jsonl", self.work / "losses.png")
