"""Which engine gets which picture, without engines."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import msgspec
import pytest

from flux_local.admission import Limits, Speed, amount_of
from flux_local.dispatch import CRASHES, OUTSIDE_FALLS, Dispatcher
from flux_local.errors import Draining, RateLimited, RequestCrashes
from flux_local.messages import Cancel, Done, Job, Step, ToEngine
from flux_local.supervisor import Fall

LIMITS = Limits(pictures=100, seconds=1e9, share=1.0)


class Engine:
    """Takes messages, and draws nothing."""

    def __init__(self, ready: object) -> None:
        self.ready = ready
        self.jobs: dict[str, Job] = {}
        self.working_on: tuple[int, ...] = ()

    def in_hand(self) -> tuple[int, ...]:
        return self.working_on

    def send(self, message: ToEngine) -> None:
        if isinstance(message, Cancel):
            del self.jobs[message.id]
        else:
            self.jobs[message.id] = message


def job(number: int) -> Job:
    return Job(id=f"req-{number}", prompt="x", seed=number, width=128, height=128, steps=10, guidance=4.5)


def test_an_engine_that_comes_back_takes_its_share() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(LIMITS, lambda hooks: [])
        fallen, other = Engine(True), Engine(True)
        dispatcher.engines = cast(list[Any], [fallen, other])
        drawing = [asyncio.create_task(dispatcher.draw(job(number))) for number in range(8)]
        await asyncio.sleep(0)
        assert (len(fallen.jobs), len(other.jobs)) == (4, 4)
        fallen.ready, fallen.jobs = None, {}
        dispatcher._on_fall(cast(Any, fallen), Fall((), False))
        assert len(other.jobs) == 8
        order = list(dispatcher.pending)
        dispatcher._on_message(cast(Any, other), Step(order[-2], 1, 10, 0.1))
        other.working_on = (other.jobs[order[-1]].serial,)
        fallen.ready = True
        dispatcher._on_ready(cast(Any, fallen))
        assert set(order[-2:]) <= set(other.jobs), "what is begun, or in hand, stays"
        assert list(fallen.jobs) == order[2:6], "the latest of the others, in their order"
        assert set(fallen.jobs) | set(other.jobs) == set(order)
        for task in drawing:
            task.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)
        assert not fallen.jobs
        assert not other.jobs

    asyncio.run(run())


@pytest.mark.parametrize(("inside", "falls"), [(True, CRASHES), (False, OUTSIDE_FALLS)])
def test_work_that_ends_engines_ends_with_all_that_is_the_same(inside: bool, falls: int) -> None:
    """However many of it wait: each would cost one more engine, and a handful of those in a row the server."""

    async def run() -> None:
        dispatcher = Dispatcher(LIMITS, lambda hooks: [])
        engine, other = Engine(True), Engine(None)
        dispatcher.engines = cast(list[Any], [engine, other])
        same = [asyncio.create_task(dispatcher.draw(job(number))) for number in range(8)]
        bystander = asyncio.create_task(dispatcher.draw(msgspec.structs.replace(job(8), prompt="y")))
        await asyncio.sleep(0)
        other.ready = True
        for fall in range(falls):
            batch = [engine.jobs[f"req-{number}"] for number in range(8) if f"req-{number}" in engine.jobs]
            in_hand = batch if fall == 0 else batch[:1]
            assert all(found.alone == bool(fall) for found in in_hand)
            engine.jobs.clear()
            other.jobs.clear()
            dispatcher._on_fall(cast(Any, engine), Fall(tuple(found.serial for found in in_hand), inside))
            for pending in dispatcher.pending.values():
                if pending.engine is not engine:
                    pending.engine = cast(Any, engine)
                engine.jobs[pending.job.id] = pending.job
        ended = await asyncio.gather(*same, return_exceptions=True)
        assert {type(error) for error in ended} == {RequestCrashes}
        assert list(dispatcher.pending) == ["req-8"]
        with pytest.raises(RequestCrashes):
            await dispatcher.draw(job(9))
        bystander.cancel()
        await asyncio.gather(bystander, return_exceptions=True)

    asyncio.run(run())


def test_what_waits_for_an_engine_is_given_out_in_order() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(LIMITS, lambda hooks: [])
        engine = Engine(None)
        dispatcher.engines = cast(list[Any], [engine])
        drawing = [asyncio.create_task(dispatcher.draw(job(number))) for number in range(5)]
        await asyncio.sleep(0)
        assert not engine.jobs
        engine.ready = True
        dispatcher._on_ready(cast(Any, engine))
        assert list(engine.jobs) == [f"req-{number}" for number in range(5)]
        for task in drawing:
            task.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)

    asyncio.run(run())


def test_a_machine_that_stood_still_is_not_slow_from_then_on() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(LIMITS, lambda hooks: [])
        engine = Engine(True)
        dispatcher.engines = cast(list[Any], [engine])
        dispatcher.speed.step = usual = 1e-3
        drawing = asyncio.create_task(dispatcher.draw(job(0)))
        await asyncio.sleep(0)
        dispatcher._on_message(cast(Any, engine), Step("req-0", 1, 10, 1000.0))
        assert usual < dispatcher.speed.step < 1.2 * usual
        for step in range(60):
            dispatcher._on_message(cast(Any, engine), Step("req-0", step, 100, 64 * 0.1))
        assert dispatcher.speed.step > 50 * usual, "what is slow again and again is slow"
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)

    asyncio.run(run())


def test_what_waits_to_be_decoded_is_work_too() -> None:
    """One step and a decoding that takes as long as three: as much as four, in every estimate."""

    async def run() -> None:
        dispatcher = Dispatcher(Limits(pictures=100, seconds=12.5, share=1.0), lambda hooks: [])
        engine = Engine(True)
        dispatcher.engines, dispatcher.started = cast(list[Any], [engine]), True
        dispatcher.speed.step = 1 / 64
        quick = msgspec.structs.replace(job(0), steps=1)
        amount = amount_of(quick)
        first = asyncio.create_task(dispatcher.draw(quick))
        await asyncio.sleep(0)
        assert dispatcher.ahead() == (1, 1.0), "before the first is done nobody knows"
        done = Done("req-0", b"", 1, "x", 0.0, 0.0, 1.0, 20.0, decoding_s=3.0)
        dispatcher._on_message(cast(Any, engine), done)
        await first
        for number in range(1, 4):
            dispatcher.admit(f"req{number}", "", 1, amount, 1e3)
        assert dispatcher.ahead() == (3, pytest.approx(12.0))
        with pytest.raises(RateLimited) as refused:
            dispatcher.admit("req4", "", 1, amount, 1e3)
        assert refused.value.retry_after == 4
        drawing = [
            asyncio.create_task(dispatcher.draw(msgspec.structs.replace(quick, id=f"req{number}-0")))
            for number in range(1, 4)
        ]
        await asyncio.sleep(0)
        assert dispatcher.ahead() == (3, pytest.approx(12.0)), "as jobs they are no more than as promises"
        dispatcher._on_message(cast(Any, engine), Step("req1-0", 1, 1, 1.0))
        assert dispatcher.ahead() == (3, pytest.approx(11.0))
        assert dispatcher.outlook()["req2"] == (1, pytest.approx(7.0))
        for task in drawing:
            task.cancel()
        await asyncio.gather(*drawing, return_exceptions=True)

    asyncio.run(run())


def test_what_takes_long_to_begin_is_known_to() -> None:
    """A prompt that is encoded for seconds, say, where text encoders wait in host memory."""
    speed, one = Speed(step=1e-3), amount_of(job(0))
    before = speed.seconds(one)
    for _ in range(10):
        speed.began(2.0)
    assert speed.seconds(one) == pytest.approx(before + 2.0, abs=0.25)
    assert speed.seconds(amount_of(job(0), 9)) == pytest.approx(0.9 * before), "it is begun"


def test_a_key_that_shares_the_device_waits_longer_for_its_place() -> None:
    limits, refused = Limits(pictures=100, seconds=100.0, share=0.1), list[int]()
    for keys in (1, 4):
        with pytest.raises(RateLimited) as error:
            limits.check((1, 3.0), (10, 30.0), of_key=True, keys=keys)
        assert error.value.retry_after is not None
        refused.append(error.value.retry_after)
    assert refused == [23, 92]


def test_after_the_end_nothing_is_begun() -> None:
    async def run() -> None:
        dispatcher = Dispatcher(LIMITS, lambda hooks: [])
        dispatcher.engines = cast(list[Any], [Engine(True)])
        await dispatcher.stop()
        with pytest.raises(Draining):
            await asyncio.wait_for(dispatcher.draw(job(0)), 10)

    asyncio.run(run())
