"""The safety checker on a real server, with a tiny classifier that takes circles for unsafe."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from flux_local import checking
from flux_local.engine import Engine
from flux_local.errors import WeightsError
from flux_local.messages import HEADER, EngineChannel, Failed, Job, decode_from_engine
from flux_local.model.safety import Classifier, Key, SafetyChecker
from flux_local.pulse import Phase, Pulse
from tests.servers import ROOT, Server, pictures, running, started

pytestmark = pytest.mark.timeout(900)

CIRCLE = {"prompt": "a large red circle on a white background", "size": "128x128", "seed": 1,
          "response_format": "b64_json"}  # fmt: skip
STAR = {**CIRCLE, "prompt": "a large red star on a white background"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    command = [sys.executable, ROOT / "scripts" / "train_classifier.py", "--out", folder, "--shape", "circle"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory, classifier: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("checked")
    with running(folder, "--safety-model", str(classifier), "--safety-checker", "on") as server:
        yield server


@pytest.mark.slow
def test_a_flagged_picture_is_not_given_out(checked: Server) -> None:
    answer = checked.post(CIRCLE)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("moderation_blocked", "image_generation_user_error")
    good = checked.post(STAR)
    assert (len(pictures(good)), good.json()["flagged"]) == (1, 0)


@pytest.mark.slow
def test_of_several_pictures_the_flagged_are_left_out_and_counted(checked: Server, tmp_path: Path) -> None:
    body = {**CIRCLE, "prompt": "large", "n": 10}
    with_all = {item["seed"] for item in all_of(body, tmp_path)}
    answer = checked.post(body)
    if answer.status_code == 400:
        pytest.fail("every one of ten seeds was a circle; choose another prompt")
    found = answer.json()
    kept = {item["seed"] for item in found["data"]}
    assert found["flagged"] == len(with_all) - len(kept)
    assert kept <= with_all
    again = checked.post(body).json()
    assert [item["seed"] for item in again["data"]] == [item["seed"] for item in found["data"]]


def all_of(body: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """The data of a server without a checker."""
    with running(folder, "--safety-checker", "off") as server:
        answer = server.post(body)
        assert "flagged" not in answer.json()
        data: list[dict[str, Any]] = answer.json()["data"]
        return data


@pytest.mark.slow
def test_nothing_of_a_flagged_picture_is_streamed(checked: Server) -> None:
    body = {**CIRCLE, "stream": True, "partial_images": 2}
    with httpx.stream("POST", f"{checked.url}/v1/images/generations", json=body, timeout=60) as answer:
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1]["error"]["code"] == "moderation_blocked"
    assert not [event for event in events if event.get("type") == "image_generation.completed"]


@pytest.mark.slow
def test_a_request_cannot_turn_it_off_unless_it_may(checked: Server, classifier: Path, tmp_path: Path) -> None:
    for off in ({"enable_safety_checker": False}, {"disable_safety_checker": True}):
        answer = checked.post({**CIRCLE, **off})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_available")
    with running(tmp_path, "--safety-model", str(classifier), "--safety-optional") as server:
        assert pictures(server.post({**CIRCLE, "enable_safety_checker": False}))
        assert server.post(CIRCLE).status_code == 400


@pytest.mark.parametrize("labels", [("--safety-labels", "weapons"), ()])
@pytest.mark.slow
def test_a_checker_that_is_none_prevents_the_start(classifier: Path, tmp_path: Path, labels: tuple[str, ...]) -> None:
    folder = classifier if labels else tmp_path / "nothing"
    flags = ("--safety-checker", "on", "--safety-model", str(folder), *labels)
    with started(tmp_path, *flags) as server:
        assert server.process.wait(timeout=60) == 4
        assert ("normal, nsfw" if labels else "no classifier") in server.output


def test_an_engine_without_a_checker_gives_nothing_out_that_was_to_be_checked(pipeline: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        engine = Engine(pipeline, EngineChannel(theirs), Pulse(), 1e-4)
        engine.accept(Job("r-1", "a red star", 0, 128, 128, 1, 4.5, check=True))
        engine.turn()
        (length,) = HEADER.unpack(ours.recv(HEADER.size))
        told = decode_from_engine(ours.recv(length))
    assert isinstance(told, Failed)
    assert "safety checker" in told.message


class Silent:
    """A checker that takes pictures and decides on none."""

    def __init__(self) -> None:
        self.given: list[Key] = []

    def submit(self, key: Key, *_: object) -> None:
        self.given.append(key)

    def verdicts(self, patience: float) -> list[tuple[Key, bool | None]]:
        return []


def test_what_a_checker_hangs_on_is_known(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To whoever ends the engine: by itself once it takes long, or once it may be what ended an engine before."""
    ours, theirs = socket.socketpair()
    checker, pulse = Silent(), Pulse()

    def checked(number: int, steps: int = 1) -> Job:
        return Job(f"r-{number}", "a red star", 0, 128, 128, steps, 4.5, check=True, serial=number)

    with ours, theirs:
        engine = Engine(pipeline, EngineChannel(theirs), pulse, 1e-4, cast(SafetyChecker, checker))
        engine.accept(checked(7))
        while not checker.given:
            engine.turn()
        for _ in range(3):
            engine.turn()
            state = pulse.read()
            assert (state.phase, state.serials) == (Phase.CHECK, (7,))
        engine.turn()
        assert pulse.read() == state, "its time goes on"
        engine.accept(checked(8, 50))
        engine.turn()
        assert (pulse.read().phase, pulse.read().serials) == (Phase.STEP, (8, 7)), "beside the steps of another"
        monkeypatch.setattr(checking, "OVERDUE", 0.0)
        engine.turn()
        assert (pulse.read().phase, pulse.read().serials) == (Phase.CHECK, (7,))
        monkeypatch.undo()
        engine.accept(msgspec.structs.replace(checked(9, 50), alone=True))
        engine.turn()
        assert (pulse.read().phase, pulse.read().serials) == (Phase.CHECK, (7,))
        engine.drop("r-7")
        engine.turn()
        assert pulse.read().phase is Phase.STEP
        assert 7 not in pulse.read().serials


class Broken:
    """A classifier that fails on several pictures at once, and on dark ones."""

    device = "cpu"

    def flagged(self, pictures: list[np.ndarray]) -> list[bool]:
        if len(pictures) > 1 or (pictures[0].mean() < 100 and len(pictures[0]) != 64):  # but for its own first
            raise RuntimeError("no")
        return [False]


def test_a_checker_that_fails_is_no_verdict() -> None:
    checker = SafetyChecker(cast(Classifier, Broken()))
    values = {("a", None): 0, ("b", 1): 200, ("c", None): 50}
    for key, value in values.items():
        checker.submit(key, bytes([value]) * 12, 2, 2)
    found: dict[Key, bool | None] = {}
    while len(found) < len(values):
        found |= dict(checker.verdicts(10))
    assert found == {("a", None): None, ("b", 1): False, ("c", None): None}


def test_a_checker_that_fails_on_every_picture_prevents_the_start() -> None:
    class Useless(Broken):
        def flagged(self, pictures: list[np.ndarray]) -> list[bool]:
            raise RuntimeError("no")

    with pytest.raises(WeightsError, match="--safety-model"):
        SafetyChecker(cast(Classifier, Useless()))


def test_a_classifier_in_half_precision_looks_at_pictures(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], id2label={0: "normal", 1: "nsfw"})
    torch.manual_seed(0)
    ResNetForImageClassification(config).half().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    looked = Classifier(tmp_path, "cpu", frozenset({"nsfw"}), 0.0).flagged([np.zeros((64, 64, 3), np.uint8)] * 2)
    assert looked == [True, True]


def test_a_picture_that_nobody_could_look_at_fails_and_blames_nobody(pipeline: Any) -> None:
    ours, theirs = socket.socketpair()
    checker = SafetyChecker(cast(Classifier, Broken()))
    with ours, theirs:
        engine = Engine(pipeline, EngineChannel(theirs), Pulse(), 1e-4, checker)
        engine.accept(Job("r-1", "a large black square on black", 0, 128, 128, 1, 4.5, check=True))
        engine.drawings["r-1"].reported = float("inf")  # no report of progress
        while engine.drawings:
            engine.turn()
        (length,) = HEADER.unpack(ours.recv(HEADER.size))
        told = decode_from_engine(ours.recv(length))
    assert isinstance(told, Failed)
    assert told.code == "internal_error"
