"""A function of tensors as CUDA graphs: one a shape, captured the first time and replayed from then on.

Captured on the device and checked there against the function itself; what cannot be captured, or does not repeat its
bits, runs as it is. Graphs share a pool of memory, so that they cost little more than the largest of them; the least
used goes when there are too many. Knows nothing of what the function computes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
        # The next graph of the pool may write where this output lies.
        return self.output.clone()


class Pool:
    """Memory that graphs share which never run at the same time, whosever they are."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.aside = torch.cuda.Stream()  # one for all: each stream has workspaces of its own

    def renew(self) -> None:
        """Has what is captured from now on take other memory; earlier graphs keep theirs."""
        self.handle = torch.cuda.graph_pool_handle()


class Graphs:
    """Calls `function` through graphs.

    Args:
        pool: that of other graphs; one of its own, if none is given.
    """

    def __init__(self, function: Callable[..., Tensor], limit: int = GRAPHS, pool: Pool | None = None) -> None:
        self.function = function
        self.limit = limit
        self.pool = pool or Pool()
        self.captured: OrderedDict[Shapes, Captured] = OrderedDict()
        self.refused: set[Shapes] = set()

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes in self.refused:
            return self.function(*inputs)
        if shapes not in self.captured:
            stream = torch.cuda.current_stream()
            try:
                captured, output = self.capture(inputs)
            except torch.OutOfMemoryError:
                torch.cuda.set_stream(stream)  # a capture that ends badly may leave its own
                self.forget()
                raise
            except RuntimeError as error:
                torch.cuda.set_stream(stream)
                log.warning("no CUDA graph for %s: %s", [tuple(shape) for shape in shapes], error)
                self.refused.add(shapes)
                self.pool.renew()  # the allocator may take the one that was recorded into for still being so
                return self.function(*inputs)
            self.captured[shapes] = captured
            while len(self.captured) > self.limit:
                self.captured.popitem(last=False)
            return output
        self.captured.move_to_end(shapes)
        return self.captured[shapes].replay(inputs)

    def forget(self) -> None:
        """Lets all graphs go. Their pool is not used again: without graphs it may be half gone."""
        self.captured.clear()
        self.pool.renew()

    def capture(self, inputs: tuple[Tensor, ...]) -> tuple[Captured, Tensor]:
        """Records the function at these shapes; also gives what it is of these inputs.

        Raises:
            RuntimeError: something in it cannot be recorded, or a replay does not give what a call gives.
        """
        static = tuple(tensor.clone() for tensor in inputs)
        aside = self.pool.aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            expected = self.function(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device meanwhile, the safety checker's say, neither fails nor is recorded.
        with torch.cuda.graph(graph, pool=self.pool.handle, capture_error_mode="thread_local"):
            output = self.function(*static)
        captured = Captured(graph, static, output)
        replayed = captured.replay(inputs)
        if not torch.equal(replayed, expected):
            raise RuntimeError("its replay gives other bits than the call")
        return captured, replayed


def recorded(
    function: Callable[..., Tensor], device: torch.device, beside: Callable[..., Tensor] | None = None
) -> Callable[..., Tensor]:
    """The function, through CUDA graphs where there are such.

    Args:
        beside: another recorded function, which never runs at the same time: both share a pool.
    """
    if device.type != "cuda":
        return function
    return Graphs(function, pool=beside.pool if isinstance(beside, Graphs) else None)
