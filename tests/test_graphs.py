"""Which CUDA graphs are kept and when they go, on a card that is played: what is recorded doubles its input."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from flux_local.model import graphs
from flux_local.model.graphs import Captured, Graphs, OtherBits, Pool, Unrecordable

ERRORS = {13: OtherBits("no"), 17: RuntimeError("the function's own"), 19: Unrecordable("no")}
"""What recording so many rows raises."""


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class Graph:
    """Counts those that live, and how many went while others stayed."""

    living = 0

    def __init__(self) -> None:
        Graph.living += 1

    def __del__(self) -> None:
        Graph.living -= 1


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = iter(range(100))
    fakes: dict[str, Any] = {
        "Stream": Stream, "current_stream": Stream, "stream": lambda _: contextlib.nullcontext(),
        "set_stream": lambda _: None, "synchronize": lambda: None, "graph_pool_handle": lambda: next(handles),
        "current_device": no_device,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Graphs, "capture", capture)
    monkeypatch.setattr(Captured, "replay", lambda captured, inputs: 2 * inputs[0])
    monkeypatch.setattr(Graph, "living", 0)


def no_device() -> int:
    raise RuntimeError("there is no card")


def capture(self: Graphs, inputs: tuple[torch.Tensor, ...]) -> tuple[Captured, torch.Tensor]:
    if error := ERRORS.get(len(inputs[0])):
        raise error
    captured = Captured(Graph(), inputs, inputs[0])  # type: ignore[arg-type]
    return captured, captured.replay(inputs)


def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def called(user: Graphs, rows: int) -> int:
    """Calls it with so many rows; the graphs that live then."""
    x = torch.arange(rows).float()
    assert torch.equal(user(x), 2 * x)
    return Graph.living


def test_a_graph_never_goes_alone() -> None:
    pool = Pool()
    one, other = Graphs(twice, pool, limit=2), Graphs(twice, pool, limit=2)
    assert [called(one, 1), called(other, 1), called(one, 2), called(one, 1)] == [1, 2, 3, 3]
    handle = pool.handle
    assert called(one, 3) == 1, "one too many: all went, the other's too"
    assert pool.handle != handle, "and their memory is not recorded into again"
    assert [called(other, 1), called(one, 1)] == [2, 3]
    other.forget()
    assert Graph.living == 0
    assert not one.captured


def test_what_does_not_repeat_its_bits_is_not_tried_again() -> None:
    pool = Pool()
    user = Graphs(twice, pool)
    assert [called(user, 5), called(user, 13), called(user, 13), called(user, 5)] == [1, 0, 0, 1]
    assert (user.refused, pool.recordings, pool.closed) == ({(torch.Size([13]),)}, 3, False)
    assert graphs.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))


def test_only_what_cannot_be_recorded_ends_recording() -> None:
    pool = Pool()
    user = Graphs(twice, pool)
    assert [called(user, 5), called(user, 17), called(user, 17), called(user, 5)] == [1, 0, 0, 1]
    assert (user.refused, pool.recordings, pool.closed) == (set(), 4, False), "it may do better the next time"
    assert [called(user, 19), called(user, 5)] == [0, 0]
    assert (user.refused, pool.closed) == ({(torch.Size([19]),)}, True)
