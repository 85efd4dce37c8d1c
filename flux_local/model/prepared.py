"""A transformer in its final form on disk: layers joined, blocks in fp8 with their scales, the rest as it is.

`write` makes it once from a checkpoint, in files of about a gigabyte (modulation is one of six), so that no more than
one of them is in memory;
`PreparedLayers` reads it straight to the device. A folder is named by what its source was, so that another model, or
the same one changed, never finds it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flux_local.errors import WeightsError
from flux_local.model.checkpoint import Checkpoint
from flux_local.model.fp8 import Fp8Linear, RoundedLinear
from flux_local.model.geometry import Geometry
from flux_local.model.headers import read_header
from flux_local.model.layers import HostLinear, Layers, Linear, Weights, same
from flux_local.model.ops import Rows, quantised
from flux_local.model.reading import Opened, opened
from flux_local.model.transformer import FluxTransformer

LAYOUT = 1
"""Of these files; counted up when what is in them changes."""
SHARD = 1 << 30
"""Bytes after which a file is written."""
INDEX = "index.json"
SAMPLES, SAMPLE = 16, 4096
"""Of each file of the source: how many places are looked at, and how many bytes there."""
SPARE = 1 << 30
"""Bytes to leave free on the disk."""

Report = Callable[[int], None]
"""Told of so many bytes of the source more that are done."""


def fingerprint(checkpoint: Checkpoint, dtype: torch.dtype) -> str:
    """A hash of what the transformer's files are, by headers, sizes, times and samples, and of the precision wanted."""
    told = hashlib.sha256(f"{LAYOUT} {dtype} {json.dumps(checkpoint.config('transformer'), sort_keys=True)}".encode())
    for header in checkpoint.parts["transformer"].headers:
        state = header.path.stat()
        entries = sorted((name, header.types[name], shape) for name, shape in header.shapes.items())
        told.update(f"{header.path.name} {state.st_size} {state.st_mtime_ns} {entries}".encode())
        with header.path.open("rb") as file:
            for i in range(1, SAMPLES + 1):
                file.seek(state.st_size * i // (SAMPLES + 1))
                told.update(file.read(SAMPLE))
    return told.hexdigest()[:24]


def find(cache: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> Path | None:
    """The folder prepared for this model and precision, if there is one and it is whole.

    Raises:
        WeightsError: it is there but damaged.
    """
    folder = cache / fingerprint(checkpoint, dtype)
    if not (folder / INDEX).is_file():
        return None
    for name, size in read_index(folder)["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise WeightsError(
                f"{folder / name} is missing or cut. Delete {folder}, or run `flux-local prepare` again."
            )
    return folder


def read_index(folder: Path) -> dict[str, Any]:
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text())
        return {"files": dict(index["files"]), "parts": dict(index["parts"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / INDEX} is damaged. Delete {folder}, or run `flux-local prepare` again."
        ) from error


def write(
    cache: Path, checkpoint: Checkpoint, weights: Weights, dtype: torch.dtype, report: Report = lambda count: None
) -> Path:
    """Prepares a model; returns its folder.

    Args:
        weights: its transformer's tensors in `dtype`, on the device that is to compute.

    What stood there before is there until the new one is whole.

    Raises:
        WeightsError: the folder cannot be written, or its disk has no room.
    """
    from safetensors import SafetensorError

    folder = cache / fingerprint(checkpoint, dtype)
    partial = folder.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        needed, free = (
            checkpoint.parts["transformer"].parameters * dtype.itemsize + SPARE,
            shutil.disk_usage(cache).free,
        )
        if needed > free:
            raise WeightsError(
                f"The disk of {cache} has {free / 1e9:.1f} GB free; up to {needed / 1e9:.1f} GB are needed. "
                "Free some, or give another place with --cache-dir."
            )
        recorder = Recorder(weights, partial, report)
        FluxTransformer(Geometry.of(checkpoint.config("transformer")), recorder)
        recorder.flush()
        index = {"layout": LAYOUT, "source": str(checkpoint.path), "files": recorder.files, "parts": recorder.parts}
        (partial / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"Cannot write {folder}: {error}. Give another place with --cache-dir.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class Recorder(Layers):
    """Writes each layer to disk as it is asked for, and gives one without numbers in its place."""

    def __init__(self, weights: Weights, folder: Path, report: Report) -> None:
        super().__init__(weights)
        self.folder, self.report = folder, report
        self.pending: dict[str, Tensor] = {}
        self.files: dict[str, int] = {}
        self.parts: dict[str, tuple[tuple[str, int], ...]] = {}

    def linear(self, *names: str) -> Linear:
        made = super().linear(*names)
        return self.record(made, weight=made.weight, bias=made.bias)

    def modulation(self, *names: str) -> Linear:
        return self.linear(*names)

    def block(self, *names: str) -> Linear:
        made = super().linear(*names)
        values, scale = quantised(made.weight)
        return self.record(made, weight=values, scale=scale, bias=made.bias)

    def norms(self, *names: str) -> Tensor:
        found = super().norms(*names)
        self.keep(names[0], {"norms": found})
        return found.to("meta")

    def record(self, linear: Linear, **tensors: Tensor) -> Linear:
        self.parts[linear.parts[0][0]] = linear.parts
        self.keep(linear.parts[0][0], tensors)
        self.report(linear.weight.nbytes + linear.bias.nbytes)
        return Linear(linear.weight.to("meta"), linear.bias.to("meta"), parts=linear.parts)

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.pending |= {f"{name}.{kind}": tensor.contiguous().cpu() for kind, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self.pending.values()) >= SHARD:
            self.flush()

    def flush(self) -> None:
        from safetensors.torch import save_file

        if self.pending:
            path = self.folder / f"{len(self.files):04}.safetensors"
            save_file(self.pending, path)
            self.files[path.name] = path.stat().st_size
            self.pending = {}


@dataclass(frozen=True)
class Target:
    """Where a prepared transformer goes.

    `native`: whether the device has products in fp8. `quantise`: how it puts rows into fp8. `modulation_on_host`:
    whether that waits in host memory.
    """

    device: str
    native: bool
    quantise: Callable[[Tensor], Rows]
    modulation_on_host: bool


class PreparedLayers(Layers):
    """Layers as `write` left them."""

    def __init__(self, folder: Path, target: Target) -> None:
        index = read_index(folder)
        self.parts = {name: tuple((part, rows) for part, rows in parts) for name, parts in index["parts"].items()}
        self.target = target
        self.path: dict[str, Path] = {
            name: folder / file for file in index["files"] for name in read_header(folder / file).shapes
        }
        self.opened: dict[tuple[Path, str], Opened] = {}
        super().__init__(self.tensor, same)

    def tensor(self, name: str, device: str | None = None, pinned: bool = False) -> Tensor:
        path, place = self.path[name], device or self.target.device
        if (path, place) not in self.opened:
            self.opened[path, place] = opened(path, place)
        found: Tensor = self.opened[path, place].get_tensor(name)
        # In host memory it is a view of the file, of any alignment, and products of such have other bits.
        return found.new_empty(found.shape, pin_memory=pinned).copy_(found) if place == "cpu" else found

    def linear(self, *names: str) -> Linear:
        key = names[0]
        return Linear(self.tensor(f"{key}.weight"), self.tensor(f"{key}.bias"), parts=self.parts[key])

    def modulation(self, *names: str) -> Linear:
        if not self.target.modulation_on_host:
            return self.linear(*names)
        key, device = names[0], torch.device(self.target.device)
        weight = self.tensor(f"{key}.weight", "cpu", pinned=device.type == "cuda")
        return HostLinear.of(Linear(weight, self.tensor(f"{key}.bias", "cpu"), parts=self.parts[key]), device)

    def block(self, *names: str) -> Linear:
        key = names[0]
        values, scale, bias = (self.tensor(f"{key}.{kind}") for kind in ("weight", "scale", "bias"))
        if self.target.native:
            return Fp8Linear(values, bias, scale.t().contiguous(), self.target.quantise, parts=self.parts[key])
        return RoundedLinear((values.float() * scale).to(bias.dtype), bias, parts=self.parts[key])

    def norms(self, *names: str) -> Tensor:
        return self.tensor(f"{names[0]}.norms")
