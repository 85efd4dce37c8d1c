"""What both training stages share: device, precision, checkpoints, learning-rate schedule, progress bar, record.

Knows nothing of what is being trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CHECKPOINT_EVERY = 250


@dataclass
class Run:
    """One training run: its seed, its device and the folder that holds its checkpoints and its record."""

    work: Path
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.console = Console()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def resume(self, stage: str, model: torch.nn.Module, optimiser: torch.optim.Optimizer, **more: Any) -> int:
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
        self, stage: str, step: int, steps: int, model: torch.nn.Module, optimiser: torch.optim.Optimizer, **more: Any
    ) -> None:
        """Saves every `CHECKPOINT_EVERY` steps and at the end; a kill during the save leaves the older one."""
        if step % CHECKPOINT_EVERY and step != steps:
            return
        state = {"step": step, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        state |= {name: module.state_dict() for name, module in more.items()}
        partial = self.work / f"{stage}.pt.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / f"{stage}.pt")

    def one_cycle(
        self, optimiser: torch.optim.Optimizer, steps: int, start: int, warm_up: int = 100, floor: float = 0.02
    ) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up, then a cosine down to `floor` of the peak."""

        def factor(step: int) -> float:
            done = min(1.0, (step + start) / steps)
            cosine = 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())
            return min(1.0, (step + start + 1) / warm_up) * (floor + (1 - floor) * cosine)

        for group in optimiser.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

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
        """Appends a line to `log.jsonl`: what the model card and the loss plot are made from."""
        with (self.work / "log.jsonl").open("a") as log:
            log.write(json.dumps({"stage": title, "step": step, "seconds": round(seconds, 1), **figures}) + "\n")
