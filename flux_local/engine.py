"""The engine's loop, on the only thread that touches the device: read messages, decode for a while, take a step.

What it is told comes through one socket, and what it is doing stands in one shared page. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import msgspec

from flux_local.batches import Rows, rows_of
from flux_local.checking import Checks, Decoding
from flux_local.drawing import Drawing, begin_picture, finished
from flux_local.errors import DeadlineExceeded, FluxError, GenerationInvalid, InternalError, answer_for
from flux_local.faults import Faults
from flux_local.messages import Cancel, EngineChannel, Failed, Job, Partial, Step
from flux_local.pulse import MOST, Phase, Pulse
from flux_local.scheduler import Entry, Scheduler
from flux_local.steps import advances, partial_steps

if TYPE_CHECKING:
    from torch import Tensor

    from flux_local.model.loader import Pipeline
    from flux_local.model.pace import Mark
    from flux_local.model.safety import SafetyChecker

REPORT_EVERY = 0.1
"""Seconds between two reports of a picture's progress. A small model's step takes a fifth of that, and every report
wakes the server's process on the cores that the next step needs."""
PATIENCE = 0.02
"""Seconds to wait for the safety checker where there is nothing else to do but to listen."""
DECODE_SHARE = 0.7
"""Part of the last step's time that decoding may take between two steps, its last layer's overrun aside."""

log = logging.getLogger("flux_local.engine")


class Engine:
    """Draws jobs, several at a time, each advancing a step whenever the scheduler picks it."""

    def __init__(
        self,
        pipeline: Pipeline,
        channel: EngineChannel,
        pulse: Pulse,
        seconds_per_token: float,
        checker: SafetyChecker | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.pace = pipeline.denoiser.pace
        self.channel = channel
        self.pulse = pulse
        self.launched: deque[Sequence[int]] = deque(maxlen=2)
        """The jobs, by serial, of the last steps: a GPU may still be at them, and they at fault if it fails."""
        self.faults = Faults()
        self.scheduler = Scheduler(lambda entry: self.rows.limit(self.drawings[entry.id].job))
        self.rows = Rows(pipeline)
        self.drawings: dict[str, Drawing] = {}
        self.next_deadline = math.inf
        """Before it no job expires."""
        self.decoding: dict[Decoding, Generator[None, None, bytes]] = {}
        self.current: tuple[Decoding, list[Mark]] | None = None
        """The decoding that goes on next, with the device's moments before and after each part of it."""
        self.prompts = pipeline.prompt_cache()
        self.seconds_per_token = seconds_per_token
        self.step_seconds = 0.0
        self.checks = Checks(checker)
        if pipeline.adapters is not None:
            pipeline.adapters.beat = pulse.renew

    def run(self) -> None:
        """Until the other end closes (`EOFError`)."""
        while True:
            if not self.drawings:
                self.pulse.enter(Phase.IDLE)
            for message in self.channel.receive(wait=not self.drawings):
                match message:
                    case Job():
                        self.accept(message)
                    case Cancel():
                        self.drop(message.id)
            self.turn()

    def accept(self, job: Job) -> None:
        now = time.monotonic()
        steps = job.steps - job.skip
        ends = advances(job.computed or (True,) * steps)
        self.drawings[job.id] = Drawing(job, now, steps, partial_steps(ends, job.partials))
        self.next_deadline = min(self.next_deadline, math.inf if job.deadline is None else job.deadline)
        self.schedule(job, now)

    def schedule(self, job: Job, arrived: float) -> None:
        cost = job.tokens * self.seconds_per_token
        canvas, steps, family = (job.width, job.height), job.steps_computed, (job.go_fast, job.loras, job.max_length)
        self.scheduler.add(
            Entry(job.id, canvas, steps, cost, arrived, job.owner, job.rows, job.alone, family, job.loras)
        )

    def drop(self, id: str) -> None:
        self.drawings.pop(id, None)
        for decoding in [d for d in self.decoding if d[0] == id]:
            del self.decoding[decoding]
        self.checks.drop(id)
        self.scheduler.remove(id)

    def turn(self) -> None:
        """Some of a picture's decoding, and a step of the next batch: neither waits for all of the other."""
        self.expire(time.monotonic())
        if self.checks and self.checks_alone():
            self.settle()
            self.take_verdicts(PATIENCE)
            return
        if self.decoding:
            self.decode_some()
        batch = self.next_batch()
        if batch:
            self.step(batch)
        if self.checks:
            self.take_verdicts(0.0 if batch or self.decoding else PATIENCE)

    def checks_alone(self) -> bool:
        """Whether nothing else goes on until the safety checker has decided: it takes long, or one of the pictures here
        was in hand when an engine fell, and the next fall must be of one alone."""
        return self.checks.overdue() or any(drawing.job.alone for drawing in self.drawings.values())

    def expire(self, now: float) -> None:
        if now <= self.next_deadline:
            return
        for drawing in [d for d in self.drawings.values() if d.job.deadline is not None and now > d.job.deadline]:
            late = DeadlineExceeded("The picture was not finished in its time. Allow more, or ask for less.")
            self.end_with(drawing, late)
        deadlines = [drawing.job.deadline for drawing in self.drawings.values()]
        self.next_deadline = min((d for d in deadlines if d is not None), default=math.inf)

    def next_batch(self) -> list[Drawing]:
        """The scheduler's choice, less those whose beginning would make pictures under way wait more than one's."""
        chosen = [self.drawings[id] for id in self.scheduler.next_batch()]
        under_way = any(drawing.picture is not None for drawing in chosen)
        for drawing in chosen:
            if drawing.picture is None:
                self.begin(drawing)
                if under_way:
                    break
        ready = [self.scheduler.entries[drawing.job.id] for drawing in chosen if drawing.picture is not None]
        if not ready:
            return []
        batch = [self.drawings[entry.id] for entry in self.scheduler.fitting(ready)]
        if len(batch) > 1:
            self.enter(Phase.PROVE, batch)
            if not self.rows.proved(batch):
                return batch[:1]
        return batch

    def begin(self, drawing: Drawing) -> None:
        """Begins the job's picture, or fails the job."""
        self.enter(Phase.BEGIN, [drawing])
        if drawing.job.check and self.checks.checker is None:  # an engine set up wrong gives nothing out unseen
            self.end_with(drawing, InternalError("The engine has no safety checker. Ask the server's operator."))
            return
        started, before = time.monotonic(), self.pace.mark()
        try:
            drawing.picture = begin_picture(self.pipeline, drawing.job, self.prompts)
        except Exception as error:  # the boundary of a request
            self.after_error([drawing], error)
            return
        drawing.begun = time.monotonic()
        drawing.encode_s = drawing.begun - started
        drawing.beginning = before, self.pace.mark()

    def step(self, batch: list[Drawing]) -> None:
        """One denoising step; pictures that are through go on to be decoded."""
        pictures = [drawing.picture for drawing in batch if drawing.picture is not None]
        alone = batch[0].job.alone
        if alone:
            self.settle()
        self.enter(Phase.STEP, batch)
        started = time.monotonic()
        try:
            self.faults.before_step([drawing.job.prompt for drawing in batch], pictures)
            self.pipeline.adapt(batch[0].job.loras, batch[0].job.go_fast)
            self.pipeline.prepare(pictures, batch[0].job.go_fast)
            self.pipeline.denoiser_for(batch[0].job.go_fast, batch[0].careful).advance(pictures)
            if alone:
                self.settle()
        except Exception as error:  # the boundary of a request: whatever the model raises costs its batch only
            self.after_error(batch, error)
            return
        if self.pace.runs_behind and not alone:
            self.launched.append([drawing.job.serial for drawing in batch])
        seconds = self.seconds_of(batch, time.monotonic() - started)
        self.measure(batch, seconds)
        for drawing in batch:
            if drawing.beginning is not None:
                drawing.beginning_s, drawing.beginning = self.pace.between(*drawing.beginning), None
                self.scheduler.charge(drawing.job.id, drawing.beginning_s)
            left = self.scheduler.stepped(drawing.job.id, seconds * drawing.job.rows / rows_of(batch))
            assert drawing.picture is not None
            drawing.retried = False
            step = drawing.picture.step
            if time.monotonic() - drawing.reported >= REPORT_EVERY:
                drawing.reported = time.monotonic()
                self.channel.send(Step(drawing.job.id, step, drawing.steps, seconds / len(batch)))
            if left == 0:
                drawing.denoising_ends = self.pace.mark()
                self.scheduler.finish(drawing.job.id)
                self.decode(drawing, drawing.picture.latents)
            elif step in drawing.partial_steps:
                try:
                    self.decode(drawing, drawing.picture.estimate(), drawing.partial_steps.index(step))
                except Exception as error:  # the boundary of a request
                    self.after_error([drawing], error)

    def enter(self, phase: Phase, drawings: Sequence[Drawing]) -> None:
        """Writes into the pulse what is begun for these, beside what the safety checker looks at and the steps that a
        GPU may still be at."""
        looked_at = (self.drawings[id] for id in self.checks.ids())
        serials = dict.fromkeys(drawing.job.serial for drawing in (*drawings, *looked_at))
        for step in self.launched:
            serials |= dict.fromkeys(step)
        in_hand = tuple(serials)[:MOST]
        if phase is not Phase.CHECK or self.pulse.read()[::2] != (phase, in_hand):  # for these it waits since then
            self.pulse.enter(phase, in_hand)

    def settle(self) -> None:
        """Waits until nothing is launched any more, so that what fails from here on is of what comes next.

        A job that was in hand when an engine fell goes alone, and with this around its steps a second fall is its own.
        """
        self.pace.finish()
        self.launched.clear()

    def seconds_of(self, batch: list[Drawing], passed: float) -> float:
        """A step's: those that passed, or where a GPU runs behind, what its last one took, by their tokens."""
        if not self.pace.runs_behind:
            return passed
        return sum(drawing.job.tokens for drawing in batch) * (self.pace.token_seconds or self.seconds_per_token)

    def after_error(self, batch: list[Drawing], error: Exception) -> None:
        """Out of memory, a batch is tried again in smaller ones, and a picture alone once more; else its jobs fail.

        A device that is lost ends the process: its supervisor starts another and places the work anew.
        """
        from flux_local.model import memory

        if memory.is_fatal(error):
            raise error
        if not memory.is_exhausted(error):
            if not isinstance(error, FluxError):
                log.error("%d pictures failed", len(batch), exc_info=error)
                error = InternalError(f"The model failed ({type(error).__name__}). Try again.")
            for drawing in batch:
                self.end_with(drawing, error)
            return
        self.pipeline.make_room(each.picture for each in self.drawings.values() if each.picture is not None)
        canvas = (batch[0].job.width, batch[0].job.height)
        log.warning("out of memory with %d pictures of %dx%d", len(batch), *canvas)
        if len(batch) > 1:
            self.rows.ran_short(batch)
        elif batch[0].retried:
            self.end_with(
                batch[0],
                InternalError("The device has not enough memory for this picture. Ask for a smaller one.", final=True),
            )
        else:
            batch[0].retried = True

    def measure(self, batch: list[Drawing], seconds: float) -> None:
        """Keeps the price of a token's step up to date, for the scheduler's costs."""
        self.step_seconds = seconds
        tokens = sum(drawing.job.tokens for drawing in batch)
        self.seconds_per_token += 0.1 * (seconds / tokens - self.seconds_per_token)

    def decode(self, drawing: Drawing, latents: Tensor, partial: int | None = None) -> None:
        """Has latents decoded, in the order that the scheduler finds fair, in parts between steps."""
        decoding = self.pipeline.vae.decoding(latents, drawing.job.width, drawing.job.height)
        self.decoding[drawing.job.id, partial] = decoding

    def decode_some(self) -> None:
        """Goes on with a decoding for about the time of a step; delivers the picture when it is through."""
        if self.current is None or self.current[0] not in self.decoding:  # one at a time: each takes memory
            self.current = min(self.decoding, key=lambda waiting: self.scheduler.had(waiting[0])), []
        first, marks = self.current
        id, partial = first
        drawing = self.drawings[id]
        self.enter(Phase.DECODE, [drawing])
        until = time.monotonic() + DECODE_SHARE * self.step_seconds
        marks.append(self.pace.mark())
        try:
            while True:
                next(self.decoding[first])
                if time.monotonic() >= until:
                    marks.append(self.pace.mark())
                    return
        except StopIteration as end:
            self.launched.clear()  # the pixels are here, and they came last
            self.end_decoding()
            marks.append(self.pace.mark())
            drawing.decoding_s = sum(map(self.pace.between, marks[::2], marks[1::2]))
            self.scheduler.charge(id, drawing.decoding_s)
            if partial is None:
                drawing.denoised = time.monotonic() - self.pace.since(drawing.denoising_ends)
            if self.checks.checker is not None and drawing.job.check:
                self.checks.submit(first, end.value, drawing.job.width, drawing.job.height)
            else:
                self.give_out(first, end.value)
        except ArithmeticError:
            self.end_decoding()
            if partial is None:
                self.redraw_or_give_up(drawing)
        except Exception as error:  # the boundary of a request
            self.end_decoding()
            self.after_error([drawing], error)
            if id in self.drawings and partial is None and drawing.picture is not None:
                self.decode(drawing, drawing.picture.latents)

    def end_decoding(self) -> None:
        """Forgets the one under way, whatever came of it."""
        assert self.current is not None
        del self.decoding[self.current[0]]
        self.current = None

    def give_out(self, decoded: Decoding, pixels: bytes) -> None:
        id, partial = decoded
        if partial is None:
            self.deliver(self.drawings[id], pixels)
        else:
            self.channel.send(Partial(id, partial, pixels))

    def take_verdicts(self, patience: float) -> None:
        """Gives out what the safety checker lets pass; of a finished picture that it flags only that it did. One that
        it failed on fails."""
        if patience:
            self.enter(Phase.CHECK, [])
        for decoded, pixels, flagged in self.checks.verdicts(patience):
            if flagged is False:
                self.give_out(decoded, pixels)
            elif decoded[1] is None and flagged:
                self.deliver(self.drawings[decoded[0]], b"", flagged=True)
            elif decoded[1] is None:
                failed = InternalError("The safety checker failed on the picture, which is kept back. Try again.")
                self.end_with(self.drawings[decoded[0]], failed)

    def redraw_or_give_up(self, drawing: Drawing) -> None:
        """A picture that is not finite is drawn once more, alone and by plain operations, before it is given up."""
        if drawing.careful:
            self.end_with(drawing, GenerationInvalid("The model drew nothing valid here. Try another seed."))
            return
        log.warning("a picture was not finite; drawing it again")
        drawing.careful, drawing.picture = True, None
        self.schedule(msgspec.structs.replace(drawing.job, alone=True), drawing.arrived)

    def deliver(self, drawing: Drawing, pixels: bytes, flagged: bool = False) -> None:
        done = finished(drawing, pixels, flagged)
        self.drop(done.id)
        self.channel.send(done)

    def end_with(self, drawing: Drawing, error: FluxError) -> None:
        self.drop(drawing.job.id)
        self.channel.send(Failed(drawing.job.id, answer_for(error).code, error.message, error.param, error.final))
