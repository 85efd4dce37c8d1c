"""Stage two: both text encoders learn to say what a sentence asks for, before anything has to paint it.

Painting alone teaches words slowly: a colour moves the loss a thousand times more than a star's five points, so the
encoders would hear of shapes only when the transformer could already draw them. Here linear heads on each encoder's
output name the background and every thing in the order in which they lie in space. The heads are thrown away.

Encoders that a transformer already understands learn a larger world's words the same way, and go on to say of the first
world's sentences what they said before. Knows nothing of pictures.
"""

from __future__ import annotations

import copy
import random
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from .drawings import BACKWARDS, FIRST, PLACES, RELATIONS, ROWS, Scene, World, random_scene
from .run import Run
from .sentences import Wording, describe

STEPS = 1200
BATCH = 192
KEEPING = 4.0  # weight of the outputs that should stay, beside the answers'
UNSAID = "unsaid"
ORDINALS = ("first", "second", "third")
AXES = RELATIONS | ROWS


def choices(world: World) -> dict[str, tuple[str, ...]]:
    """What there is to say in a world, and its values."""
    found: dict[str, tuple[str, ...]] = {"background": world.colours, "axis": tuple(sorted(set(AXES.values())))}
    if world.most > 2:
        found["count"] = ("one", "two", "three")
    if len(world.patterns) > 1:
        found |= {"pattern": world.patterns, "second background": world.colours}
    if world.places:
        found["place"] = tuple(PLACES)
    for ordinal in ORDINALS[: world.most]:
        found |= {f"{ordinal} colour": world.colours, f"{ordinal} shape": world.shapes, f"{ordinal} size": world.sizes}
    return {name: (UNSAID, *values) for name, values in found.items()}


class Reader(Protocol):
    text_encoder: nn.Module
    text_encoder_2: nn.Module

    def read(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]: ...


def meaning(scene: Scene, wording: Wording, world: World) -> dict[str, str]:
    """What the sentence says of the scene; things in spatial order: left before right, upper before lower."""
    said: dict[str, str | None] = {"place": scene.place, "count": ("one", "two", "three")[len(scene.things) - 1]}
    if wording.mentions_background:
        said |= {"background": scene.background, "pattern": scene.pattern, "second background": scene.second}
    things = list(scene.things)
    if scene.relation is not None:
        said["axis"] = AXES[scene.relation]
        if scene.relation in BACKWARDS:
            things.reverse()
    for ordinal, thing in zip(ORDINALS, things, strict=False):
        said |= {f"{ordinal} colour": thing.colour, f"{ordinal} shape": thing.shape}
        if wording.mentions_size:
            said[f"{ordinal} size"] = thing.size
    return {name: said.get(name) or UNSAID for name in choices(world)}


class Heads(nn.Module):
    """A linear classifier for each of a world's choices."""

    def __init__(self, width: int, world: World) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(width, len(v)) for name, v in choices(world).items()})

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: layer(features) for name, layer in self.layers.items()}


class Keeping:
    """How far a reader's outputs for the first world's sentences are from what they were, as a share of their variance.

    Half a batch of sentences each time.
    """

    def __init__(self, reader: Reader) -> None:
        self.before = copy.deepcopy(reader)

    def __call__(self, reader: Reader, rng: random.Random) -> torch.Tensor:
        scenes = [random_scene(rng, 128, 128, world=FIRST) for _ in range(BATCH // 2)]
        prompts = [describe(scene, rng, FIRST).text for scene in scenes]
        with torch.no_grad():
            wanted = self.before.read(prompts)
        return torch.stack(
            [F.mse_loss(now, then) / then.var() for now, then in zip(reader.read(prompts), wanted, strict=True)]
        ).mean()


def train(run: Run, reader: Reader, scale: float = 1.0, keep: bool = False) -> None:
    """Trains both encoders of `reader` in place, going on from the last checkpoint.

    Args:
        keep: they have been trained on the first world, and should say of it what they do.
    """
    torch.manual_seed(run.seed)
    steps = max(1, round(STEPS * scale))
    states, pooled = reader.read(["probe"])
    kept = Keeping(reader) if keep else None
    learner = nn.ModuleDict(
        {
            "clip": reader.text_encoder,
            "t5": reader.text_encoder_2,
            "clip heads": Heads(pooled.shape[-1], run.world),
            "t5 heads": Heads(states.shape[-1], run.world),
        }
    ).to(run.device)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    start = run.resume("reading", learner, optimiser)
    rate = run.one_cycle(steps)
    with run.progress("text encoders", steps, start) as progress:
        for step in range(start, steps):
            rng = random.Random(f"{run.seed} reading {step}")
            scenes = [random_scene(rng, 128, 128, world=run.world) for _ in range(BATCH)]
            wordings = [describe(scene, rng, run.world) for scene in scenes]
            said = [meaning(scene, wording, run.world) for scene, wording in zip(scenes, wordings, strict=True)]
            states, pooled = reader.read([wording.text for wording in wordings])
            answers = (learner["clip heads"](pooled), learner["t5 heads"](states.mean(dim=1)))
            losses, right = [], []
            for name, values in choices(run.world).items():
                target = torch.tensor([values.index(s[name]) for s in said], device=run.device)
                losses += [F.cross_entropy(answer[name], target) for answer in answers]
                right += [(answer[name].argmax(dim=-1) == target).float().mean() for answer in answers]
            loss = torch.stack(losses).mean()
            figures = {"loss": loss.item(), "right": torch.stack(right).mean().item()}
            if kept is not None:
                moved = kept(reader, rng)
                loss, figures = loss + KEEPING * moved, figures | {"moved": moved.item()}
            run.step(optimiser, loss, learner, rate(step))
            progress(step + 1, **figures)
            run.checkpoint("reading", step + 1, steps, learner, optimiser)
