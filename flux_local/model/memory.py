"""What of a model fits on a device, and the device's state while it runs.

The plan is arithmetic over the model's sizes, the free memory and what is asked for; nothing is allocated to find out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from flux_local.errors import StartError
from flux_local.model import hostmemory
from flux_local.model.checkpoint import Checkpoint, Part
from flux_local.model.headers import volume

Tier = Literal["both", "full", "fp8", "swap", "offload"]
Precisions = Literal["both", "full", "fp8"]

TIERS: dict[Tier, str] = {
    "both": "everything resident, the model's own precision and fp8",
    "full": "everything resident, the model's own precision",
    "fp8": "everything resident, transformer and T5 in fp8",
    "swap": "transformer resident in fp8, text encoders and modulation in host memory",
    "offload": "weights in host memory, brought block by block, by diffusers' own transformer",
}
"""From the most memory to the least, with what each means."""
MEETS: dict[Precisions, tuple[Tier, ...]] = {
    "both": ("both", "full", "fp8", "swap", "offload"),
    "full": ("full", "offload"),
    "fp8": ("fp8", "swap"),
}
"""The tiers that serve what is asked for, the best first."""

ON_CPU: tuple[Tier, ...] = ("both", "full", "fp8")
CPU_WORD = 4
"""Bytes of a number on a CPU: fp32, and what is rounded to fp8 too."""

OUT_OF_MEMORY = 2
"""cudaErrorMemoryAllocation."""
WORD = 2
"""Bytes of a number on a GPU: bf16."""
BUFFERS = 16
"""Times a token's width that a pass holds at once: residual, normalised rows, the joined products and their outputs."""
TEXT = 512
STEP_TOKENS = 4096
"""Image tokens of a step that batching may reach, whatever the canvas."""
DECODER_BUFFERS = 3
"""Pictures at full size, with the channels before the last level, that decoding holds at once."""
SMALLEST_DECODE = 1_100_000
"""Pixels that have to be decoded in one piece, whatever is free: those of every canvas of the size table's 1K. Above,
tiles will do."""
TILE_STEP = 1 << 19
"""Pixels by which that grows with the room there is: few values, so that starts alike decode alike."""
KEPT = 256 << 20
"""Bytes that a process which computes on the CPU keeps of what it has freed: more than a small model's work."""
MALLOPT_TRIM, MALLOPT_MMAP = -1, -3
LARGEST_MMAP = 32 << 20
"""The most that glibc takes for M_MMAP_THRESHOLD on 64 bits."""
SPARE = 1_000_000_000
"""Bytes for the libraries' workspaces, the cache of prompts and the allocator's slack."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, by what can be done with them.

    `blocks`: the matrices that fp8 takes. `modulation`: used once a picture. `rest`: the transformer's others.
    `largest_block`: of those, what is brought at a time. `t5_matrices`: the part of `t5` that fp8 takes. `width`: of a
    token inside the transformer. `channels`: of the decoder before its last level. `transformer_pinned`,
    `text_pinned`: bytes of host memory that their tensors take where a GPU may copy them by itself.
    """

    blocks: int
    modulation: int
    rest: int
    largest_block: int
    t5: int
    t5_matrices: int
    clip: int
    vae: int
    width: int
    channels: int
    transformer_pinned: int
    text_pinned: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        parts = checkpoint.parts
        blocks = modulation = rest = 0
        by_block: dict[str, int] = {}
        for name, shape in parts["transformer"].shapes().items():
            is_block, count = "_blocks." in name, volume(shape)
            if is_block:
                block = ".".join(name.split(".")[:2])
                by_block[block] = by_block.get(block, 0) + count
            if len(shape) == 2 and ("norm" in name or "mod" in name):
                modulation += count
            elif len(shape) == 2 and is_block:
                blocks += count
            else:
                rest += count
        config = checkpoint.config("transformer")
        return cls(
            blocks, modulation, rest, max(by_block.values(), default=0),
            parts["text_encoder_2"].parameters, matrices(parts["text_encoder_2"]), parts["text_encoder"].parameters,
            parts["vae"].parameters, config["num_attention_heads"] * config["attention_head_dim"],
            checkpoint.config("vae")["block_out_channels"][1], pinned(parts["transformer"]),
            pinned(parts["text_encoder_2"]) + pinned(parts["text_encoder"]),
        )  # fmt: skip

    @property
    def transformer(self) -> int:
        return self.blocks + self.modulation + self.rest


def pinned(part: Part) -> int:
    """Bytes of all tensors, each in a block of its own."""
    return sum(pinned_block(WORD * volume(shape)) for shape in part.shapes().values())


def pinned_block(nbytes: int) -> int:
    """What torch's allocator of pinned memory takes: the next power of two (CachingHostAllocator.h)."""
    return 1 << max(0, nbytes - 1).bit_length()


def matrices(part: Part) -> int:
    """Parameters of T5's linear layers; the table of tokens is none."""
    return sum(volume(shape) for name, shape in part.shapes().items() if len(shape) == 2 and ".block." in name)


@dataclass(frozen=True)
class Plan:
    """How a model is laid out.

    `needed`: bytes on the device, weights and work. `room`: the bytes that are free there; None where nobody counts.
    `host`: bytes that weights take in host memory, of which what is brought again and again is `pinned` where there is
    room: that crosses faster, and takes more. `modulation_on_host`: whether its weights wait there, for lack of
    room. `tile_above`: pixels of a canvas from which on decoding goes in tiles. `prepared`: whether the transformer
    was read as `flux-local prepare` left it.
    """

    tier: Tier
    needed: int = 0
    room: int | None = None
    host: int = 0
    pinned: bool = True
    modulation_on_host: bool = False
    tile_above: int | None = None
    prepared: bool = False

    def __str__(self) -> str:
        said = f"{self.tier}: {TIERS[self.tier]}"
        if self.room is not None:
            said += f"; {self.needed / 1e9:.1f} of {self.room / 1e9:.1f} GB"
        if self.modulation_on_host and self.tier != "swap":
            said += "; modulation in host memory"
        if self.host:
            said += f"; {self.host / 1e9:.1f} GB of host memory{'' if self.pinned else ', not pinned for lack of it'}"
        if self.tile_above is not None:
            said += f"; decoding in tiles above {self.tile_above / 1e6:.1f} megapixels"
        return said + ("; as prepared" if self.prepared else "")


def plan(
    sizes: Sizes,
    room: int | None,
    precisions: Precisions = "both",
    tier: Tier | None = None,
    largest: int = 1 << 22,
    emulated: bool = False,
    host_room: int | None = None,
) -> Plan:
    """The best layout that fits.

    Args:
        room: free bytes on the device; None where they are not counted, as on a CPU.
        tier: this one, whether it fits or not.
        largest: pixels of the largest canvas.
        emulated: whether the device has no fp8 products, so that weights rounded to fp8 take as much as before.
        host_room: bytes of host memory that are free; None where they are not counted.

    Raises:
        StartError: nothing fits, or the tier asked for does not give the precisions asked for.
    """
    tiers = MEETS[precisions]
    if tier is not None and tier not in tiers:
        raise StartError(
            f"--memory {tier} does not go with --precisions {precisions}. Leave one out; {precisions} goes with "
            f"{', '.join(tiers)}."
        )
    if room is None:
        return on_cpu(sizes, [tier] if tier else [each for each in tiers if each in ON_CPU], host_room)
    work = step_work(sizes.width, largest) + decode_work(sizes, min(largest, SMALLEST_DECODE)) + SPARE
    for candidate in [tier] if tier else tiers:
        ways = [replace(way, needed=way.needed + work, room=room) for way in layouts(sizes, candidate, emulated)]
        fitting = [way for way in ways if way.needed <= room and (host_room is None or way.host <= host_room)]
        if fitting or tier:
            chosen = (fitting or ways[-1:])[0]
            left = max(0, room - chosen.needed)
            decodable = min(largest, SMALLEST_DECODE) + left // decode_work(sizes, TILE_STEP) * TILE_STEP
            return replace(chosen, tile_above=None if decodable >= largest else decodable)
    every = [way for candidate in tiers for way in layouts(sizes, candidate, emulated)]
    least = min(way.needed for way in every) + work
    if least <= room and host_room is not None:
        on_host = min(way.host for way in every if way.needed + work <= room)
        raise StartError(
            f"{room / 1e9:.1f} GB are free on the device, so that weights have to wait in host memory; of that "
            f"{host_room / 1e9:.1f} GB are free and {on_host / 1e9:.1f} GB are needed. Free some memory, or take "
            "another device with --devices."
        )
    other = " --precisions both needs less." if precisions == "fp8" else ""
    raise StartError(
        f"{room / 1e9:.1f} GB are free on the device; this model needs {least / 1e9:.1f} GB at least.{other} Free "
        "some, or take another device with --devices."
    )


def on_cpu(sizes: Sizes, tiers: Sequence[Tier], host_room: int | None) -> Plan:
    """The first of these that host memory has room for.

    Raises:
        StartError: none, and there is a choice.
    """
    free = math.inf if host_room is None else host_room
    everything = CPU_WORD * (sizes.transformer + sizes.t5 + sizes.clip + sizes.vae)
    for tier in tiers:
        needed = everything + (CPU_WORD * sizes.blocks if tier == "both" else 0)
        if needed <= free or len(tiers) == 1:
            return Plan(tier, modulation_on_host=tier == "swap")
    raise StartError(
        f"On the CPU this model needs {everything / 1e9:.0f} GB of memory; {free / 1e9:.0f} GB are free for it. Free "
        "some, run it on a GPU (`flux-local doctor` says why torch sees none), or try all the same with --memory full."
    )


def layouts(sizes: Sizes, tier: Tier, emulated: bool = False) -> list[Plan]:
    """The ways to lay a tier out, the fastest first, with the bytes of the weights alone."""
    vae = WORD * sizes.vae
    rest = vae + WORD * sizes.clip
    t5, t5_fp8 = WORD * sizes.t5, WORD * sizes.t5 - (WORD - 1) * sizes.t5_matrices
    modulation = WORD * sizes.modulation
    waiting = pinned_block(modulation)
    full = WORD * sizes.transformer
    blocks = (WORD if emulated else 1) * sizes.blocks
    fp8 = blocks + WORD * sizes.rest
    match tier:
        case "both":
            return [Plan(tier, full + blocks + t5 + rest)]
        case "full":
            return [Plan(tier, full + t5 + rest)]
        case "fp8":
            return [
                Plan(tier, fp8 + modulation + t5_fp8 + rest),
                Plan(tier, fp8 + t5_fp8 + rest, host=waiting, modulation_on_host=True),
            ]
        case "swap":
            return [
                Plan(tier, fp8 + vae, host=text + waiting, pinned=how, modulation_on_host=True)
                for text, how in ((sizes.text_pinned, True), (t5 + WORD * sizes.clip, False))
            ]
        case "offload":
            # The block at work, the one on its way, and the one that leaves.
            needed = 3 * WORD * sizes.largest_block + vae
            plain = full + t5 + WORD * sizes.clip
            return [
                Plan(tier, needed, host=sizes.transformer_pinned + sizes.text_pinned),
                Plan(tier, needed, host=plain, pinned=False),
            ]


def step_work(width: int, largest: int) -> int:
    """Bytes that a pass holds beside the weights, at the largest canvas or a full batch of smaller ones.

    Args:
        width: of a token.
        largest: pixels of the largest canvas.
    """
    tokens = max(largest // 256, STEP_TOKENS) + TEXT
    return BUFFERS * tokens * width * WORD


def decode_work(sizes: Sizes, pixels: int) -> int:
    return DECODER_BUFFERS * sizes.channels * pixels * WORD


def room(device: str) -> int | None:
    """Free bytes; None on a CPU."""
    return None if device == "cpu" else int(torch.cuda.mem_get_info(device)[0])


def host_room(sharing: int = 1) -> int:
    """Free bytes of host memory, and no more than the share of one of so many engines."""
    return min(hostmemory.available(), hostmemory.total() // sharing)


def sharing(device: str, devices: Sequence[str]) -> int:
    """Engines that may keep weights in host memory as this one does: all on GPUs, or all on the CPU."""
    return max(1, sum((other == "cpu") == (device == "cpu") for other in devices))


def is_exhausted(error: BaseException) -> bool:
    """Whether an error means that there was no memory left for what was tried: for torch's allocator, or for what CUDA
    allocates by itself, such as a graph."""
    if isinstance(error, torch.AcceleratorError):
        return getattr(error, "error_code", None) == OUT_OF_MEMORY
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process: after such an error every further call fails too.

    cuBLAS, cuDNN and Triton say it in errors of their own, which other failures come in too: there the device is asked.
    """
    if isinstance(error, torch.AcceleratorError):
        return not is_exhausted(error)
    if isinstance(error, RuntimeError) and not is_exhausted(error) and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def has_room(tensor: torch.Tensor) -> bool:
    """Whether a copy of a tensor may stay where it is with a fifth of the memory to spare for work."""
    if tensor.device.type != "cuda":
        return hostmemory.available() - tensor.nbytes > hostmemory.total() // 5
    # What the allocator has in reserve does not count: a part of it belongs to graphs.
    free_bytes, total = torch.cuda.mem_get_info(tensor.device)
    return free_bytes - tensor.nbytes > total // 5


def keep_freed() -> None:
    """Has glibc keep the memory of a layer's results for the next layer's. By itself it gives megabytes back to the
    kernel at every layer, which brings them page by page again, and zeroed: a twentieth of a small picture's time.

    Sets M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, mallopt(3). Nothing where the C library has no such call.
    """
    with contextlib.suppress(OSError, AttributeError):
        c = ctypes.CDLL(None)
        c.mallopt(MALLOPT_TRIM, KEPT)
        c.mallopt(MALLOPT_MMAP, LARGEST_MMAP)


def free() -> None:
    """Gives back what nothing holds any more, the allocators' own reserves too."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
