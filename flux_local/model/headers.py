"""The headers of weight files, safetensors and GGUF: which tensors are there, of what type and shape. Never torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_local.errors import FETCH_AGAIN, WeightsError

MAX_HEADER = 100_000_000
"""Bytes: the format's own limit."""


@dataclass(frozen=True)
class Header:
    """A file's tensors: the type of each and its shape, outputs first."""

    path: Path
    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    size: int
    """Bytes that the file should have."""


def volume(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def read_header(path: Path) -> Header:
    """Raises `WeightsError` for a file that has no header to be read."""
    return gguf_header(path) if path.suffix.lower() == ".gguf" else safetensors_header(path)


def safetensors_header(path: Path) -> Header:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("a header of that size cannot be")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        size = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        return Header(
            path,
            {name: str(entry["dtype"]) for name, entry in entries.items()},
            {name: tuple(map(int, entry["shape"])) for name, entry in entries.items()},
            size,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(f"{path} is damaged: it has no safetensors header. {FETCH_AGAIN}") from error


def gguf_header(path: Path) -> Header:
    reader = gguf_reader(path)
    types, shapes, end = dict[str, str](), dict[str, tuple[int, ...]](), 0
    for tensor in reader.tensors:
        types[tensor.name] = "GGUF"
        shapes[tensor.name] = tuple(int(side) for side in reversed(tensor.shape))
        end = max(end, int(tensor.data_offset) + int(tensor.n_bytes))
    return Header(path, types, shapes, end)


def gguf_reader(path: Path) -> Any:
    """Raises `WeightsError` where the package is missing or the file is cut or none."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise WeightsError(
            f"{path} needs the package gguf. Install it into flux-local's environment: pip install 'gguf>=0.17'."
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise WeightsError(f"{path} is damaged: it is cut or no GGUF file. {FETCH_AGAIN}") from error
