#!/usr/bin/env python3
"""Trains a tiny image classifier that flags one shape of the embedded model's world, to try the safety checker with.

    scripts/train_classifier.py --out weights/safety --shape circle

The folder is one that `AutoModelForImageClassification` loads, with the labels `normal` and `nsfw`; a circle is of
course neither. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

SIDE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", default="circle", help="what to flag (default circle)")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()

    import numpy as np
    import torch
    from mini.drawings import COLOURS, SHAPES, Scene, Thing, draw
    from rich.progress import track
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    if options.shape not in SHAPES:
        raise SystemExit(f"No such shape: {options.shape}. There are {', '.join(SHAPES)}.")
    torch.manual_seed(0)
    rng = random.Random(0)
    others = [shape for shape in SHAPES if shape != options.shape]

    def picture(shape: str) -> Any:
        """One thing of the shape, of any size, somewhere about the middle."""
        background, colour = rng.sample(list(COLOURS), 2)
        centre = (rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6))
        thing = Thing(colour, shape, "", centre, rng.uniform(0.12, 0.38))
        return draw(Scene(background, (thing,)), SIDE, SIDE)

    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    config = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], layer_type="basic",
        id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1},
    )  # fmt: skip
    model = ResNetForImageClassification(config).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=options.steps)
    for _ in track(range(options.steps), description="training"):
        wanted = [rng.random() < 0.5 for _ in range(32)]
        pictures = [np.asarray(picture(options.shape if w else rng.choice(others))) for w in wanted]
        inputs = processor(images=pictures, return_tensors="pt")
        loss = model(**inputs, labels=torch.tensor([int(w) for w in wanted])).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"last loss {loss.item():.4f}; wrote {options.out}")


if __name__ == "__main__":
    main()
