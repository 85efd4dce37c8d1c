"""A function of tensors as CUDA graphs: one a shape, captured the first time and replayed from then on.

Captured on the device and checked there against the function itself; what cannot be captured, or does not repeat its
bits, runs as it is. Graphs share a pool of memory, so that they cost little more than the largest of them; all go when
there are too many. Knows nothing of what the function computes.

A pool's blocks are never joined nor given back while a graph lives, so that what one graph left is of no use to a
larger one. Hence a pool begins with one block that is large enough for all, and inputs and outputs lie outside of it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from flux_local.model import memory

GRAPHS = 32
"""Of one function: the canvases of the size table, and batches of those in use."""

log = logging.getLogger("flux_local.graphs")

Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.graph.replay()
        return self.output.clone()  # the next replay writes there


class OtherBits(RuntimeError):
    """A graph's replay gives other bits than the call that it was recorded from."""


class Unrecordable(RuntimeError):
    """Something in the function cannot be recorded. What has been may be spoilt."""


class Pool:
    """Memory that graphs share which never run at the same time, whosever they are.

    Args:
        work: bytes that the largest of them takes while it runs.
    """

    def __init__(self, work: int = 0) -> None:
        self.work = work
        self.closed = False
        """Nothing more is recorded."""
        self.aside = torch.cuda.Stream()
        """What is recorded runs there before, so that cuBLAS has its workspace of the stream by then: made during the
        first recording, it would lie in the pool for good, and keep the pool's block from being given back."""
        self.users: WeakSet[Graphs] = WeakSet()
        self.recordings = 0
        """Tried so far."""
        self.renew()

    def renew(self) -> None:
        """Has what is captured from now on take other memory; earlier graphs keep theirs."""
        self.handle = torch.cuda.graph_pool_handle()
        self.begun = False

    def retire(self) -> None:
        """Lets the graphs of all users go, and has what is captured from now on take other memory.

        Never one alone: with a graph goes cuBLAS's workspace of the stream that it was recorded on (torch from 2.12 on,
        pytorch issue 193402), whose address the others have in them.
        """
        torch.cuda.synchronize()
        for user in self.users:
            user.captured.clear()
        self.renew()

    def begin(self) -> None:
        """While the first graph is recorded: takes the block that all are to use, and leaves it to them."""
        if not self.begun:
            self.begun = True
            with contextlib.suppress(torch.OutOfMemoryError):  # smaller graphs may do with what there is
                torch.empty(self.work, dtype=torch.uint8, device="cuda")

    def close(self) -> None:
        """After a recording that failed: the allocator may take the pool for still being recorded into, and go on so.

        That costs this pool, and as long as it lasts the giving back of what is cached; another failure would again.
        """
        self.closed = True
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.handle)


class Graphs:
    """Calls `function` through graphs.

    Args:
        pool: may be that of other graphs.
    """

    def __init__(self, function: Callable[..., Tensor], pool: Pool, limit: int = GRAPHS) -> None:
        self.function = function
        self.limit = limit
        self.pool = pool
        pool.users.add(self)
        self.captured: dict[Shapes, Captured] = {}
        self.refused: set[Shapes] = set()

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes not in self.captured:
            if shapes in self.refused or self.pool.closed:
                return self.function(*inputs)
            if len(self.captured) >= self.limit:
                self.pool.retire()
            stream = torch.cuda.current_stream()
            self.pool.recordings += 1
            try:
                captured, output = self.capture(inputs)
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # a capture that ends badly may leave its own
                if memory.is_exhausted(error):
                    self.forget()
                    raise
                log.warning("no CUDA graph for %s: %s", [tuple(shape) for shape in shapes], error)
                if isinstance(error, (OtherBits, Unrecordable)):
                    self.refused.add(shapes)
                if isinstance(error, Unrecordable):
                    self.pool.close()
                with contextlib.suppress(RuntimeError):  # if the device is lost, the next call says so
                    self.pool.retire()
                return self.function(*inputs)
            self.captured[shapes] = captured
            return output
        return self.captured[shapes].replay(inputs)

    def forget(self) -> None:
        """Lets all graphs go, those of the pool's other users too."""
        self.pool.retire()

    def capture(self, inputs: tuple[Tensor, ...]) -> tuple[Captured, Tensor]:
        """Records the function at these shapes; also gives what it is of these inputs.

        Raises:
            OtherBits: a replay does not give what a call gives. Unrecordable: see there. RuntimeError: the function's
                own, of a call that was not recorded.
        """
        static = tuple(tensor.clone() for tensor in inputs)
        aside = self.pool.aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            expected = self.function(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph, output = torch.cuda.CUDAGraph(), torch.empty_like(expected)
        # What other threads do on the device meanwhile, the safety checker's say, neither fails nor is recorded.
        try:
            with torch.cuda.graph(graph, pool=self.pool.handle, stream=aside, capture_error_mode="thread_local"):
                self.pool.begin()
                output.copy_(self.function(*static))
        except RuntimeError as error:
            if memory.is_exhausted(error):
                raise
            raise Unrecordable(str(error)) from error
        captured = Captured(graph, static, output)
        replayed = captured.replay(inputs)
        if not same_bits(replayed, expected):
            graph.reset()
            raise OtherBits("its replay gives other bits than the call")
        return captured, replayed


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Of two contiguous tensors; one NaN is like another then."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def recorded(
    function: Callable[..., Tensor], device: torch.device, work: int = 0, beside: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """The function, through CUDA graphs where there are such.

    Args:
        work: bytes that it takes at the largest shapes.
        beside: another recorded function, which never runs at the same time: both share a pool.
    """
    if device.type != "cuda":
        return function
    return Graphs(function, beside.pool if isinstance(beside, Graphs) else Pool(work))
