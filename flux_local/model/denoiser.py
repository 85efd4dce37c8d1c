"""The denoising path: what a picture is while it is being denoised, and one Euler step of several at once.

Pictures of one canvas advance together although their step, guidance, seed and prompt differ, since each brings the
transformer's condition of its own. Which pictures share a step is somebody else's decision.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flux_local.model.graphs import same_bits
from flux_local.model.latents import initial_noise
from flux_local.model.memory import STEP_TOKENS
from flux_local.model.pace import Pace
from flux_local.model.text import PromptEmbedding


@dataclass(frozen=True)
class Keep:
    """What inpainting holds on to. All packed, [1, tokens, 64]."""

    repaint: Tensor
    """1 where the picture is to be made anew, 0 where it stays."""
    original: Tensor
    noise: Tensor

    def at(self, sigma: float) -> Tensor:
        """The original at a noise level."""
        return noised(self.original, self.noise, sigma)


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """x(σ) = σ·noise + (1 − σ)·clean; at σ = 1 exactly the noise."""
    return sigma * noise + (1 - sigma) * clean


@dataclass
class Picture:
    """A picture being denoised: packed latents [1, tokens, 64] at noise level `sigmas[step]`."""

    width: int
    height: int
    sigmas: list[float]
    latents: Tensor
    prompt: PromptEmbedding
    condition: Any
    """What the transformer made of prompt, noise levels and guidance, once for all steps. None where it was let go for
    the memory it takes, and has to be made again before the next step."""
    guidance: float = 0.0
    step: int = 0
    keep: Keep | None = None
    negative: PromptEmbedding | None = None
    """What to keep away from, with `true_cfg_scale`; None for one pass a step."""
    against: Any = None
    """The condition that is made of it."""
    true_cfg_scale: float = 1.0
    computed: tuple[bool, ...] = ()
    """Which steps are computed; the others take an extrapolated velocity. Empty: all are."""
    velocity: Tensor | None = None
    """That of the last step."""
    latest: tuple[tuple[float, Tensor], ...] = ()
    """The last two computed velocities with their noise levels, where some are extrapolated."""

    def estimate(self) -> Tensor:
        """What the finished latents would be if the last step's velocity held: x(σ) − σ·v."""
        assert self.velocity is not None
        return self.latents - self.sigmas[self.step] * self.velocity

    @property
    def steps_left(self) -> int:
        return len(self.sigmas) - 1 - self.step

    @property
    def extrapolates(self) -> bool:
        """Whether the step that comes next is not computed."""
        return self.steps_left > 0 and bool(self.computed) and not self.computed[self.step]

    def extrapolated(self) -> Tensor:
        """The velocity at this step's noise level, on the line through the last two that were computed.

        With it a skipped step is one of a linear multistep method: two-step Adams–Bashforth at uneven steps, whose
        only evaluations of the model are the computed ones.
        """
        (earlier, before), (later, after) = self.latest
        return after + (self.sigmas[self.step] - later) / (later - earlier) * (after - before)


class Transformer(Protocol):
    """What predicts velocities: `FluxTransformer`, or diffusers' own behind the same interface."""

    dtype: torch.dtype
    device: torch.device

    @property
    def attention_by(self) -> str:
        """Whose attention it has."""

    @property
    def recordings(self) -> int:
        """CUDA graphs that it has tried to record so far; a step that recorded one took much longer than any other."""

    def condition(self, prompt: PromptEmbedding, sigmas: Sequence[float], guidance: float) -> Any:
        """All that it has to know of one picture's prompt, noise levels at each step, and guidance."""

    def velocity(
        self, latents: Tensor, conditions: Sequence[Any], steps: Sequence[int], width: int, height: int
    ) -> Tensor:
        """[B, tokens, 64] → the same, each picture under its condition and at its own step."""


class Denoiser:
    """The Euler rule around a transformer.

    Args:
        pace: that of the other denoisers of the device; one of its own, if none is given.
    """

    def __init__(self, transformer: Transformer, pace: Pace | None = None) -> None:
        self.transformer = transformer
        self.dtype, self.device = transformer.dtype, transformer.device
        self.pace = pace or Pace(self.device)
        self._independent: dict[tuple[int, int, int, int], bool] = {}

    @torch.inference_mode()
    def velocity(self, pictures: Sequence[Picture]) -> Tensor:
        """[B, tokens, 64]: where each picture's latents move per unit of sigma, guided where it asks for that.

        A guided picture is two rows: under its prompt, and under what to keep away from.
        """
        guided = [i for i, p in enumerate(pictures) if p.negative is not None]
        rows = [(p, p.condition) for p in pictures] + [(pictures[i], pictures[i].against) for i in guided]
        velocity = self.raw_velocity(rows)
        for row, i in enumerate(guided, len(pictures)):  # numbers, not tensors: the host waits for nothing
            away = velocity[row].float()
            velocity[i] = away + pictures[i].true_cfg_scale * (velocity[i].float() - away)
        return velocity[: len(pictures)]

    def raw_velocity(self, rows: Sequence[tuple[Picture, Any]]) -> Tensor:
        """[rows, tokens, 64]: the transformer's own, each picture under the condition beside it.

        Rows that would have more than STEP_TOKENS together, for which nobody has kept memory, go one after the other.
        """
        most = max(1, STEP_TOKENS // rows[0][0].latents.shape[1])
        if len(rows) > most:
            return torch.cat([self.raw_velocity(rows[at : at + most]) for at in range(0, len(rows), most)])
        return self.transformer.velocity(
            torch.cat([picture.latents for picture, _ in rows]),
            [condition for _, condition in rows],
            [picture.step for picture, _ in rows],
            rows[0][0].width,
            rows[0][0].height,
        )

    @torch.inference_mode()
    def advance(self, pictures: Sequence[Picture]) -> None:
        """Computes one step of each picture, and takes the extrapolated ones that follow it.

        Either all pictures are moved or, if anything raises, none.

        Args:
            pictures: of one canvas and one prompt length, each with steps left.
        """
        tokens = sum(picture.latents.shape[1] * (1 if picture.negative is None else 2) for picture in pictures)
        recordings = self.transformer.recordings
        with self.pace.step(tokens) as launching:
            moved = [copy.copy(picture) for picture in pictures]
            for picture, velocity in zip(moved, self.velocity(pictures).split(1), strict=True):
                if picture.computed:
                    picture.latest = (*picture.latest, (picture.sigmas[picture.step], velocity))[-2:]
                self.move(picture, velocity)
                while picture.extrapolates:
                    self.move(picture, picture.extrapolated())
            launching.usual = self.transformer.recordings == recordings
        for picture, ahead in zip(pictures, moved, strict=True):
            vars(picture).update(vars(ahead))

    def move(self, picture: Picture, velocity: Tensor) -> None:
        """An Euler step: x(σ') = x(σ) + (σ' − σ)·v, in fp32, kept in the model's dtype."""
        sigma, following = (torch.tensor(s, dtype=torch.float32) for s in picture.sigmas[picture.step :][:2])
        # A number, not a tensor: the host hands it over with the launch and waits for nothing.
        moved = picture.latents.float() + float(following - sigma) * velocity
        if picture.keep is not None:
            moved = torch.where(picture.keep.repaint > 0, moved, picture.keep.at(float(following)))
        picture.latents = moved.to(self.dtype)
        picture.velocity = velocity
        picture.step += 1

    def independent(self, width: int, height: int, rows: int, prompt: PromptEmbedding) -> bool:
        """Whether a picture's bits are the same in a batch of so many rows as alone. Measured, once a shape.

        The rows differ in noise, step and guidance, as those of strangers do. Bits that depend on the number of rows
        (another blocking of a matmul, say) show in the first step or not at all.
        """
        key = (width, height, rows, prompt.states.shape[1])
        if key not in self._independent:
            levels = [[1.0 - i / (2 * rows), 0.0] for i in range(rows)]
            pictures = [
                Picture(
                    width, height, sigmas, initial_noise(i, width, height).to(self.device, self.dtype), prompt,
                    self.transformer.condition(prompt, sigmas[:-1], 1.0 + i),
                )
                for i, sigmas in enumerate(levels)
            ]  # fmt: skip
            together = self.raw_velocity([(p, p.condition) for p in pictures])
            alone = [self.raw_velocity([(p, p.condition)]) for p in pictures]
            self._independent[key] = same_bits(together, torch.cat(alone))
        return self._independent[key]
