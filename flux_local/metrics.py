"""What Prometheus sees: how requests ended, where pictures' seconds went, and the state at the moment of the scrape.

Labels have few values, all of them ours: no prompt, key, id or path is ever one. Knows nothing of HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

import flux_local
from flux_local.dispatch import Dispatcher
from flux_local.errors import Cancelled, DeadlineExceeded
from flux_local.messages import Done
from flux_local.parameters import ALL_ROUTES

CONTENT_TYPE = CONTENT_TYPE_LATEST
OUTCOMES = ("succeeded", "failed", "cancelled", "deadline")
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300)
"""Upper ends of the histograms' buckets."""


class Metrics:
    """All of one server process, from its start; a counter that falls has been restarted."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self.registry = every = CollectorRegistry()
        ProcessCollector(registry=every)
        every.register(State(dispatcher, model))
        self.accepted = Counter("flux_requests_accepted", "Requests taken in.", ["route"], registry=every)
        self.finished = Counter(
            "flux_requests_finished",
            "Accepted requests that have ended: succeeded, failed, cancelled, or deadline (its time passed).",
            ["route", "outcome"],
            registry=every,
        )
        self.seconds = Histogram(
            "flux_request_seconds",
            "From acceptance to the end, of requests that succeeded.",
            ["route"],
            buckets=SECONDS,
            registry=every,
        )
        self.responses = Counter(
            "flux_http_responses", "Answers by status; 499: the client had gone.", ["status"], registry=every
        )
        self.pictures = Counter("flux_pictures", "Pictures drawn.", ["precision", "acceleration"], registry=every)
        self.flagged = Counter("flux_pictures_flagged", "Of those, left out by the safety checker.", registry=every)
        self.steps = Counter("flux_steps", "Denoising steps computed for them.", ["precision"], registry=every)
        self.stages = Histogram(
            "flux_picture_stage_seconds",
            "A picture's seconds in each stage: queue, encode, denoise, decode.",
            ["stage"],
            buckets=SECONDS,
            registry=every,
        )
        self.unwritten = Gauge(
            "flux_unwritten_ends",
            "Ended requests whose end the full disk has not taken yet; they wait in memory.",
            registry=every,
        )

        for route in ALL_ROUTES:  # from zero, or the first of each would not be seen to come
            self.accepted.labels(route)
            self.seconds.labels(route)
            for outcome in OUTCOMES:
                self.finished.labels(route, outcome)

    def picture(self, done: Done, precision: str, acceleration: str, steps: int) -> None:
        """A picture that has been drawn, in so many computed steps."""
        self.pictures.labels(precision, acceleration).inc()
        self.steps.labels(precision).inc(steps)
        self.flagged.inc(done.flagged)
        for stage in ("queue", "encode", "denoise", "decode"):
            self.stages.labels(stage).observe(getattr(done, f"{stage}_s"))

    def ended(self, route: str, error: BaseException | None, seconds: float) -> None:
        """An accepted request that has ended; `error` None if it succeeded."""
        self.finished.labels(route, outcome_of(error)).inc()
        if error is None:
            self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


def outcome_of(error: BaseException | None) -> str:
    match error:
        case None:
            return "succeeded"
        case DeadlineExceeded():
            return "deadline"
        case Cancelled():
            return "cancelled"
        case _:
            return "failed"


class State(Collector):
    """What the dispatcher owes and has at the moment of asking."""

    def __init__(self, dispatcher: Dispatcher, model: str) -> None:
        self.dispatcher = dispatcher
        self.model = model

    def collect(self) -> Iterator[Metric]:
        dispatcher, now = self.dispatcher, time.monotonic()
        pending = list(dispatcher.pending.values())
        waiting = [picture.asked for picture in pending if not picture.begun]
        oldest = max((now - asked for asked in waiting), default=0.0)
        yield GaugeMetricFamily("flux_pictures_waiting", "Pictures not begun yet.", len(waiting))
        yield GaugeMetricFamily(
            "flux_pictures_running", "Pictures begun and not finished.", len(pending) - len(waiting)
        )
        yield GaugeMetricFamily(
            "flux_waiting_oldest_seconds", "How long the first of those waiting has waited.", oldest
        )
        yield GaugeMetricFamily(
            "flux_work_seconds",
            "Seconds until all is done that has been accepted, by measured speed.",
            dispatcher.ahead()[1],
        )
        yield GaugeMetricFamily("flux_draining", "1 once the server takes nothing more in.", dispatcher.draining)
        up = GaugeMetricFamily(
            "flux_engine_up", "1 where the engine of a device takes pictures.", labels=["engine", "device"]
        )
        falls = CounterMetricFamily(
            "flux_engine_falls", "Engines that ended: crashed or hung (inside), or by another's hand (outside).",
            labels=["engine", "device", "cause"],
        )  # fmt: skip
        for number, engine in enumerate(dispatcher.engines):
            up.add_metric([str(number), engine.device], engine.ready is not None)
            for cause in ("inside", "outside"):
                falls.add_metric([str(number), engine.device, cause], engine.falls[cause])
        yield up
        yield falls
        yield CounterMetricFamily(
            "flux_pictures_placed_again", "Pictures given to another engine after a fall.", dispatcher.placed_again
        )
        about = {"version": flux_local.__version__, "model": self.model}
        if (ready := dispatcher.ready) is not None:
            about |= {"device": ready.device, "precisions": ",".join(ready.precisions), "memory": ready.tier}
        yield InfoMetricFamily("flux_server", "What runs.", about)
