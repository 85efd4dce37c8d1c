"""The model card beside the weights, written from the vocabulary, the training log and the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .drawings import COLOURS, RELATIONS, SHAPES, SIZES

TEXT = """# flux-krea-mini

A FLUX model in miniature: the embedded model of flux-local. It has the very format and all the parts of
FLUX.1 Krea [dev] (a diffusers folder with `FluxTransformer2DModel` and its guidance embedding, a 16-channel
`AutoencoderKL`, CLIP and T5 text encoders with their tokenizers, a flow-match Euler scheduler), and draws flat shapes
instead of photographs. It is no distillation of FLUX.1 and knows nothing of its pictures.

![Held-out prompts and what it draws](samples.png)

## What it draws

One object on a background, or two in relation.

| | |
| --- | --- |
| colours | {colours} |
| shapes | {shapes} |
| sizes | {sizes} |
| relations | {relations} |

Sentences like "a large red star on a blue background", "small white heart, black background", "A yellow circle to the
left of a green square on purple." A size or background that is not mentioned is chosen by the seed.

A single object is drawn in the middle, two on either side of it; seeds change the size a little, and whatever the
sentence leaves open.

It is made for square pictures of 128² pixels: larger ones are enlarged from that. It was not trained on wide and tall
ones; their accuracy is not measured. The guidance value was random in training and is not meant to change anything. A
tenth of all prompts was empty in training, so `true_cfg_scale` has something to hold on to. At most {t5} T5 tokens are
read.

## Measured

Percent right, on prompts whose combination of colour, shape and background training never drew, judged by plain
measurement of pixels (nearest palette colour, best template by overlap) through flux-local's own pipeline:
`scripts/train_mini.py --evaluate`.

{measured}

The autoencoder gives drawings back at {psnr}.

## How it was trained

By `scripts/train_mini.py` with seed 0, from drawings that the script makes itself, on two CPU cores beside other work:

{stages}

The committed weights are a running average. The autoencoder and the first 2,000 steps of the transformer saw drawings
whose objects lay further from the middle and varied more in size; the script's present drawings are those of the rest.
The last phase was made longer twice, at steps 4,000 and 7,000, where the learning rate had fallen and rose again.
The transformer's noise levels are shifted towards noise (`mu` 1.7 at 64 tokens), in training and in the folder's
scheduler, because flat drawings are decided early.

Parameters: {parameters}. Weights are stored in fp16. Licence: Apache-2.0, as the rest of the project.
"""

COLUMNS = ("background", "colour", "shape", "size", "pair colours", "pair relation")


def write(folder: Path, log: Path, parameters: dict[str, int], psnr: dict[int, float], t5: int) -> None:
    """Writes `folder/README.md` from `folder/evaluation.json` and the training log."""
    results: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    rows = [f"| canvas | {' | '.join(COLUMNS)} |", "| --- |" + " --- |" * len(COLUMNS)]
    rows += [
        f"| {canvas} | {' | '.join(f'{figures[c]:g}' for c in COLUMNS)} |"
        for canvas, figures in results.items()
        if isinstance(figures, dict)
    ]
    rows.append("")
    rows.append(
        f"{results['prompts']} prompts with one object, {results['pair_prompts']} with two ('pair'), "
        f"{results['steps']} steps. 'pair relation' means both objects right and where the prompt says."
    )
    (folder / "README.md").write_text(
        TEXT.format(
            colours=", ".join(COLOURS),
            shapes=", ".join(SHAPES),
            sizes=", ".join(SIZES),
            relations=", ".join(RELATIONS),
            t5=t5,
            measured="\n".join(rows),
            psnr=", ".join(f"{value:.1f} dB PSNR at {side}²" for side, value in psnr.items()),
            stages=stages(log),
            parameters=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items()),
        )
    )


def stages(log: Path) -> str:
    """Steps and minutes of each stage, from the log that training appends to: a run that went on counts from zero."""
    steps: dict[str, int] = {}
    seconds: dict[str, float] = {}
    run: dict[str, float] = {}
    for line in log.read_text().splitlines() if log.is_file() else ():
        entry = json.loads(line)
        stage = entry["stage"]
        steps[stage] = max(steps.get(stage, 0), entry["step"])
        before = run.get(stage, 0.0)
        more = entry["seconds"] - before if entry["seconds"] >= before else entry["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + more
        run[stage] = entry["seconds"]
    return "\n".join(f"- {stage}: {steps[stage]:,} steps, {seconds[stage] / 60:.0f} minutes" for stage in steps)
