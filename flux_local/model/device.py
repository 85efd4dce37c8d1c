"""What there is to draw on, and what of the fast paths is right there. For `flux-local doctor`."""

from __future__ import annotations

import contextlib
import os
import subprocess

import torch

from flux_local.errors import StartError
from flux_local.model.fp8 import has_products
from flux_local.model.ops import Ops
from flux_local.model.selfcheck import TRIAL, Finding, Sizes, accelerated, with_fp8_attention

FLUX_SIZES = Sizes(24, 128, TRIAL)


def describe(device: str) -> str:
    """A line about the device.

    Raises:
        StartError: torch cannot compute on it.
    """
    if device == "cpu":
        seen = "" if torch.cuda.is_available() else f"; {why_no_gpu()}"
        return f"CPU, {torch.get_num_threads()} threads; torch {torch.__version__}{seen}"
    try:
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)  # Triton takes the current one
        free, total = torch.cuda.mem_get_info(device)
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        raise StartError(f"torch cannot use {device}: {error}. Use --devices cpu, or mend the driver.") from error
    fp8 = "fp8 products" if has_products(device) else "fp8 emulated"
    name, memory = torch.cuda.get_device_name(device), f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    return f"{name}, {memory}, {fp8}; driver {driver()}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def why_no_gpu() -> str:
    """Why torch sees none, as far as it can be told."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and torch.version.cuda is not None:
        return "no GPU: CUDA_VISIBLE_DEVICES is empty, which hides all"
    if torch.version.cuda is None:
        return "no GPU: this torch is built without CUDA"
    return f"no GPU: this torch wants a driver for CUDA {torch.version.cuda}, and the driver is {driver()}"


def driver() -> str:
    """Of NVIDIA; `unknown` without its tools, as where there is no card."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    return "unknown"


def quantised_attention(device: str) -> list[Finding]:
    """What was found of each library for attention in fp8, up to the first that will do; nothing on a CPU."""
    return [] if device == "cpu" else with_fp8_attention(Ops(), FLUX_SIZES, device, torch.bfloat16)[1]


def findings(device: str) -> list[Finding]:
    """What was found of each kernel and of attention, at FLUX.1's sizes; nothing on a CPU, which has plain torch."""
    return [] if device == "cpu" else accelerated(FLUX_SIZES, device, torch.bfloat16)[1]
