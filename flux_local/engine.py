"""The engine process: owns one device, the model on it, and the only thread that touches either.

`step` is schedule → denoise → deliver; messages are read between steps. Started by `dispatch` as its own program with
one inherited socket, and gone as soon as the other end closes. Knows nothing of HTTP.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_local import weights
from flux_local.errors import GenerationInvalid, InternalError, StartError, answer_for
from flux_local.messages import Cancel, Done, EngineChannel, Failed, Job, Partial, Ready, StartFailed, Step
from flux_local.params import ModelInfo
from flux_local.scheduler import Entry, Scheduler
from flux_local.sizes import canvas_for, table_size

if TYPE_CHECKING:
    from flux_local.model.denoiser import Picture
    from flux_local.model.loader import Pipeline
    from flux_local.model.text import PromptEmbedding

BATCH_LIMIT = 1
"""Pictures that share a step. The reference transformer computes the modulation of a batch in one matmul, whose last
bit depends on the number of rows: together, a picture would not get the bytes it gets alone."""
PROMPTS_KEPT = 64

log = logging.getLogger("flux_local.engine")


@dataclass
class Work:
    """A job on its way. Times are seconds of the monotonic clock."""

    job: Job
    arrived: float
    steps: int
    partial_steps: list[int]
    picture: Picture | None = None
    encode_s: float = 0.0
    begun: float = 0.0


class Engine:
    """Draws jobs, several at a time, each advancing a step whenever the scheduler picks it."""

    def __init__(self, pipeline: Pipeline, channel: EngineChannel) -> None:
        self.pipeline = pipeline
        self.channel = channel
        self.scheduler = Scheduler(BATCH_LIMIT)
        self.work: dict[str, Work] = {}
        self.prompts: OrderedDict[str, PromptEmbedding] = OrderedDict()
        self.seconds_per_token = 1e-4

    def run(self) -> None:
        """Until the other end closes (`EOFError`)."""
        while True:
            for message in self.channel.receive(wait=not self.work):
                match message:
                    case Job():
                        self.accept(message)
                    case Cancel():
                        self.drop(message.id)
            self.step()

    def accept(self, job: Job) -> None:
        now = time.monotonic()
        steps = job.steps - job.skip
        self.work[job.id] = Work(job, now, steps, partial_steps(steps, job.partials))
        cost = job.width * job.height / 256 * self.seconds_per_token
        self.scheduler.add(Entry(job.id, job.width, job.height, steps, cost, now))

    def drop(self, id: str) -> None:
        self.work.pop(id, None)
        self.scheduler.remove(id)

    def step(self) -> None:
        """One denoising step of the next batch; pictures that are through are decoded and sent."""
        batch = [self.work[id] for id in self.scheduler.next_batch(time.monotonic())]
        if not batch:
            return
        try:
            pictures = [self.begun(work) for work in batch]
            started = time.monotonic()
            self.pipeline.denoiser.advance(pictures)
        except Exception as error:  # the boundary of a request: whatever the model raises costs its batch only
            log.exception("a step of %d pictures failed", len(batch))
            for work in batch:
                self.fail(work, InternalError(f"The model failed ({type(error).__name__}). Try again."))
            return
        seconds = time.monotonic() - started
        self.measure(batch, seconds)
        for work in batch:
            left = self.scheduler.stepped(work.job.id)
            self.channel.send(Step(work.job.id, work.steps - left, work.steps, seconds / len(batch)))
            if left == 0:
                self.finish(work)
            elif work.steps - left in work.partial_steps:
                self.send_partial(work, work.partial_steps.index(work.steps - left))

    def begun(self, work: Work) -> Picture:
        """The job's picture, begun from noise the first time it is asked for."""
        if work.picture is None:
            job = work.job
            started = time.monotonic()
            prompt = self.encoded(job.prompt)
            work.picture = self.pipeline.begin(
                prompt, job.width, job.height, seed=job.seed, steps=job.steps, guidance=job.guidance,
                image=job.image, mask=job.mask, skip=job.skip,
            )  # fmt: skip
            if job.negative_prompt is not None:
                work.picture.negative = self.encoded(job.negative_prompt)
                work.picture.true_cfg_scale = job.true_cfg_scale
            work.begun = time.monotonic()
            work.encode_s = work.begun - started
        return work.picture

    def encoded(self, prompt: str) -> PromptEmbedding:
        """The prompt's embedding, kept for the next picture of the same prompt."""
        if prompt in self.prompts:
            self.prompts.move_to_end(prompt)
        else:
            self.prompts[prompt] = self.pipeline.text.encode(prompt)
            if len(self.prompts) > PROMPTS_KEPT:
                self.prompts.popitem(last=False)
        return self.prompts[prompt]

    def measure(self, batch: list[Work], seconds: float) -> None:
        """Keeps the price of a token's step up to date, for the scheduler's costs."""
        tokens = sum(work.job.width * work.job.height / 256 for work in batch)
        self.seconds_per_token += 0.1 * (seconds / tokens - self.seconds_per_token)

    def send_partial(self, work: Work, index: int) -> None:
        """Decodes and sends what the picture looks like so far; one that is not finite is left out."""
        job, picture = work.job, work.picture
        assert picture is not None
        with contextlib.suppress(ArithmeticError):
            pixels = self.pipeline.vae.decode(picture.estimate(), job.width, job.height)
            self.channel.send(Partial(job.id, index, pixels))

    def finish(self, work: Work) -> None:
        """Decodes and delivers."""
        job, picture = work.job, work.picture
        assert picture is not None
        self.drop(job.id)
        denoised = time.monotonic()
        try:
            pixels = self.pipeline.vae.decode(picture.latents, job.width, job.height)
        except ArithmeticError:
            self.fail(work, GenerationInvalid("The model produced no valid picture for this request."))
            return
        except Exception as error:  # the boundary of a request
            log.exception("decoding failed")
            self.fail(work, InternalError(f"Decoding failed ({type(error).__name__}). Try again."))
            return
        self.channel.send(
            Done(
                id=job.id,
                pixels=pixels,
                text_tokens=picture.prompt.tokens,
                prompt_read=picture.prompt.read,
                queue_s=work.begun - work.encode_s - work.arrived,
                encode_s=work.encode_s,
                denoise_s=denoised - work.begun,
                decode_s=time.monotonic() - denoised,
            )
        )

    def fail(self, work: Work, error: InternalError | GenerationInvalid) -> None:
        self.drop(work.job.id)
        self.channel.send(Failed(work.job.id, answer_for(error).code, error.message))


def partial_steps(steps: int, partials: int) -> list[int]:
    """After which steps to send a picture: evenly spread, never the last, fewer than asked if there are few steps."""
    spread = (round(steps * (i + 1) / (partials + 1)) for i in range(partials))
    return sorted({step for step in spread if 0 < step < steps})


def warm_up(pipeline: Pipeline, info: ModelInfo) -> float:
    """Draws the picture that a first request would ask for, in two steps; returns the seconds of the second."""
    width, height = canvas_for(table_size("1:1", "1K"), info.canvas)
    picture = pipeline.begin(pipeline.text.encode("warm-up"), width, height, seed=0, steps=2, guidance=1.0)
    pipeline.denoiser.advance([picture])
    started = time.monotonic()
    pipeline.denoiser.advance([picture])
    seconds = time.monotonic() - started
    pipeline.vae.decode(picture.latents, width, height)
    return seconds


def pick_device(asked: str) -> str:
    """`auto` is the first GPU, or the CPU.

    Raises:
        StartError: a device that torch does not see.
    """
    import torch

    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise StartError(f"Device '{asked}' asked for, but torch sees no GPU. Use --device cpu, or mend the driver.")
    return asked


def serve(channel: EngineChannel, folder: Path, device: str) -> None:
    """Loads, warms up, says so, and draws until the other end closes."""
    try:
        started = time.monotonic()
        from flux_local.model.loader import load

        device = pick_device(device)
        pipeline = load(folder, device)
        loaded = time.monotonic()
        step_seconds = warm_up(pipeline, weights.info(folder))
    except StartError as error:
        channel.send(StartFailed(error.message, error.exit_code))
        raise
    precision = str(pipeline.denoiser.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    now = time.monotonic()
    channel.send(Ready(device, precision, loaded - started, now - loaded, step_seconds))
    Engine(pipeline, channel).run()


def main() -> int:
    parser = argparse.ArgumentParser(prog="flux-local-engine")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # The server decides when its engine ends; a Ctrl-C in the terminal reaches both.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    channel = EngineChannel(socket.socket(fileno=options.fd))
    try:
        serve(channel, options.model, options.device)
    except EOFError:
        return 0
    except StartError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
