#!/usr/bin/env python3
"""Trains the embedded model from drawings that it makes itself, and measures it.

    scripts/train_mini.py                     train (or go on training) and write weights/flux-krea-mini
    scripts/train_mini.py --evaluate          measure the model in weights/flux-krea-mini
    scripts/train_mini.py --scale 0.01        all stages in a minute, to try the script out
    scripts/train_mini.py --device cuda --batch 512 --workers 12        on a GPU

A run goes on from the checkpoints in --work; the same seed gives the same data in the same order. There, as it goes,
are losses.png (with matplotlib, the extra `train`) and a sheet of samples every 1,000 steps of the transformer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

STEPS = 8  # the default number, by what was measured
VAE_STEPS = 2000
CANVASES = ["192x192", "256x144", "144x256", "128x128", "176x96", "96x176"]
STEP_COUNTS = (4, 6, 8, 12, 28)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "weights" / "flux-krea-mini", help="the model folder")
    p.add_argument("--work", type=Path, default=ROOT / ".train", help="checkpoints and the log (default .train)")
    p.add_argument(
        "--world", choices=("first", "whole"), default="whole", help="what it learns to draw (default whole)"
    )
    p.add_argument("--begin", type=Path, metavar="FOLDER", help="go on from a model folder's weights")
    p.add_argument("--known", action="store_true", help="its autoencoder and text encoders stay; only other canvases")
    p.add_argument("--only", choices=("practice", "outlines", "finish"), help="one of the last stages alone")
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--batch", type=int, default=48, help="pictures a step of the transformer (default 48; 512 on a GPU)"
    )
    p.add_argument("--workers", type=int, default=0, help="processes that draw (default 0: this one; a GPU wants 12)")
    p.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps (default 1)")
    p.add_argument("--eager", action="store_true", help="without torch.compile: slower, but starts at once")
    p.add_argument(
        "--export",
        action="store_true",
        help="write the folder from the latest checkpoints' running average, as it is, and stop",
    )
    p.add_argument("--evaluate", action="store_true", help="measure the folder and stop")
    p.add_argument("--count", type=int, default=500, help="prompts to evaluate with (default 500)")
    p.add_argument("--canvases", nargs="+", default=CANVASES, metavar="WxH", help="canvases to evaluate at")
    p.add_argument("--steps", type=int, default=STEPS, help="denoising steps to evaluate at")
    p.add_argument("--brief", action="store_true", help="evaluate without edits, guidance and numbers of steps")
    return p


def train(options: argparse.Namespace) -> None:
    """All stages, then the folder. With --export, the averaged weights as they stand."""
    import copy

    import torch
    from diffusers import AutoencoderKL
    from mini import finish, flow, guidance, outlines, practice, text, vae
    from mini.drawings import WORLDS
    from mini.evaluate import sheet
    from mini.run import Run

    from flux_local.model.loader import load

    if importlib.util.find_spec("matplotlib") is None:
        print("No losses.png without matplotlib: pip install matplotlib", file=sys.stderr)

    def look(painter: flow.Painter, step: int, name: str = "samples") -> None:
        folder = run.work / "model"
        export(folder, *copy.deepcopy((autoencoder, painter)))
        sheet(load(folder, "cpu"), run.work / f"{name}-{step:06}.png", options.steps, world=run.world)

    device, world = torch.device(options.device), WORLDS[options.world]
    run = Run(options.work, options.seed, device, world, options.batch, options.workers)
    if options.known or options.only:
        autoencoder = AutoencoderKL.from_pretrained(options.begin / "vae", torch_dtype=torch.float32)
    else:
        autoencoder = vae.train(run, max(1, round(VAE_STEPS * options.scale)), options.begin)
    if options.only:
        painter = flow.kept(options.begin, run.seed)
    if options.export:
        if options.only != "finish":
            painter = flow.latest(run, painter if options.only else flow.Painter(run.seed))
        finish.latest(run, autoencoder)
    else:
        how = {"scale": options.scale, "compiled": not options.eager}
        if not options.only:
            painter = flow.train(run, autoencoder, **how, look=look, begin=options.begin, known=options.known)
            painter = guidance.train(run, painter, autoencoder, **how)
        for name, stage in (("practice", practice), ("outlines", outlines), ("finish", finish)):
            if options.only in (None, name) and not (options.known and stage is finish):
                painter = stage.train(run, painter, autoencoder, **how, look=partial(look, name=name))
    if not options.only:  # which leaves the text encoders as they are
        text.lend_words(
            run.world,
            run.seed,
            (painter.tokenizer, painter.text_encoder),
            (painter.tokenizer_2, painter.text_encoder_2),
        )
    export(options.out, autoencoder, painter)
    print(f"wrote {options.out}")


def export(out: Path, autoencoder: Any, painter: Any) -> None:
    """The diffusers folder in fp16, and the small file with what the server should know of the model."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from mini import flow
    from mini.text import T5_LENGTH

    from flux_local import weights
    from flux_local.params import ModelInfo

    few, many = flow.SHIFTS
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_image_seq_len=few, base_shift=flow.SHIFTS[few],
        max_image_seq_len=many, max_shift=flow.SHIFTS[many],
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder.to(memory_format=torch.contiguous_format),
        text_encoder=painter.text_encoder,
        tokenizer=painter.tokenizer,
        text_encoder_2=painter.text_encoder_2,
        tokenizer_2=painter.tokenizer_2,
        transformer=painter.transformer,
    )
    for tokenizer in (painter.tokenizer, painter.tokenizer_2):  # how it was called last is none of a model's
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.no_truncation()
    pipeline.to("cpu", torch.float16).save_pretrained(out)
    for path in out.glob("*/config.json"):  # nor where it was begun from
        config = {name: value for name, value in json.loads(path.read_text()).items() if name != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    model = ModelInfo(out.name, flow.CANVAS, STEPS, flow.GUIDANCE, text_length=T5_LENGTH)
    (out / weights.INFO).write_text(json.dumps(weights.described(model), indent=2) + "\n")


def evaluate(options: argparse.Namespace) -> None:
    """Prints what the model can do; writes it, a sheet of samples and the model card beside the weights."""
    import torch
    from diffusers import AutoencoderKL
    from mini import abilities, card, flow, vae
    from mini.drawings import WORLDS
    from mini.evaluate import evaluate as measure
    from mini.evaluate import sheet
    from rich.progress import Progress

    from flux_local.model.loader import load
    from flux_local.sizes import canvas_for, table_size

    pipeline = load(options.out, options.device)
    world = WORLDS[options.world]

    def measured(
        canvas: str, steps: int, count: int, words: bool = False, only: Collection[str] = ()
    ) -> dict[str, float]:
        width, height = (int(side) for side in canvas.split("x"))
        with Progress() as bar:
            task = bar.add_task(canvas, total=count)
            advance = partial(bar.advance, task, advance=1)
            figures = measure(pipeline, width, height, steps, count, advance, world, words, only)
        print(f"{canvas}, {steps} steps: {figures}", flush=True)
        return figures

    record: dict[str, Any] = {"world": world.name, "prompts": options.count, "steps": options.steps}
    record["canvases"] = {canvas: measured(canvas, options.steps, options.count) for canvas in options.canvases}
    if not options.brief:
        record["one or two"] = {
            canvas: measured(canvas, options.steps, 2 * options.count, only=("one", "two"))
            for canvas in options.canvases[:3]
        }
        record["by steps"] = {str(n): measured(options.canvases[0], n, options.count // 5) for n in STEP_COUNTS}
        if not world.words:
            record["other words"] = {
                canvas: measured(canvas, options.steps, options.count, words=True) for canvas in options.canvases[:1]
            }
        side, _ = canvas_for(table_size("1:1", "1K"), flow.CANVAS)
        record["edits"] = abilities.edits(pipeline, side, options.steps, world)
        record["guidance"] = abilities.guidance(pipeline, side, options.steps, world)
        record["softness"] = abilities.softness(pipeline, side, options.steps, world)
        print(record["edits"], record["guidance"], record["softness"], sep="\n")
    (options.out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    sheet(pipeline, options.out / "samples.png", options.steps, side=192, world=world)
    parts = {"transformer": "transformer", "autoencoder": "vae", "T5": "text_encoder_2", "CLIP": "text_encoder"}
    counts = {name: parameters(options.out / folder) for name, folder in parts.items()}
    autoencoder = AutoencoderKL.from_pretrained(options.out / "vae", torch_dtype=torch.float32).to(options.device)
    quality = {side: vae.psnr(autoencoder, torch.device(options.device), side, world) for side in (128, 192)}
    card.record_training(options.out, options.work / "log.jsonl")
    card.write(options.out, counts, quality, pipeline.text.max_length)


def parameters(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold."""
    import math

    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def main() -> None:
    options = parser().parse_args()
    if (options.only or options.known) and not options.begin:
        parser().error("--only and --known go on from a model: say which with --begin FOLDER.")
    if options.evaluate:
        evaluate(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
