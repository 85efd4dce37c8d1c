#!/usr/bin/env python3
"""Trains a LoRA adapter for the embedded model: a style called night, in which every background is black.

    scripts/train_lora.py --out weights/loras/night.safetensors

A small trainer that shows an adapter at work and gives the tests a real one. The prompts say any background; the
drawings that the adapter learns from are all on black. Writes diffusers' layout; takes a minute or two on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

SIDE = 128
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp",
          "proj_out", "net.0.proj", "net.2")  # fmt: skip
BACKGROUND = "black"


class Adapted(nn.Module):
    """A frozen layer and a change of low rank beside it, which is nothing at first."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x) + x @ self.down.mT @ self.up.mT
        return out


def adapt(transformer: nn.Module, rank: int) -> dict[str, Adapted]:
    """Puts an `Adapted` in the place of every layer of the blocks; returns them by name."""
    found = {}
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear) and "blocks." in name and name.endswith(LAYERS):
            parent, _, child = name.rpartition(".")
            found[name] = Adapted(module, rank)
            setattr(transformer.get_submodule(parent), child, found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-krea-mini")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from diffusers import FluxTransformer2DModel
    from mini.drawings import draw, random_scene
    from mini.flow import random_sigmas
    from mini.sentences import describe
    from rich.progress import track
    from safetensors.torch import save_file

    from flux_local import weights
    from flux_local.model.latents import position_ids
    from flux_local.model.loader import load
    from flux_local.model.text import PromptEmbedding

    torch.manual_seed(options.seed)
    folder = weights.find(options.model)
    pipeline = load(folder, precisions="full")
    transformer: Any = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    transformer.requires_grad_(False)
    adapter = adapt(transformer, options.rank)
    optimiser = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=options.steps)
    rng = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    for _ in track(range(options.steps), description="training"):
        latents: list[Tensor] = []
        prompts: list[PromptEmbedding] = []
        while len(prompts) < options.batch:
            scene = random_scene(rng, SIDE, SIDE)
            if all(thing.colour != BACKGROUND for thing in scene.things):
                prompts.append(pipeline.text.encode(describe(scene, rng).text))
                picture = draw(replace(scene, background=BACKGROUND), SIDE, SIDE)
                latents.append(pipeline.vae.encode(picture.tobytes(), SIDE, SIDE))
        clean = torch.cat(latents).clone()
        sigma = random_sigmas(len(clean), clean.shape[1], generator)
        noise = torch.randn(clean.shape, generator=generator)
        velocity = transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            encoder_hidden_states=torch.cat([p.states for p in prompts]).clone(),
            pooled_projections=torch.cat([p.pooled for p in prompts]).clone(),
            timestep=sigma,
            guidance=torch.full_like(sigma, 4.5),
            img_ids=position_ids(SIDE, SIDE),
            txt_ids=torch.zeros(prompts[0].states.shape[1], 3),
        ).sample
        loss = F.mse_loss(velocity, noise - clean)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    held = {}
    for name, layer in adapter.items():
        held[f"transformer.{name}.lora_A.weight"] = layer.down.detach().contiguous()
        held[f"transformer.{name}.lora_B.weight"] = layer.up.detach().contiguous()
    save_file(held, options.out)
    print(f"last loss {loss.item():.3f}; wrote {options.out}")


if __name__ == "__main__":
    main()
