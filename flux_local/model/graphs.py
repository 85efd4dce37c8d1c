"""A function of tensors as CUDA graphs: one a shape, captured the first time and replayed from then on.

Captured on the device and checked there against the function itself; what cannot be captured, or does not repeat its
bits, runs as it is. The graphs share one pool of memory, so that they cost little more than the largest of them; the
least used goes when there are too many. Knows nothing of what the function computes.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

GRAPHS = 16
WARM_UPS = 2

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


class Graphs:
    """Calls `function` through graphs."""

    def __init__(self, function: Callable[..., Tensor], limit: int = GRAPHS) -> None:
        self.function = function
        self.limit = limit
        self.pool = torch.cuda.graph_pool_handle()
        self.aside = torch.cuda.Stream()  # one for all: each stream has workspaces of its own
        self.captured: OrderedDict[Shapes, Captured] = OrderedDict()
        self.refused: set[Shapes] = set()

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in inputs)
        if shapes in self.refused:
            return self.function(*inputs)
        if shapes not in self.captured:
            stream = torch.cuda.current_stream()
            try:
                captured = self.capture(inputs)
            except torch.OutOfMemoryError:
                torch.cuda.set_stream(stream)  # a capture that ends badly may leave its own
                self.forget()
                raise
            except RuntimeError as error:
                torch.cuda.set_stream(stream)
                log.warning("no CUDA graph for %s: %s", [tuple(shape) for shape in shapes], error)
                self.refused.add(shapes)
                if not self.captured:
                    self.forget()
                return self.function(*inputs)
            self.captured[shapes] = captured
            while len(self.captured) > self.limit:
                self.captured.popitem(last=False)
        self.captured.move_to_end(shapes)
        return self.captured[shapes].replay(inputs)

    def forget(self) -> None:
        """Lets all graphs go. Their pool is not used again: without graphs it may be half gone."""
        self.captured.clear()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, inputs: tuple[Tensor, ...]) -> Captured:
        """Records the function at these shapes.

        Raises:
            RuntimeError: something in it cannot be recorded, or a replay does not give what a call gives.
        """
        static = tuple(tensor.clone() for tensor in inputs)
        aside = self.aside
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                expected = self.function(*static)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What other threads do on the device meanwhile, the safety checker's say, neither fails nor is recorded.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            output = self.function(*static)
        captured = Captured(graph, static, output)
        if not torch.equal(captured.replay(inputs), expected):
            raise RuntimeError("its replay gives other bits than the call")
        return captured
