"""Tensors that come through a ring of buffers have the bits that safetensors reads, however late their copies are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flux_local.errors import WeightsError
from flux_local.model import reading, tensors
from flux_local.model.checkpoint import Part
from flux_local.model.headers import read_header
from flux_local.model.reading import Event, Pieces, Ring
from flux_local.model.tensors import Tensors
from tests.servers import ROOT

PIECE, COUNT, READERS, SMALL = 1000, 6, 4, 100
CPU = torch.device("cpu")


class Copy:
    """One that is made when it is waited for, as late as a GPU may make it."""

    def __init__(self, target: Tensor, buffer: Tensor) -> None:
        self.target, self.buffer, self.made = target, buffer, False

    def synchronize(self) -> None:
        if not self.made:
            self.target.copy_(self.buffer)
            self.made = True


class LateRing(Ring):
    """Copies as a stream does: later, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.stream: list[Copy] = []

    def copy(self, target: Tensor, buffer: Tensor) -> Event:
        self.stream.append(Copy(target, buffer))
        return self.stream[-1]

    def synchronize(self) -> None:
        for copy in self.stream:
            copy.synchronize()
        self.stream.clear()


def ring(kind: type[Ring] = Ring, count: int = COUNT) -> Any:
    return kind(torch.empty(PIECE * count, dtype=torch.uint8), PIECE, READERS, SMALL)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Of any bits; two that are equal have the same."""
    count = int(torch.tensor(shape).prod()) * dtype.itemsize if shape else dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of less than a piece, of one, of some and a part, and of more than the ring; and of none."""
    torch.manual_seed(0)
    sizes = [(1,), (50,), (51,), (499,), (500,), (501,), (1000,), (7, 211), (PIECE * COUNT,), (37, 1021), (0,), (0, 5)]
    state = {f"bf16 {size}": numbers(*size) for size in sizes}
    for dtype in reading.TYPES.values():
        state[f"{dtype} scalar"] = numbers(dtype=dtype)
        state[f"{dtype} matrix"] = numbers(31, 77, dtype=dtype)
    state["integers"] = torch.arange(3000)
    save_file(state, tmp_path / "tensors.safetensors")
    return tmp_path / "tensors.safetensors"


@pytest.mark.parametrize("count", [1, 2, 3, COUNT])
@pytest.mark.parametrize("kind", [Ring, LateRing])
def test_the_same_bits(kind: type[Ring], count: int, path: Path) -> None:
    shared = ring(kind, count)
    pieces = Pieces(path, CPU, lambda: shared)
    with safe_open(path, "pt") as own:
        assert pieces.keys() == list(own.keys())
        names = [*own.keys(), *reversed(own.keys()), *own.keys()]
        found = [(pieces.get_tensor(name), own.get_tensor(name)) for name in names]
    if kind is LateRing:
        assert any(not torch.equal(bits(ours), bits(theirs)) for ours, theirs in found), "nothing was late"
        shared.synchronize()
    for ours, theirs in found:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.is_contiguous()
        assert torch.equal(bits(ours), bits(theirs))


def test_what_was_read_is_ones_own(path: Path) -> None:
    """Each time anew, in no memory that others have: adapters write to it."""
    shared = ring()
    pieces = Pieces(path, CPU, lambda: shared)
    first, second = (pieces.get_tensor("bf16 (37, 1021)") for _ in range(2))
    expected = second.clone()
    first.zero_()
    assert torch.equal(bits(second), bits(expected))
    assert not second._is_view()


def test_modes_do_not_mix(path: Path) -> None:
    shared = ring(LateRing)
    pieces = Pieces(path, CPU, lambda: shared)
    with torch.inference_mode():
        pieces.get_tensor("bf16 (37, 1021)")
        shared.synchronize()
    pieces.get_tensor("bf16 (37, 1021)")
    with torch.inference_mode():
        shared.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_precision_asked_for(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of the bits is the same for both ways of reading them."""
    path = tmp_path / "tensors.safetensors"
    state = {f"of.{dtype}".removesuffix("fn"): torch.randn(40, 90).to(dtype) for dtype in reading.TYPES.values()}
    eight = torch.float8_e4m3fn
    state |= {"scaled.weight": torch.randn(40, 90).to(eight), "scaled.scale_weight": torch.tensor(0.37)}
    state |= {"rows.weight": torch.randn(40, 90).to(eight), "rows.weight_scale": torch.rand(40)}
    save_file(state, path)
    part = Part((read_header(path),))
    theirs, shared = Tensors(part, "cpu", dtype), ring()
    monkeypatch.setattr(tensors, "opened", lambda path, device: Pieces(path, torch.device(device), lambda: shared))
    ours = Tensors(part, "cpu", dtype)
    assert ours.names() == theirs.names()
    for name in theirs.names():
        assert ours(name).dtype == dtype
        assert torch.equal(bits(ours(name)), bits(theirs(name))), name


def test_a_file_that_is_cut(path: Path) -> None:
    """Before it is opened safetensors says so; afterwards a mapping would end the process."""
    shared = ring(LateRing)
    pieces = Pieces(path, CPU, lambda: shared)
    expected = {name: pieces.get_tensor(name) for name in ("bf16 (37, 1021)", "bf16 (1,)")}
    shared.synchronize()
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 1)
    with pytest.raises(SafetensorError):
        Pieces(path, CPU, lambda: shared)
    os.truncate(path, max(entry.at for entry in pieces.entries.values()) // 2)
    lost = []
    for name in pieces.entries:
        try:
            pieces.get_tensor(name)
        except WeightsError as error:
            assert path.name in error.message  # noqa: PT017
            lost.append(name)
    assert {"bf16 (37, 1021)", "bf16 (1,)"} & set(lost)
    path.write_bytes(whole)
    for name, tensor in expected.items():
        again = pieces.get_tensor(name)
        shared.synchronize()
        assert torch.equal(bits(again), bits(tensor)), "the ring is out of step"


def test_no_thread_writes_after_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first piece fails while others are read; their buffers are the next tensor's."""
    shared, real, begun, ended = ring(), reading.read, list[int](), list[int]()
    pieces = Pieces(path, CPU, lambda: shared)
    first = pieces.entries["bf16 (37, 1021)"].at

    def slow(file: int, into: memoryview, at: int) -> None:
        if at == first:
            raise EOFError
        begun.append(at)
        time.sleep(0.05)
        real(file, into, at)
        ended.append(at)

    monkeypatch.setattr(reading, "read", slow)
    with pytest.raises(WeightsError):
        pieces.get_tensor("bf16 (37, 1021)")
    assert begun
    assert sorted(begun) == sorted(ended)


def test_several_pieces_are_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, real, together = ring(), reading.read, threading.Barrier(3, timeout=20)

    def waiting(file: int, into: memoryview, at: int) -> None:
        together.wait()
        real(file, into, at)

    pieces = Pieces(path, CPU, lambda: shared)
    monkeypatch.setattr(reading, "read", waiting)
    pieces.get_tensor(f"bf16 ({PIECE * COUNT},)")


def test_short_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system may give less than was asked for."""
    real: Callable[..., int] = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, at: real(file, [into[0][:300]], at))
    shared = ring()
    pieces = Pieces(path, CPU, lambda: shared)
    with safe_open(path, "pt") as own:
        for name in own.keys():  # noqa: SIM118, it is no mapping
            assert torch.equal(bits(pieces.get_tensor(name)), bits(own.get_tensor(name)))


def test_threads_share_a_ring(path: Path) -> None:
    shared = ring()
    pieces, wrong = Pieces(path, CPU, lambda: shared), []
    with safe_open(path, "pt") as own:
        expected = {name: own.get_tensor(name) for name in own.keys()}  # noqa: SIM118, it is no mapping

    def check() -> None:
        for name, tensor in expected.items():
            if not torch.equal(bits(pieces.get_tensor(name)), bits(tensor)):
                wrong.append(name)

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_pinned_memory_safetensors_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("no memory can be pinned")

    monkeypatch.setattr(reading, "Ring", refused)  # where there is a GPU, it can be had
    reading.pinned.cache_clear()
    pieces = Pieces(path, CPU, reading.pinned)
    with safe_open(path, "pt") as own:
        found = pieces.get_tensor("bf16 (37, 1021)")
        assert torch.equal(bits(found), bits(own.get_tensor("bf16 (37, 1021)")))
    assert reading.pinned() is None


def test_a_cpu_has_safetensors_own(path: Path) -> None:
    assert isinstance(reading.opened(path, "cpu"), safe_open)


def test_files_are_closed(path: Path) -> None:
    shared = ring()
    pieces = Pieces(path, CPU, lambda: shared)
    read, file = pieces.get_tensor, pieces.file
    read("bf16 (7, 211)")
    del pieces
    read("bf16 (7, 211)")
    del read
    gc.collect()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(file)


def test_a_process_ends_with_its_threads(path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from flux_local.model.reading import Pieces, Ring\n"
        "ring = Ring(torch.empty(8000, dtype=torch.uint8), 1000)\n"
        "file = Pieces(Path(sys.argv[1]), torch.device('cpu'), lambda: ring)\n"
        "print(file.get_tensor('bf16 (37, 1021)').shape)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "37, 1021" in done.stdout
