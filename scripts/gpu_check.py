#!/usr/bin/env python3
"""The GPU proof: is flux-local right on this card, and how fast is it beside diffusers and the card's own limits?

    make gpu-check            (or: scripts/gpu_check.py --out docs/benchmarks/CARD.json)

Builds FLUX.1's whole architecture with random weights on the device; needs no weights and no network, only torch,
triton, diffusers, transformers, safetensors and Pillow. Prints the physical floor first, checks every kernel and the
transformer against diffusers' modules, then times both in the same run. Ends with a table and one JSON document, and
exits 1 when a check fails. `--small` runs all of it at toy sizes, on a CPU too: a test of this script, no measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from proof import around, checks, steps  # noqa: E402
from proof import ceilings as limits  # noqa: E402
from proof.bench import Bench, Report, say  # noqa: E402
from proof.scale import REAL, SMALL  # noqa: E402


def environment(bench: Bench) -> None:
    import diffusers
    import transformers

    found = {
        "card": torch.cuda.get_device_name() if bench.cuda else platform.processor() or "cpu",
        "driver": driver(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if bench.cuda else None,  # type: ignore[no-untyped-call]
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "small": bench.scale is SMALL,
    }
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    bench.report.environment = found
    say(json.dumps(found, indent=2))


def ceilings(bench: Bench) -> None:
    """What the card does at best: copying, matrix products at FLUX.1's shapes, attention by backend."""
    bench.report.ceilings = limits.measure(bench.scale, bench.device, bench.dtype, say)


def floor(bench: Bench) -> None:
    """The least time that a step can take at the ceilings measured."""
    bench.report.floor = limits.floor(bench.scale, bench.report.ceilings, say)


STAGES = {
    "Environment": environment,
    "The card's ceilings": ceilings,
    "Floor": floor,
    "Kernels": checks.kernels,
    "Building FLUX.1 with random weights": checks.build,
    "Correctness": checks.correctness,
    "Steps": steps.steps,
    "Around the steps": around.around,
    "Profile of one step": steps.profile,
    "diffusers compiled": steps.compiled,
    "Other packages": steps.others,
}


def driver() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def table(report: Report) -> None:
    """The steps side by side, with what they are of the first."""
    steps = report.timings.get("step_ms", {})
    say(f"\n{'step':28}{'batch':>6}{'ms':>10}{'ms a picture':>14}")
    for name, by_batch in steps.items():
        for batch, ms in by_batch.items():
            say(f"{name:28}{batch:>6}{ms:10.2f}{ms / int(batch):14.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a test of this script")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu_check: torch sees no GPU. Try --device cpu --small to see what this does.", file=sys.stderr)
        return 2
    bench = Bench(options.device, SMALL if options.small else REAL, options.out)
    for name, work in STAGES.items():
        with bench.stage(name):
            work(bench)
    report = bench.report
    failed = report.failures + [check["name"] for check in report.checks if not check["good"]]
    table(report)
    say(f"\n{len(report.checks)} checks, {len(failed)} failed{': ' + '; '.join(failed) if failed else ''}")
    print(json.dumps(asdict(report)))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
