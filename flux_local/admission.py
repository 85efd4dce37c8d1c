"""What is taken in: how much may wait, and how long all of it takes at the speed that was measured.

Plain arithmetic over jobs; knows neither engines nor HTTP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from flux_local.errors import RateLimited
from flux_local.messages import Job

UNLIKELY = 4.0
"""A measurement counts for at most so many times the usual price: beyond that, the machine stood still."""
NEWEST = 0.05
"""Share that the newest measurement has of a price."""
NEWEST_BEGINNING = 0.2
"""The same of the time that a picture takes to begin."""


class Amount(NamedTuple):
    """Work, by what it costs: pictures to begin, image tokens times steps, and image tokens that are decoded."""

    begun: float
    token_steps: float
    decoded: float

    def plus(self, other: Amount, times: int = 1) -> Amount:
        begun, token_steps, decoded = (mine + times * more for mine, more in zip(self, other, strict=True))
        return Amount(begun, token_steps, decoded)


NOTHING = Amount(0, 0, 0)


def amount_of(job: Job, steps_left: int | None = None) -> Amount:
    """The work of a picture, or what is left of it with so many of its steps to go. All of its decodings, those of
    partial pictures too, are left until it is done."""
    share = 1.0 if steps_left is None else steps_left / max(1, job.steps - job.skip)
    return Amount(int(share == 1), share * job.steps_computed * job.tokens, job.canvas_tokens * (1 + job.partials))


@dataclass
class Held:
    """The part of an admitted request that has not come as jobs yet."""

    owner: str
    pictures: int
    amount: Amount

    def take(self, job: Job) -> None:
        """One of its pictures has come."""
        self.pictures -= 1
        self.amount = self.amount.plus(amount_of(job), -1)


@dataclass
class Speed:
    """Seconds of a device for an image token, in a step and in a decoding, and for beginning a picture: its prompt, its
    source, its adapters. Nobody has told of the last two before the first picture."""

    step: float = 1e-4
    decoding: float = 0.0
    beginning: float = 0.0

    def seconds(self, amount: Amount) -> float:
        return amount.token_steps * self.step + amount.decoded * self.decoding + amount.begun * self.beginning

    def began(self, seconds: float) -> None:
        """A picture was begun in so many seconds. They say less of the next, whose prompt may be known already, or its
        adapters not in place; so that the newest counts for more."""
        self.beginning += NEWEST_BEGINNING * (seconds - self.beginning)

    def stepped(self, seconds: float) -> None:
        """A step took so many seconds a token."""
        self.step += NEWEST * (min(seconds, UNLIKELY * self.step) - self.step)

    def decoded(self, seconds: float) -> None:
        """A decoding took so many seconds a token. The first is measured by a step, which a start has tried."""
        usual = self.decoding or min(seconds, UNLIKELY * self.step)
        self.decoding = usual + NEWEST * (min(seconds, UNLIKELY * usual) - usual)


@dataclass(frozen=True)
class Limits:
    """How much is promised.

    `pictures` that may wait, `seconds` of work that may be before a new one, and of both the `share` that one key may
    hold where there are several.
    """

    pictures: int
    seconds: float
    share: float

    def check(self, more: tuple[int, float], waiting: tuple[int, float], of_key: bool, keys: int = 1) -> None:
        """Whether there is room for more beside what waits, each in pictures and seconds: of all, or of one key.

        Args:
            keys: that work waits for, each of which gets as much of the devices as the others.

        Raises:
            RateLimited: there is none, and when there will be. Where nothing waits, anything is taken.
        """
        share = self.share if of_key else 1.0
        pictures, seconds = waiting
        too_many = pictures + more[0] - max(1, share * self.pictures)
        over = seconds + more[1] - share * self.seconds
        if not pictures or (too_many <= 0 and over <= 0):
            return
        wait = keys * max(over, min(too_many, pictures) * seconds / pictures)
        raise RateLimited(
            f"Too many pictures are waiting{' for this key' if of_key else ''}. Try again after the time "
            "in Retry-After, or ask for fewer or smaller ones or for fewer steps.",
            retry_after=min(120, max(1, math.ceil(wait))),
        )
