"""Step caching: which denoising steps are computed, and which take a velocity extrapolated from those before them.

A mask is fixed by the level and the number of steps, not by what is being drawn: the same request takes the same steps
in any company, and its cost is known beforehand. A model's folder may bring masks that were calibrated for it
(`scripts/calibrate_steps.py`); otherwise the formula here serves. Plain arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEVELS = ("none", "regular", "high")
WHOLE, PERIOD = {"regular": 0.25, "high": 0.14}, {"regular": 2, "high": 3}
"""By level: the share of steps at the beginning that are all computed, and of how many of the rest one is computed.

The beginning decides the composition and is where the velocity turns fastest; the last step removes what is left of
the noise and is always computed. Of 28 steps `regular` computes 18 (64%), `high` 12 (43%).
"""

Mask = tuple[bool, ...]


def formula(level: str, steps: int) -> Mask:
    """True for each step that is computed. The first two always are: an extrapolation wants two velocities."""
    if level == "none":
        return (True,) * steps
    whole, period = max(2, round(WHOLE[level] * steps)), PERIOD[level]
    return tuple(i < whole or (i - whole) % period == period - 1 or i == steps - 1 for i in range(steps))


def advances(mask: Mask) -> list[int]:
    """How many steps are done after each computed one and the extrapolated ones that follow it at once."""
    return [i for i in range(1, len(mask) + 1) if i == len(mask) or mask[i]]


def partial_steps(ends: list[int], partials: int) -> list[int]:
    """After which steps to send a picture: evenly spread over those at which one stops, never the last, and fewer than
    asked if there are few."""
    spread = (round(len(ends) * (i + 1) / (partials + 1)) for i in range(partials))
    return [ends[i - 1] for i in sorted({i for i in spread if 0 < i < len(ends)})]


@dataclass(frozen=True)
class Masks:
    """The masks of one model: calibrated ones by level and number of steps, the formula for all others."""

    calibrated: Mapping[tuple[str, int], Mask] = field(default_factory=dict)

    def __call__(self, level: str, steps: int) -> Mask:
        return self.calibrated.get((level, steps)) or formula(level, steps)

    def origin(self, level: str, steps: int) -> str:
        """Where the mask comes from, as answers say it."""
        if level == "none":
            return "none"
        return f"{level}; {'calibrated' if (level, steps) in self.calibrated else 'formula'}"

    @classmethod
    def read(cls, written: Mapping[str, Mapping[str, str]]) -> Masks:
        """From `{"regular": {"28": "1101…"}}`.

        Raises:
            ValueError: a level that does not exist, or a mask of another length or without its first two and last.
        """
        found = {}
        for level, by_steps in written.items():
            for steps, digits in by_steps.items():
                mask = tuple(digit == "1" for digit in digits)
                if level not in LEVELS or len(mask) != int(steps) or not (mask[-1] and all(mask[:2])):
                    raise ValueError(f"no mask for {level} at {steps} steps: {digits}")
                found[level, int(steps)] = mask
        return cls(found)
