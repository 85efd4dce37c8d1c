"""The pace of a GPU that works while the host goes on: played here by a queue with a clock of its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from flux_local.engine import Engine
from flux_local.messages import Done, EngineChannel, Job
from flux_local.model.pace import Pace
from flux_local.pulse import Pulse

DECODING = 0.7
"""Seconds of the card."""


@dataclass
class Card:
    """A queue of work. `now`: the host's seconds; `ends`: when the queue will be empty."""

    now: float = 0.0
    ends: float = 0.0

    def launch(self, seconds: float) -> None:
        self.ends = max(self.ends, self.now) + seconds

    def wait_until(self, moment: float) -> None:
        self.now = max(self.now, moment)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.at = float("nan")

        def record(self) -> None:
            self.at = max(card.ends, card.now)

        def query(self) -> bool:
            return self.at <= card.now

        def synchronize(self) -> None:
            card.wait_until(self.at)

        def elapsed_time(self, end: Event) -> float:
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: card.wait_until(card.ends))
    return card


def test_one_step_behind_and_no_more(card: Card) -> None:
    pace = Pace(torch.device("cuda"))
    for i in range(6):
        with pace.step(64):
            assert card.ends - card.now <= 0.1 + 1e-9, "the step before has begun, the one before that has ended"
            card.launch(0.1)
        card.now += 0.001
        assert i == 0 or card.ends > card.now, "and the card has work"
    assert pace.token_seconds == pytest.approx(0.1 / 64)
    mark = pace.mark()
    card.launch(0.035)
    assert pace.since(mark) == pytest.approx(0.035)
    assert card.now == card.ends
    with pace.step(128):
        card.launch(0.5)
    pace.finish()
    assert pace.token_seconds == pytest.approx(0.5 / 128)


def test_a_step_that_recorded_a_graph_says_nothing_about_the_next(card: Card) -> None:
    pace = Pace(torch.device("cuda"))
    for seconds, usual in ((0.1, True), (3.0, False)):
        with pace.step(1) as launching:
            card.launch(seconds)
            launching.usual = usual
    pace.finish()
    assert pace.token_seconds == pytest.approx(0.1)


def test_a_pause_is_no_part_of_a_step(card: Card) -> None:
    pace = Pace(torch.device("cuda"))
    for seconds in (0.1, 0.2):
        with pace.step(1):
            card.launch(seconds)
        card.now += 60
    pace.finish()
    assert pace.token_seconds == pytest.approx(0.2)


@dataclass
class Told:
    """What an engine sent and, at each call of the model, whose work its pulse named."""

    messages: list[Any] = field(default_factory=list)
    named: list[tuple[tuple[int, ...], set[int]]] = field(default_factory=list)


@pytest.fixture
def engine_on(
    card: Card, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float], tuple[Engine, Told]]]:
    """An engine whose steps take so many seconds of the card and none of the host, with what it tells."""
    ours, theirs = socket.socketpair()

    def make(seconds: float) -> tuple[Engine, Told]:
        monkeypatch.setattr(pipeline.denoiser, "pace", Pace(torch.device("cuda")))
        told, pulse = Told(), Pulse()
        velocity, decoding = pipeline.denoiser.velocity, pipeline.vae.decoding
        flights: list[tuple[int, float]] = []
        serials: dict[int, int] = {}

        def launched(pictures: Any) -> Any:
            flying = {serial for serial, ends in flights if ends > card.now}
            told.named.append((pulse.read().serials, flying))
            card.launch(seconds)
            flights.extend((serials[id(picture)], card.ends) for picture in pictures)
            return velocity(pictures)

        def fetched(*given: Any) -> Generator[None, None, bytes]:
            pixels = yield from decoding(*given)
            card.launch(DECODING)
            card.wait_until(card.ends)
            return pixels

        monkeypatch.setattr(pipeline.denoiser, "velocity", launched)
        monkeypatch.setattr(pipeline.vae, "decoding", fetched)
        engine = Engine(pipeline, EngineChannel(theirs), pulse, 1e-4)
        monkeypatch.setattr(engine.channel, "send", told.messages.append)
        begin = engine.begin

        def numbered(drawing: Any) -> None:
            begin(drawing)
            serials[id(drawing.picture)] = drawing.job.serial

        monkeypatch.setattr(engine, "begin", numbered)
        return engine, told

    yield make
    ours.close()
    theirs.close()


def job(serial: int, **more: Any) -> Job:
    return Job(f"r{serial}-0", f"a red star {serial}", serial, 128, 128, 4, 4.5, serial=serial, **more)


def test_steps_are_priced_by_the_card_and_denoising_ends_when_they_do(
    engine_on: Callable[[float], tuple[Engine, Told]],
) -> None:
    engine, told = engine_on(0.5)
    engine.accept(job(1))
    while engine.drawings:
        engine.turn()
    assert engine.step_seconds == pytest.approx(0.5)
    done = next(message for message in told.messages if isinstance(message, Done))
    assert done.decode_s == pytest.approx(DECODING, abs=0.1), "and none of the steps that the host had run ahead of"
    assert engine.seconds_per_token > 1e-4


def test_a_fall_is_blamed_on_all_that_was_under_way(engine_on: Callable[[float], tuple[Engine, Told]]) -> None:
    """Two keys take turns, so that each step is launched while the other's is at work."""
    engine, told = engine_on(0.5)
    engine.scheduler.rows_limit = lambda entry: 1
    for serial in (1, 2):
        engine.accept(job(serial, owner=f"key{serial}"))
    while engine.drawings:
        engine.turn()
    assert all(flying <= set(named) for named, flying in told.named)
    assert any(flying == {1} and {1, 2} <= set(named) for named, flying in told.named)


def test_one_that_was_there_goes_alone_and_is_blamed_alone(engine_on: Callable[[float], tuple[Engine, Told]]) -> None:
    engine, told = engine_on(0.5)
    engine.accept(job(1, owner="a"))
    engine.accept(job(2, owner="b", alone=True))
    while engine.drawings:
        engine.turn()
    alone = [(named, flying) for named, flying in told.named if 2 in named]
    assert len(alone) == 4
    assert all(named == (2,) and not flying for named, flying in alone)
