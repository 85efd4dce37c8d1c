"""Tensors out of safetensors files straight to a GPU: read by several threads, through pinned host memory.

A mapped file comes a page at a time by one thread, into memory that a GPU cannot copy from by itself. Here threads read
pieces of a tensor into a ring of buffers, and the GPU copies each while the next are read. What is not for a GPU,
types that no weights have, and everything where no memory can be pinned, is safetensors' own to read.
Knows nothing of models, of what tensors are called, and of what becomes of them. Never a pickle, never the network.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from flux_local.errors import FETCH_AGAIN, WeightsError

PIECE = 4 << 20
"""Bytes that a thread reads at a time: few enough that several share in a matrix of 18 MB."""
PIECES = 32
"""Of the ring: 128 MB of host memory, which a process keeps for the next adapter."""
READERS = 8
SMALL = 1 << 18
"""Bytes that are read sooner than a thread is woken."""
TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Of numbers, by their names in a file."""

log = logging.getLogger("flux_local.reading")


class Opened(Protocol):
    """What is used of safetensors' `safe_open`."""

    def keys(self) -> Sequence[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


def opened(path: Path, device: str) -> Opened:
    """A file whose tensors are wanted on a device. Raises what `safe_open` does."""
    from safetensors import safe_open

    place = torch.device(device)
    if place.type != "cuda":
        return safe_open(path, framework="pt", device=device)
    if place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return Pieces(path, place, pinned)


class Pieces:
    """A file whose tensors are read through a ring, if there is one.

    A tensor is good for the stream that was current when it was asked for, and for what waits on that.
    """

    def __init__(self, path: Path, device: torch.device, ring: Callable[[], Ring | None]) -> None:
        from safetensors import safe_open

        self.path, self.device, self.ring = path, device, ring
        self.own: Any = safe_open(path, framework="pt", device=str(device))  # which looks whether the file is whole
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)
        try:
            self.entries = entries(self.file)
        except EOFError as error:
            raise self.cut() from error

    def keys(self) -> Sequence[str]:
        return list(self.own.keys())

    def get_tensor(self, name: str) -> Tensor:
        """Raises `WeightsError` where the file was cut after it was opened."""
        entry, ring = self.entries.get(name), self.ring()
        if entry is None or ring is None:
            found: Tensor = self.own.get_tensor(name)
            return found
        tensor = torch.empty(entry.shape, dtype=entry.dtype, device=self.device)
        try:
            ring.fill(tensor.reshape(-1).view(torch.uint8), self.file, entry.at)
        except EOFError as error:
            raise self.cut() from error
        return tensor

    def cut(self) -> WeightsError:
        return WeightsError(f"{self.path} is damaged: it is cut. {FETCH_AGAIN}")


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `at`: its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int


def entries(file: int) -> dict[str, Entry]:
    """Of a whole file: its tensors by name, but for those of other types."""
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    header = bytearray(length)
    read(file, memoryview(header), 8)
    found = json.loads(header)
    found.pop("__metadata__", None)
    return {
        name: Entry(TYPES[one["dtype"]], tuple(one["shape"]), 8 + length + one["data_offsets"][0])
        for name, one in found.items()
        if one["dtype"] in TYPES
    }


def read(file: int, into: memoryview, at: int) -> None:
    """Fills memory with a file's bytes from a place on. Raises `EOFError` where it ends before."""
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], at + done)
        if count == 0:
            raise EOFError
        done += count


class Event(Protocol):
    """What tells that a copy is done."""

    def synchronize(self) -> None: ...


class Ring:
    """Buffers of host memory, which threads fill from files and copies to tensors empty. One of them fills at a time.

    Args:
        memory: bytes, pinned where the tensors are a GPU's.
        piece: bytes of a buffer.
    """

    def __init__(self, memory: Tensor, piece: int = PIECE, readers: int = READERS, small: int = SMALL) -> None:
        self.piece, self.small = piece, small
        self.buffers = memory.split(piece)
        self.bytes = [memoryview(buffer.numpy()) for buffer in self.buffers]
        self.events: list[Event | None] = [None] * len(self.buffers)
        """By buffer: of the copy out of it, which may be still on its way."""
        self.ahead = max(1, len(self.buffers) // 2)
        """Pieces that may be read at once; as many others may be on their way."""
        self.at = 0
        self.lock = Lock()
        self.threads = ThreadPoolExecutor(readers, "reading")

    def fill(self, target: Tensor, file: int, at: int) -> None:
        """As many of a file's bytes from a place on as `target` has, which is of one dimension.

        They are all read when it returns; the copies may be still on their way, in the current stream.

        Raises:
            EOFError: the file ends before. OSError: it cannot be read.
        """
        with self.lock:
            if len(target) <= min(self.small, self.piece):
                index = self.free()
                read(file, self.bytes[index][: len(target)], at)
                self.events[index] = self.copy(target, self.buffers[index][: len(target)])
                return
            reading: deque[tuple[Tensor, int, Future[None]]] = deque()
            try:
                for part in target.split(self.piece):
                    if len(reading) == self.ahead:
                        self.send(*reading.popleft())
                    index = self.free()
                    future = self.threads.submit(read, file, self.bytes[index][: len(part)], at)
                    reading.append((part, index, future))
                    at += len(part)
                while reading:
                    self.send(*reading.popleft())
            finally:
                wait([future for _, _, future in reading])  # after an error: no thread may be left writing

    def free(self) -> int:
        """The next buffer, once what was in it is copied."""
        index, self.at = self.at, (self.at + 1) % len(self.buffers)
        if (event := self.events[index]) is not None:
            event.synchronize()
            self.events[index] = None
        return index

    def send(self, part: Tensor, index: int, reading: Future[None]) -> None:
        reading.result()
        self.events[index] = self.copy(part, self.buffers[index][: len(part)])

    def copy(self, target: Tensor, buffer: Tensor) -> Event | None:
        """Puts a copy into the current stream; None where it is done at once."""
        target.copy_(buffer, non_blocking=True)
        return torch.cuda.current_stream(target.device).record_event() if target.is_cuda else None


@cache
def pinned() -> Ring | None:
    """This process's ring for GPUs; None where its memory cannot be pinned."""
    try:
        with torch.inference_mode(False):  # it is used in every mode
            return Ring(torch.empty(PIECE * PIECES, dtype=torch.uint8, device="cpu", pin_memory=True))
    except RuntimeError as error:
        log.warning("no host memory can be pinned, which makes loading slow: %s", str(error).splitlines()[0])
        return None
