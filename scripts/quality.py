#!/usr/bin/env python3
"""What fp8 and step caching cost in quality, measured on the embedded model.

    scripts/quality.py --count 2000

The same prompts with the same seeds in every mode, against the model's own precision with all steps computed: the share
of prompts drawn right (with the 95% bound of the paired difference), PSNR, SSIM, the gradient-magnitude deviation
(GMSD: Xue et al. 2014, arXiv 1308.3052; 0 is equal, nothing to learn or download), and the error of the velocity along
one fixed trajectory. The row `other batch` draws the plain mode in other company: the noise floor of all the others.
Writes `quality.json` and a sheet of pictures side by side; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from mini.evaluate import Question, paint, questions  # noqa: E402
from mini.judge import judge  # noqa: E402

from flux_local import weights  # noqa: E402
from flux_local.errors import StartError  # noqa: E402
from flux_local.model.loader import Pipeline, load  # noqa: E402

Pixels = NDArray[np.float64]
SIDE = 128
SHOWN = 6


@dataclass(frozen=True)
class Mode:
    name: str
    go_fast: bool = False
    acceleration: str = "none"
    fp8_attention: bool = False


MODES = (
    Mode("plain"), Mode("other batch"), Mode("fp8", True), Mode("fp8, attention too", True, fp8_attention=True),
    Mode("regular", False, "regular"), Mode("high", False, "high"), Mode("fp8, regular", True, "regular"),
    Mode("fp8, high", True, "high"),
)  # fmt: skip


def psnr(a: Pixels, b: Pixels) -> float:
    """In dB, of 8-bit pictures; 100 for equal ones."""
    error = float(((a - b) ** 2).mean())
    return 100.0 if error == 0 else 10 * math.log10(255**2 / error)


def grey(a: Pixels) -> Pixels:
    luminance: Pixels = a @ np.array([0.299, 0.587, 0.114])
    return luminance


def boxed(a: Pixels, size: int) -> Pixels:
    """Means over size × size windows."""
    sums = np.pad(a, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    means: Pixels = (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size**2
    return means


def ssim(a: Pixels, b: Pixels, window: int = 7) -> float:
    """Mean structural similarity of the luminance (Wang et al. 2004), over square windows."""
    a, b = grey(a), grey(b)
    ma, mb = boxed(a, window), boxed(b, window)
    va, vb = boxed(a * a, window) - ma**2, boxed(b * b, window) - mb**2
    cov = boxed(a * b, window) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def gmsd(a: Pixels, b: Pixels) -> float:
    """Deviation of the similarity of gradient magnitudes (Prewitt, at half size), as in the paper."""

    def magnitude(x: Pixels) -> Pixels:
        x = boxed(grey(x), 2)[::2, ::2]
        rows = x[:-2] + x[1:-1] + x[2:]
        columns = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
        dx, dy = (rows[:, 2:] - rows[:, :-2]) / 3, (columns[2:] - columns[:-2]) / 3
        found: Pixels = np.sqrt(dx**2 + dy**2)
        return found

    ga, gb, c = magnitude(a), magnitude(b), 170.0
    return float(((2 * ga * gb + c) / (ga**2 + gb**2 + c)).std())


def right(question: Question, picture: Image.Image) -> bool:
    """Whether everything that the prompt asks for is there."""
    return judge(picture, question.scene, question.mentions_size).perfect


def bound(differences: list[int]) -> float:
    """Half the width of the 95% interval of a mean of paired differences, in percentage points."""
    return 100 * 1.96 * statistics.pstdev(differences) / math.sqrt(len(differences))


def velocity_error(pipeline: Pipeline, steps: int, seeds: int = 8) -> dict[str, float]:
    """‖v − v'‖ / ‖v‖ of fp8 at each step of the plain trajectory: the mean, and the worst step's."""
    plain, fast = pipeline.denoiser, pipeline.denoiser_for(True)
    errors: list[list[float]] = []
    for seed in range(seeds):
        prompt = pipeline.text.encode(questions(seeds, 1, SIDE, SIDE)[seed].prompt)
        picture = pipeline.begin(prompt, SIDE, SIDE, seed=seed, steps=steps, guidance=4.5)
        row = []
        while picture.steps_left:
            other = fast.velocity([picture])
            plain.advance([picture])
            assert picture.velocity is not None
            row.append(float((other - picture.velocity).norm() / picture.velocity.norm()))
        errors.append(row)
    by_step = [statistics.mean(column) for column in zip(*errors, strict=True)]
    return {"mean": statistics.mean(by_step), "worst_step": max(by_step)}


def measure(
    pipelines: dict[bool, Pipeline], model: Any, steps: int, count: int
) -> tuple[dict[str, Any], list[list[Image.Image]]]:
    """Figures by mode, and the first pictures of each. `pipelines`: without and with attention in fp8."""
    asked = questions(count // 2, 1, SIDE, SIDE, seed=3) + questions(count - count // 2, 2, SIDE, SIDE, seed=3)
    prompts = [q.prompt for q in asked]
    plain: list[Image.Image] = []
    plainly: list[bool] = []
    found: dict[str, Any] = {}
    shown = []
    with Progress() as bar:
        for mode in MODES:
            if mode.fp8_attention not in pipelines:
                continue
            pipeline = pipelines[mode.fp8_attention]
            task = bar.add_task(mode.name, total=count)
            computed = () if mode.acceleration == "none" else model.masks(mode.acceleration, steps)
            if mode.name == "other batch":
                pictures = [
                    next(paint(pipeline, [prompt], SIDE, SIDE, steps, seed=i)) for i, prompt in enumerate(prompts[:64])
                ]
            else:
                pictures = []
                for picture in paint(pipeline, prompts, SIDE, SIDE, steps, go_fast=mode.go_fast, computed=computed):
                    pictures.append(picture)
                    bar.advance(task)
            plain = plain or pictures
            shown.append(pictures[:SHOWN])
            good = [right(q, p) for q, p in zip(asked, pictures, strict=False)]
            plainly = plainly or good
            differences = [int(g) - int(p) for g, p in zip(good, plainly, strict=False)]
            pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(plain, pictures, strict=False)]
            found[mode.name] = {
                "pictures": len(pictures),
                "computed": sum(computed) if computed else steps,
                "right": 100 * statistics.mean(good),
                "against_plain": 100 * statistics.mean(differences),
                "bound": bound(differences),
                "psnr": statistics.mean(psnr(a, b) for a, b in pairs),
                "ssim": statistics.mean(ssim(a, b) for a, b in pairs),
                "gmsd": statistics.mean(gmsd(a, b) for a, b in pairs),
            }
            bar.update(task, completed=count)
    return found, shown


def sheet(path: Path, names: list[str], rows: list[list[Image.Image]]) -> None:
    """A row of pictures for each mode."""
    label = 110
    page = Image.new("RGB", (label + SHOWN * (SIDE + 4), len(rows) * (SIDE + 4)), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        pen.text((6, y * (SIDE + 4) + SIDE // 2), name, fill="black")
        for x, picture in enumerate(pictures):
            page.paste(picture, (label + x * (SIDE + 4), y * (SIDE + 4)))
    page.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux-krea-mini")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=500, help="prompts (default 500)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    options = parser.parse_args()
    folder = weights.find(options.model)
    model = weights.info(folder)
    steps = options.steps or model.default_steps
    pipeline = load(folder, options.device)
    pipelines = {False: pipeline}
    try:
        pipelines[True] = load(folder, options.device, fp8_attention=True)
    except StartError as error:
        print(f"The row of fp8 attention is left out: {error}", file=sys.stderr)
    modes, shown = measure(pipelines, model, steps, options.count)
    document = {
        "model": model.name, "steps": steps, "prompts": options.count, "precisions": pipeline.precisions,
        "velocity_error_fp8": velocity_error(pipeline, steps), "modes": modes,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quality.json").write_text(json.dumps(document, indent=2) + "\n")
    sheet(options.out / "quality.png", list(modes), shown)
    table = Table("mode", "computed", "right", "against plain", "PSNR", "SSIM", "GMSD")
    for name, row in modes.items():
        table.add_row(
            name, f"{row['computed']}/{steps}", f"{row['right']:.1f}%",
            f"{row['against_plain']:+.1f} ± {row['bound']:.1f}", f"{row['psnr']:.1f} dB", f"{row['ssim']:.4f}",
            f"{row['gmsd']:.4f}",
        )  # fmt: skip
    Console().print(table)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
