"""`/metrics`, from a server that nobody else uses, so that every count is known."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from tests.servers import Server, eventually, leaving_after, running

PROMPT = "a large red star on a blue background, canary"
SMALL = {"prompt": PROMPT, "size": "128x128", "steps": 2, "seed": 7, "response_format": "b64_json"}
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("metrics"), FLUX_LOCAL_FAULTS="slow prompt=snail seconds=1 step=0") as server:
        yield server


def samples(server: Server) -> Samples:
    answer = httpx.get(server.url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parsed(answer.text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def total(found: Samples, name: str) -> float:
    return sum(number for (sample, _), number in found.items() if sample == name)


def test_a_picture_is_counted_with_its_seconds(own: Server) -> None:
    before = samples(own)
    body = own.post({**SMALL, "n": 2}).json()
    after = samples(own)

    def more(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert more("flux_requests_accepted_total", route="generations") == 1
    assert more("flux_requests_finished_total", route="generations", outcome="succeeded") == 1
    assert more("flux_pictures_total", precision="fp32", acceleration="none") == 2
    assert more("flux_steps_total", precision="fp32") == 4
    assert more("flux_http_responses_total", status="200") == 2  # the first scrape and the picture
    for stage in ("queue", "encode", "denoise", "decode"):
        assert more("flux_picture_stage_seconds_count", stage=stage) == 2
    denoised = more("flux_picture_stage_seconds_sum", stage="denoise")
    assert body["timings"]["denoise_s"] <= denoised + 1e-3 <= 2 * body["timings"]["denoise_s"] + 2e-3
    assert 0 < more("flux_request_seconds_sum", route="generations") <= body["timings"]["total_s"] + 0.2


def test_every_accepted_request_has_ended_in_one_way(own: Server) -> None:
    """Pictures, refusals, a deadline, a client that leaves, a promise that is cancelled: accepted = ended."""
    before = samples(own)
    own.post(SMALL)
    assert own.post({**SMALL, "size": "none"}).status_code == 400
    long = {**SMALL, "steps": 50, "n": 10, "prompt": "a snail"}
    assert own.post({**SMALL, "prompt": "a snail"}, headers={"X-Request-Timeout": "0.5"}).status_code == 408
    leaving_after(own, long, lambda: value(samples(own), "flux_pictures_running") > 0)
    promise = own.post({**long, "response_format": "url"}, headers={"Prefer": "respond-async"})
    assert promise.status_code == 202
    assert httpx.delete(promise.headers["location"]).status_code == 200

    def idle() -> bool:
        found = samples(own)
        return total(found, "flux_pictures_waiting") + total(found, "flux_pictures_running") == 0

    eventually(idle)
    found = samples(own)
    assert total(found, "flux_requests_accepted_total") == total(found, "flux_requests_finished_total")

    def more(name: str, **labels: str) -> float:
        return value(found, name, **labels) - value(before, name, **labels)

    for outcome, count in (("succeeded", 1), ("deadline", 1), ("cancelled", 2), ("failed", 0)):
        assert more("flux_requests_finished_total", route="generations", outcome=outcome) == count
    for status in ("400", "408", "499"):
        assert more("flux_http_responses_total", status=status) == 1
    assert value(found, "flux_work_seconds") == 0


def test_what_waits_and_what_runs_is_seen_while_it_does(own: Server) -> None:
    promise = own.post({**SMALL, "n": 10, "steps": 50}, headers={"Prefer": "respond-async"})
    eventually(lambda: value(samples(own), "flux_pictures_running") > 0)
    found = samples(own)
    assert value(found, "flux_pictures_waiting") + value(found, "flux_pictures_running") == 10
    assert value(found, "flux_work_seconds") > 0
    assert value(found, "flux_draining") == 0
    httpx.delete(promise.headers["location"])
    eventually(lambda: value(samples(own), "flux_pictures_running") == 0)


def test_a_fall_is_counted_and_the_engine_is_up_again(own: Server) -> None:
    before = samples(own)
    assert value(before, "flux_engine_up", engine="0", device="cpu") == 1
    own.engine().kill()
    labels = {"engine": "0", "device": "cpu", "cause": "outside"}
    falls = value(before, "flux_engine_falls_total", **labels)
    eventually(lambda: value(samples(own), "flux_engine_falls_total", **labels) == falls + 1)
    own.wait_ready()
    assert value(samples(own), "flux_engine_up", engine="0", device="cpu") == 1


def test_labels_are_ours_and_nothing_of_a_request_is_among_them(own: Server) -> None:
    own.post({**SMALL, "user": "canary"}, headers={"x-request-id": "canary", "authorization": "Bearer canary"})
    httpx.get(own.url + "/canary")
    text = httpx.get(own.url + "/metrics").text
    assert "canary" not in text
    assert 'version="' in text
    assert 'model="flux-krea-mini"' in text
    labels = {name for _, pairs in samples(own) for name, _ in pairs}
    assert labels <= {
        "route", "outcome", "engine", "status", "precision", "acceleration", "stage", "le", "device", "cause",
        "version", "model", "precisions", "memory",
    }  # fmt: skip


def test_with_keys_it_wants_one(tmp_path: object) -> None:
    """Who may draw may look: there is one list of keys."""
    with running(tmp_path, FLUX_LOCAL_API_KEYS="key-of-mine") as server:  # type: ignore[arg-type]
        assert httpx.get(server.url + "/metrics").status_code == 401
        answer = httpx.get(server.url + "/metrics", headers={"authorization": "Bearer key-of-mine"})
        assert answer.status_code == 200
        assert "key-of-mine" not in answer.text
