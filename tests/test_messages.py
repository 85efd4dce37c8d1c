"""Frames on the engine's pipe."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from flux_local.messages import Cancel, Done, EngineChannel, Job, decode_from_engine, frame, later

JOB = Job("id", "a prompt ☃", 2**63 - 1, 128, 160, 12, 4.5)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, EngineChannel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, EngineChannel(theirs)


def test_messages_arrive_whole_however_they_are_cut(pair: tuple[socket.socket, EngineChannel]) -> None:
    ours, channel = pair
    data = frame(JOB) + frame(Cancel("id"))
    got = []
    for i in range(len(data)):
        ours.send(data[i : i + 1])
        got += list(channel.receive(wait=False))
    assert got == [JOB, Cancel("id")]


def test_without_waiting_nothing_is_nothing(pair: tuple[socket.socket, EngineChannel]) -> None:
    assert list(pair[1].receive(wait=False)) == []


def test_the_other_end_closing_is_the_end(pair: tuple[socket.socket, EngineChannel]) -> None:
    pair[0].close()
    with pytest.raises(EOFError):
        list(pair[1].receive(wait=True))


def test_pixels_travel_as_they_are() -> None:
    pixels = bytes(range(256)) * 300
    done = Done("id", pixels, 3, "x", 0.0, 0.1, 0.2, 0.3, 0.25)
    body = frame(done)[4:]
    assert pixels in body
    assert decode_from_engine(body) == done


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_from_engine(b"\xc1")
    with pytest.raises(msgspec.ValidationError):
        decode_from_engine(msgspec.msgpack.encode({"type": "Job"}))


def test_a_deadline_keeps_its_distance_on_another_machine_s_clock() -> None:
    here, there = 100.0, 5000.0
    job = msgspec.structs.replace(JOB, deadline=here + 30)
    assert later(later(job, -here), there) == msgspec.structs.replace(JOB, deadline=there + 30)
    assert later(JOB, there) is JOB
    assert later(Cancel("id"), there) == Cancel("id")
