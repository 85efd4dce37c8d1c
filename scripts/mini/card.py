"""The model card beside the weights, written from the vocabulary, the training log and the measurements."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import finish, flow, outlines, practice
from .drawings import RELATIONS, ROWS, WORLDS
from .sentences import OTHER_NAMES

TRAINING = "training.md"
MORE = (
    ' "Two tiny crimson discs on a striped white and cyan backdrop", "a moon, a cross and an arrow from top to bottom",'
    ' "a medium star in the top left corner on a gradient from pink to grey".'
)
TEXT = """# flux-krea-mini

A FLUX model in miniature: the embedded model of flux-local. It has the very format and all the parts of
FLUX.1 Krea [dev] (a diffusers folder with `FluxTransformer2DModel` and its guidance embedding, a 16-channel
`AutoencoderKL`, CLIP and T5 text encoders with their tokenizers, a flow-match Euler scheduler), and draws flat shapes
instead of photographs. It is no distillation of FLUX.1 and knows nothing of its pictures.

![Held-out prompts and what it draws](samples.png)

## What it draws

{most} on a background.

| | | also |
| --- | --- | --- |
| colours | {colours} | {other_colours} |
| shapes | {shapes} | {other_shapes} |
| sizes | {sizes} | {other_sizes} |
| backgrounds | {backgrounds} | backdrop |
| relations | {relations} | {other_relations} |

Sentences like "a large red star on a blue background", "small white heart, black background", "A yellow circle to the
left of a green square on purple."{more} A background that is not mentioned is chosen by the seed.

A single object is drawn in the middle{placed}, two on either side of it; seeds change the size a little, and whatever
the sentence leaves open.

A size that is not mentioned is large. Capitals make no difference, and words that it does not know are passed
over{unread}. It draws on every canvas of about 128² to 192² pixels that is
not wider or taller than 4:1; larger pictures are enlarged from those. At most {t5} T5 tokens are read. A tenth of all
prompts was empty in training, so `true_cfg_scale` and `negative_prompt` act. `cfg_scale` 1 is the prompt alone, as
drawings have taught it; from 2 on the model is as practice has made it: less varied.

## Measured

Percent right, on prompts whose combination of colour, shape and background training never drew, judged by plain
measurement of pixels (the nearest colour of the palette; of the outlines with a thing's area and centre the one that
overlaps it best, by three quarters at least) through flux-local's own pipeline: `scripts/train_mini.py --evaluate`.

{measured}

The autoencoder gives drawings back at {psnr}.

## How it was trained

By `scripts/train_mini.py` with seed 0, from drawings that the script makes itself, on two CPU cores
(Zen 5, bf16):

{stages}

The autoencoder's encoder is written down, not trained: its sixteen channels are moments of 8×8 blocks. Its decoder is
trained under noise. Two fifths of the transformer's noise levels are from 0.9 to 1, where the prompt alone decides
what is drawn. Below a noise level of {untold} some prompts are another picture's, so that a picture is believed more
than the prompt where it can be told: that is what lets an edit keep a part of it. Classifier-free guidance is
distilled into the guidance embedding. Then the model practises: it draws prompts in 4 to 20 steps, each drawing is
mended to what the prompt says (with the size that it has, where there are two), and at every step of the way it learns
the velocity that leads there. Outlines come next: from a noise level of {told} down, where a drawing can be told, what
it predicts goes through the decoder, and the loss is how far the pixels are from the right ones. The committed weights
are a running average, and after outlines the mean of those before and after. Last of all the decoder learns to make of
what the model draws the drawing that was meant, with edges as steep as the drawing's, mostly in windows of 64 pixels
that have an edge. Words that no sentence of the training uses have the embedding of one that means the same, or of one
that means nothing to a drawing.

They came about in several goes: first a narrower model (three heads of 48 channels) of a smaller world, with eight
colours, six shapes, two sizes and two objects at most; then, begun from that (`--world whole --begin FOLDER`), the
decoder and the encoders on all of it, the transformer widened to four heads, guidance, and practice. After that its
things were still too small for what it could outline, and it took hexagons for circles: the hourglass took the
hexagon's place, what has a place or stands in a row became larger, and it practised again (`--only practice`). One
picture in a hundred then went astray at a noise level of 0.9, where it believed what it saw more than the prompt: with
twelve colours that is too early, and so it practised once more, and after that for its outlines. They wavered all the
same as long as a thing could stand a few pixels from its place: since then centres are corners of the latents' cells
and radii are few, and it practised with that, learnt outlines, three times, the last on a GPU, and its decoder what it
draws, five times, only the last three of them with steep edges and the last two in windows. Outlines had made guidance
1 what the values above are, so that in the end it practised with drawings at 1 beside its own. From nothing, the
script trains 9,000 steps at 128², {last:,} at the nine canvases of that area that the size table's ratios come to,
practises for {practice:,} over all of them, learns outlines for {outlines:,} and finishes the decoder in {finish:,};
the committed weights were not made by that one command.

Parameters: {parameters}. Weights are stored in fp16. Licence: Apache-2.0, as the rest of the project.
"""


def table(first: str, rows: dict[str, dict[str, float]]) -> str:
    """Markdown: a line for each figure, a column for each entry."""
    names = list(next(iter(rows.values())))
    lines = [f"| {first} | {' | '.join(rows)} |", "| --- |" + " --- |" * len(rows)]
    lines += [f"| {name} | {' | '.join(f'{figures[name]:g}' for figures in rows.values())} |" for name in names]
    return "\n".join(lines)


def measured(results: dict[str, Any]) -> str:
    """The evaluation as Markdown: canvases always, the rest where it was measured."""
    parts = [
        table("canvas", results["canvases"]),
        f"{results['prompts']} prompts a canvas, as many of each kind, {results['steps']} steps. 'relation' means all "
        "objects right and where the prompt says; 'outline' is the mean overlap of a thing with the outline of its "
        "area and centre that fits it best.",
    ]
    if "one or two" in results:
        parts += [
            table("one object or two", results["one or two"]),
            f"{results['prompts']} prompts of each kind a canvas.",
        ]
    if "other words" in results:
        parts += [
            table("the same, in other words", results["other words"]),
            "With the names of the right column above (next to: left of), capitals, and words that mean nothing here.",
        ]
    if "by steps" in results:
        parts += [
            table(f"steps, at {next(iter(results['canvases']))}", results["by steps"]),
            "A fifth as many prompts.",
        ]
    for name in ("edits", "guidance", "softness"):
        if name in results:
            parts += [
                f"| {name} | |\n| --- | --- |\n" + "\n".join(f"| {k} | {v:g} |" for k, v in results[name].items())
            ]
    if "guidance" in results:
        parts += [
            "Adherence: percent with everything right, of the 50 prompts of 300 that failed most often at 1, over 8 "
            "seeds that had no part in choosing them. Variety: mean difference of a pixel, of 255, between 16 seeds."
        ]
    if "softness" in results:
        parts += [
            "Softness: pixels of an edge that are neither colour, by 15% at least, over the root of the thing's area; "
            "the mean of 150 single things."
        ]
    return "\n\n".join(parts)


def write(folder: Path, parameters: dict[str, int], psnr: dict[int, float], t5: int) -> None:
    """Writes `folder/README.md` from what was measured and what `record_training` has left there."""
    results: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    world = WORLDS[results["world"]]

    def also(names: Iterable[str]) -> str:
        return ", ".join(other for name in names for other in OTHER_NAMES.get(name, ()))

    (folder / "README.md").write_text(
        TEXT.format(
            most=("One object", "One object or two", "One to three objects")[world.most - 1],
            colours=", ".join(world.colours),
            shapes=", ".join(world.shapes),
            sizes=", ".join(world.sizes),
            backgrounds=", ".join(world.patterns),
            other_colours=also(world.colours),
            other_shapes=also(world.shapes),
            other_sizes=also(world.sizes),
            other_relations=also(RELATIONS),
            more=MORE if world.most > 2 else "",
            placed=" or at its place" if world.places else "",
            unread="" if world.words else ' ("on top of" is one that it does not yet understand)',
            relations=", ".join([*RELATIONS, *(ROWS if world.most > 2 else ())]),
            t5=t5,
            measured=measured(results),
            psnr=", ".join(f"{value:.1f} dB PSNR at {side}²" for side, value in psnr.items()),
            stages=known.read_text().strip() if (known := folder / TRAINING).is_file() else "- not recorded",
            untold=flow.UNTOLD,
            last=flow.PHASES[-1].steps,
            practice=practice.STEPS,
            told=outlines.TOLD,
            outlines=outlines.STEPS,
            finish=finish.STEPS,
            parameters=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in parameters.items()),
        )
    )


def record_training(folder: Path, log: Path) -> None:
    """Keeps the log's stages beside the weights, after those of earlier training: the log itself stays where it is."""
    if not log.is_file():
        return
    known = (folder / TRAINING).read_text().splitlines() if (folder / TRAINING).is_file() else []
    lines = {line.partition(":")[0]: line for line in (*known, *stages(log).splitlines())}
    (folder / TRAINING).write_text("\n".join(lines.values()) + "\n")


def stages(log: Path) -> str:
    """Steps and minutes of each stage, from the log that training appends to: a run that went on counts from zero."""
    steps: dict[str, int] = {}
    seconds: dict[str, float] = {}
    run: dict[str, float] = {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        stage = entry["stage"]
        steps[stage] = max(steps.get(stage, 0), entry["step"])
        before = run.get(stage, 0.0)
        more = entry["seconds"] - before if entry["seconds"] >= before else entry["seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + more
        run[stage] = entry["seconds"]

    def lasted(count: float) -> str:
        return f"{count / 60:.0f} minutes" if count >= 60 else "under a minute"

    return "\n".join(f"- {stage}: {steps[stage]:,} steps, {lasted(seconds[stage])}" for stage in steps)
