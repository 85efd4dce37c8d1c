#!/usr/bin/env python3
"""Compiles every Triton kernel for a GPU that need not be there, and says what the machine code is like.

    scripts/compile_kernels.py                 for capabilities 8.9 and 9.0

At FLUX.1's own sizes: registers a thread, bytes spilled to local memory, and how wide memory is read. Exits 1 if a
kernel does not compile, spills, or reads pictures or rows in less than 16 bytes at a time. The last line is one JSON
document. Triton brings the assembler; no driver is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flux_local.model import kernels, vae_kernels  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"x": "*bf16", "branch": "*bf16", "beside": "*bf16", "modulation": "*bf16", "qkv": "*bf16", "weights": "*bf16",
         "out": "*bf16", "rotary": "*fp32", "sums": "*fp32", "scale": "*fp32", "shift": "*fp32", "scales": "*fp32",
         "value_scale": "*fp32", "tokens": "*fp8e4nv", "weight": "*bf16", "bias": "*bf16", "addend": "*bf16",
         "values": "*fp8e4nv", "epsilon": "fp32", "largest": "fp32", "tiny": "fp32"}  # fmt: skip
"""Of arguments by name; all others are whole numbers."""
ALIGNED = {"width", "row_stride", "beside_stride", "size", "picture_stride", "stream_stride", "channels", "first"}
"""Numbers that FLUX.1's sizes make multiples of 16."""


@dataclass(frozen=True)
class Found:
    kernel: str
    constants: str
    capability: int
    registers: int
    spilled: int
    wide_reads: int
    narrow_reads: int


Launch = tuple[Any, dict[str, Any], dict[str, str], int]
"""A kernel, its constants, argument types that are not those of `TYPES`, and its warps."""


def launches() -> list[Launch]:
    """All kernels as FLUX.1's sizes launch them."""
    norms: list[Launch] = [
        (
            kernels._add_norm,
            {"ADD": add, "FP8": fp8, "BLOCK": 4096},
            {"out": "*fp8e4nv"} if fp8 else {},
            4 if fp8 else 8,
        )
        for add in (True, False)
        for fp8 in (True, False)
    ]
    quantised: list[Launch] = [
        (kernels._quantise, {"FIRST": first, "GELU": gelu, "BLOCK": block}, {}, 16 if block > 4096 else 8)
        for first, gelu, block in ((True, True, 16384), (False, True, 16384), (False, False, 4096))
    ]
    return [
        *norms,
        *quantised,
        (kernels._norm_rotate, {"FP8": False, "HEADS": kernels.HEADS, "SIZE": 128}, {}, 2),
        (kernels._norm_rotate, {"FP8": True, "HEADS": kernels.HEADS, "SIZE": 128}, {"out": "*fp8e4nv"}, 1),
        (kernels._scatter, {"BLOCK": 4096}, {}, 8),
        (kernels._value_scales, {"TOKENS": kernels.TOKENS, "HEADS": kernels.HEADS, "SIZE": 128}, {}, 4),
        (vae_kernels._channel_sums, {"STAGES": vae_kernels.STAGES, "ROWS": 32, "CHANNELS": 128}, {}, 8),
        (
            vae_kernels._scale_and_shift,
            {"ADD": True, "PER_GROUP": 4, "STAGES": vae_kernels.STAGES, "ROWS": 512, "GROUP": 4},
            {},
            8,
        ),
        (vae_kernels._scale_shift_silu, {"ROWS": 32, "CHANNELS": 128}, {}, 8),
        (vae_kernels._residual_sum, {"ROWS": 32, "CHANNELS": 128}, {}, 8),
        (vae_kernels._doubled, {"ROWS": 8, "CHANNELS": 512}, {}, 8),
    ]


def compiled(kernel: Any, constants: dict[str, Any], types: dict[str, str], warps: int, capability: int) -> Found:
    """Compiles one kernel and reads its machine code."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else {**TYPES, **types}.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()})
    source.attrs = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") or n in ALIGNED
    }
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = said(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = said(TOOLS / "nvdisasm", file.name)
    registers, stack, local = (int(n) for n in re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)[0])
    reads = re.findall(r"\bLDG(?:STS)?\.E\S*", code)
    narrow = [read for read in reads if re.search(r"\.(U8|S8|U16|S16)\b", read)]
    return Found(
        kernel.fn.__name__, " ".join(f"{n}={v}" for n, v in constants.items()), capability, registers, stack + local,
        sum(".128" in read for read in reads), len(narrow),
    )  # fmt: skip


def said(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="+", default=[89, 90], help="as 90 for 9.0")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    found = [compiled(*launch, capability) for capability in options.capability for launch in launches()]
    for f in found:
        print(f"{f.kernel:18} {f.constants:36} {f.capability}  {f.registers:3} registers, {f.spilled} spilled, "
              f"{f.wide_reads} reads of 16 bytes, {f.narrow_reads} of one or two")  # fmt: skip
    print(json.dumps([asdict(f) for f in found]))
    return 1 if any(f.spilled or not f.wide_reads or f.narrow_reads > f.wide_reads for f in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
