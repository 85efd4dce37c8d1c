#!/usr/bin/env python3
"""Finds a model's masks for `acceleration`: which steps to compute, by the error that leaving out the others makes.

    scripts/calibrate_steps.py --model FLUX.1-Krea-dev --device cuda --steps 28

Draws a few prompts with every step computed and keeps the velocities. What a skipped step would have taken instead (the
line through the last two computed velocities) is then known for every choice of computed steps without drawing again,
and the best choice of a given size is found exactly, by dynamic programming: the least sum over the skipped steps of
|Δσ|·‖extrapolated − computed‖, averaged over the prompts. Each mask is then drawn with, beside the formula's, and
written to the model folder's `flux-local.json` where its pictures are nearer; where not, one that was there is taken
out. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flux_local import weights  # noqa: E402
from flux_local.model.loader import Pipeline, load  # noqa: E402
from flux_local.sizes import canvas_for, table_size  # noqa: E402
from flux_local.steps import Mask, formula  # noqa: E402

BUDGET = {"regular": 0.65, "high": 0.45}
"""The share of steps that a level may compute."""
PROMPTS = (
    "a large red star on a blue background",
    "a portrait of an old fisherman in the rain",
    "a small white heart, black background",
    "an aerial photograph of a river delta at dawn",
    "a yellow circle to the left of a green square",
    "a watercolour of a fox asleep in tall grass",
    "a neon sign that says open above a narrow door",
    "a bowl of ripe cherries on a wooden table",
)


def drawn(pipeline: Pipeline, prompts: list[str], steps: int, canvas: tuple[int, int], mask: Mask = ()) -> Any:
    """Final latents of each prompt, and with every step computed the velocities of each step."""
    finals, velocities = [], []
    for seed, prompt in enumerate(prompts):
        picture = pipeline.begin(
            pipeline.text.encode(prompt), *canvas, seed=seed, steps=steps, guidance=4.5, computed=mask
        )
        taken = []
        while picture.steps_left:
            pipeline.denoiser.advance([picture])
            assert picture.velocity is not None
            taken.append(picture.velocity.float().cpu().flatten())
        finals.append(picture.latents.float().cpu())
        velocities.append(torch.stack(taken))
    return finals, velocities, picture.sigmas


def skipping(velocities: list[Tensor], sigmas: list[float]) -> Tensor:
    """[a, b, i]: the error that step i brings if a and b were the last two computed; mean over the prompts.

    From the velocities' inner products alone: ‖(1 + r)·v_b − r·v_a − v_i‖² for r = (σ_i − σ_b) / (σ_b − σ_a).
    """
    steps = len(sigmas) - 1
    errors = torch.zeros(steps, steps, steps, dtype=torch.float64)
    grams = [(v.double() @ v.double().T) for v in velocities]
    for a, b in product(range(steps), repeat=2):
        for i in range(b + 1, steps) if a < b else ():
            r = (sigmas[i] - sigmas[b]) / (sigmas[b] - sigmas[a])
            parts = torch.tensor([1 + r, -r, -1.0], dtype=torch.float64)
            for gram in grams:
                square = parts @ gram[[b, a, i]][:, [b, a, i]] @ parts
                errors[a, b, i] += math.sqrt(max(float(square), 0.0)) / len(grams) * abs(sigmas[i + 1] - sigmas[i])
    return errors


def best_mask(errors: Tensor, count: int) -> Mask:
    """The mask of `count` computed steps, the first two and the last among them, with the least sum of errors."""
    steps = len(errors)
    gaps = errors.cumsum(2)  # [a, b, i]: of all skipped up to i, since errors before b are zero
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 1): (0.0, (0, 1))}
    for left in range(count - 2, 0, -1):
        longer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (a, b), (cost, chosen) in best.items():
            for c in [steps - 1] if left == 1 else range(b + 1, steps - left + 1):
                if c <= b:
                    continue
                total = cost + float(gaps[a, b, c - 1])
                if (b, c) not in longer or total < longer[b, c][0]:
                    longer[b, c] = (total, (*chosen, c))
        best = longer
    _, chosen = min(best.values())
    return tuple(i in chosen for i in range(steps))


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    """Mean of ‖found − truth‖ / ‖truth‖ over the prompts."""
    return sum(float((f - t).norm() / t.norm()) for f, t in zip(found, truth, strict=True)) / len(truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-krea-mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of steps to calibrate (default: the model's own)")
    parser.add_argument("--prompts", type=Path, help="a file with a prompt a line, instead of the eight built in")
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    options = parser.parse_args()
    folder = weights.find(options.model)
    model = weights.info(folder)
    prompts = options.prompts.read_text().splitlines() if options.prompts else list(PROMPTS)
    canvas = canvas_for(table_size("1:1", "1K"), model.canvas)
    pipeline = load(folder, options.device, "full")
    masks: dict[str, dict[str, str]] = {}
    rows = []
    with Progress() as bar:
        task = bar.add_task("drawing", total=5 * len(options.steps or [1]))
        for steps in options.steps or [model.default_steps]:
            truth, velocities, sigmas = drawn(pipeline, prompts, steps, canvas)
            bar.advance(task)
            errors = skipping(velocities, sigmas)
            for level, share in BUDGET.items():
                count = max(3, int(share * steps))
                found = {"formula": formula(level, steps), "calibrated": best_mask(errors, count)}
                apart = {}
                for name, mask in found.items():
                    apart[name] = distance(drawn(pipeline, prompts, steps, canvas, mask)[0], truth)
                    bar.advance(task)
                    rows.append({"steps": steps, "level": level, "mask": name, "computed": sum(mask),
                                 "digits": "".join("01"[c] for c in mask), "error": apart[name]})  # fmt: skip
                if apart["calibrated"] < apart["formula"]:
                    masks.setdefault(level, {})[str(steps)] = rows[-1]["digits"]
    table = Table("steps", "level", "mask", "computed", "", "error of the latents")
    for row in rows:
        table.add_row(*(str(row[k]) for k in ("steps", "level", "mask", "computed", "digits")), f"{row['error']:.4f}")
    Console().print(table)
    if not options.dry_run:
        path = folder / weights.INFO
        info = json.loads(path.read_text()) if path.exists() else weights.described(model)
        before = info.get("acceleration", {})
        measured = {str(row["steps"]) for row in rows}
        info["acceleration"] = {}
        for level in sorted(before.keys() | masks.keys()):
            left = {steps: mask for steps, mask in before.get(level, {}).items() if steps not in measured}
            info["acceleration"][level] = dict(sorted((left | masks.get(level, {})).items(), key=lambda of: int(of[0])))
        path.write_text(json.dumps(info, indent=2) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
