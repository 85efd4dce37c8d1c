"""The engine as a program: loads the model, warms it up, says so, and draws until the other end of its socket closes.

Started by `supervisor`, never by hand. Knows nothing of HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flux_local import weights
from flux_local.batches import BATCH_ROWS, FULL_AT_TOKENS
from flux_local.engine import Engine
from flux_local.errors import SettingsError, StartError
from flux_local.messages import EngineChannel, Ready, StartFailed
from flux_local.params import ModelInfo
from flux_local.pulse import Phase, Pulse
from flux_local.sizes import canvas_for, table_size

if TYPE_CHECKING:
    from flux_local.model.loader import Pipeline
    from flux_local.model.safety import SafetyChecker

SLOW_ON_A_CPU = 4 << 30
"""Bytes of weights."""

log = logging.getLogger("flux_local.engine")


def warm_up(pipeline: Pipeline, info: ModelInfo) -> float:
    """Draws the picture that a first request would ask for in each precision, in two steps, and proves the batches of
    its canvas; returns the seconds of the last step."""
    width, height = canvas_for(table_size("1:1", "1K"), info.canvas)
    prompt = pipeline.text.encode("warm-up")
    for precision in reversed(pipeline.precisions):  # the model's own last: its time is the one that counts
        go_fast = precision == "fp8"
        picture = pipeline.begin(prompt, width, height, seed=0, steps=2, guidance=1.0, go_fast=go_fast)
        for _ in range(2):
            started = time.monotonic()
            pipeline.denoiser_for(go_fast).advance([picture])
            pipeline.denoiser.pace.finish()
            seconds = time.monotonic() - started
    pipeline.vae.decode(picture.latents, width, height)
    rows = 2
    while rows <= BATCH_ROWS and rows * width * height // 256 <= FULL_AT_TOKENS:
        for denoiser in {pipeline.denoiser, pipeline.denoiser_for(True)}:
            denoiser.independent(width, height, rows, prompt)
        rows *= 2
    return seconds


def pick_device(asked: str) -> str:
    """`auto` is the first GPU, or the CPU.

    Raises:
        StartError: torch sees no GPU. SettingsError: no such device.
    """
    import torch

    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise SettingsError(f"'{asked}' is no device that can be drawn on. Use 'auto', 'cpu', or a GPU like 'cuda:0'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        from flux_local.model.device import why_no_gpu

        raise StartError(f"Device '{asked}' asked for, but torch sees {why_no_gpu()}. Fix that, or use --devices cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"There is no '{asked}': torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on.")
    return asked


def serve(channel: EngineChannel, pulse: Pulse, options: argparse.Namespace) -> None:
    """Loads, warms up, says so, and draws until the other end closes."""
    try:
        from flux_local.model import memory
        from flux_local.model.loader import load, quieten_libraries
        from flux_local.model.parts import NO_ROOM

        quieten_libraries()
        if options.adapters:
            from diffusers import FluxPipeline  # noqa: F401, reads them; its import takes seconds

        started = time.monotonic()
        device = pick_device(options.device)
        info = weights.info(options.model)
        checkpoint = weights.identify(options.model)
        if device == "cpu" and checkpoint.nbytes > SLOW_ON_A_CPU:
            log.warning("torch sees no GPU: a model of %.0f GB will be very slow on the CPU", checkpoint.nbytes / 1e9)
        try:
            checker = safety_checker(options, device)  # first, so that the plan is for the memory that it leaves
        except Exception as error:
            if memory.is_exhausted(error):
                raise StartError(NO_ROOM) from error
            raise
        pipeline = load(
            checkpoint, device, options.precisions, options.reference, options.memory,
            info.canvas.max_area, options.cache, options.fp8_attention,
            memory.sharing(device, options.beside.split(",")), info.text_length,
        )  # fmt: skip
        loaded = time.monotonic()
        try:
            step_seconds = warm_up(pipeline, info)
        except Exception as error:
            if memory.is_exhausted(error):
                raise StartError(NO_ROOM) from error
            raise
    except StartError as error:
        channel.send(StartFailed(error.message, error.exit_code))
        raise
    now = time.monotonic()
    width, height = canvas_for(table_size("1:1", "1K"), info.canvas)
    per_token = step_seconds / (width * height // 256)
    pulse.enter(Phase.IDLE)
    channel.send(
        Ready(
            device, pipeline.precisions, pipeline.attentions, loaded - started, now - loaded, step_seconds, per_token,
            str(pipeline.plan), pipeline.plan.tier, checkpoint.nbytes,
        )
    )  # fmt: skip
    Engine(pipeline, channel, pulse, per_token, checker).run()


def safety_checker(options: argparse.Namespace, device: str) -> SafetyChecker | None:
    """The one asked for.

    Raises:
        WeightsError: it cannot be loaded, or knows none of the labels.
    """
    if options.safety is None:
        return None
    from flux_local.model.safety import Classifier, SafetyChecker

    labels = frozenset(label.strip().lower() for label in options.safety_labels.split(",") if label.strip())
    return SafetyChecker(Classifier(options.safety, device, labels, options.safety_threshold))


def main() -> int:
    parser = argparse.ArgumentParser(prog="flux-local-engine")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the server")
    parser.add_argument("--pulse", type=int, required=True, help="the shared page")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precisions", default="both")
    parser.add_argument("--memory")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--fp8-attention", action="store_true")
    parser.add_argument("--adapters", action="store_true", help="there are some: their readers are imported at once")
    parser.add_argument("--beside", default="", help="the devices of all engines of this machine, by commas")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--safety", type=Path)
    parser.add_argument("--safety-labels", default="")
    parser.add_argument("--safety-threshold", type=float, default=0.5)
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # The server decides when its engine ends; a Ctrl-C in the terminal, or a service manager's signal, reaches both.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wait_asleep()
    channel = EngineChannel(socket.socket(fileno=options.fd))
    try:
        serve(channel, Pulse(options.pulse), options)
    except EOFError:
        return 0
    except StartError as error:
        return error.exit_code
    return 0


def wait_asleep() -> None:
    """Has threads that wait for each other, in torch on a CPU, sleep soon instead of keeping their core for
    milliseconds: where anything else wants one too, whoever all wait for is then not kept from it.

    GNU OpenMP's own value for more threads than cores. To be called before torch is imported. What the environment
    says of it counts.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def end_with_parent() -> None:
    """Has the kernel end this process when the server's ends, even in the middle of a step."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    raise SystemExit(main())
