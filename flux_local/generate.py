"""`flux-local generate`: pictures without a server, by the functions that a server draws with. Knows no HTTP."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from flux_local import loras, weights
from flux_local.config import Settings
from flux_local.decoder import Purpose, decode_own
from flux_local.errors import GenerationInvalid, InvalidImage, MissingParameter, SettingsError, StartError
from flux_local.forms import from_form
from flux_local.params import ModelInfo, generation_params
from flux_local.plan import Plan, Source, precision_of
from flux_local.sizes import Size

if TYPE_CHECKING:
    from rich.progress import Progress

    from flux_local.model.loader import Pipeline


def run(given: dict[str, str], prompt: str, output: Path, settings: Settings) -> None:
    """Draws in this process, with a bar for the steps; writes the files and prints seeds and times.

    Args:
        given: a request's parameters by name, as text.

    Raises:
        What `plan_of` and loading raise. SettingsError: the file cannot be written, or what is drawn is to be checked,
            which servers alone do. StartError: the device has no room for the picture. GenerationInvalid: it has values
            that are no numbers.
    """
    folder = weights.find(settings.model)
    weights.verify(folder)
    model = weights.info(folder)
    if not output.parent.is_dir():
        raise SettingsError(f"There is no folder {output.parent}. Make it, or give another place with --output.")
    if settings.safety_checker == "on":
        raise SettingsError(
            "The safety checker is to be on, and `generate` has none. Draw through `flux-local serve`, or set "
            "FLUX_LOCAL_SAFETY_CHECKER to off for this command."
        )
    plan = plan_of(given, prompt, output, model, settings)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from flux_local.engine_process import pick_device
    from flux_local.model.loader import load

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        loading = bar.add_task(f"loading {model.name}", total=None)
        pipeline = load(
            weights.identify(folder), pick_device(settings.one_device()), settings.precisions, settings.reference,
            settings.tier(), model.canvas.max_area, settings.cache_folder(), settings.fp8_attention,
            text_length=model.text_length,
        )  # fmt: skip
        bar.remove_task(loading)
        if "go_fast" not in given:
            plan = replace(plan, params=replace(plan.params, go_fast=settings.fast_by_default(pipeline.precisions)))
        precision_of(plan.params, pipeline.precisions)
        for index, seed in enumerate(plan.params.seeds):
            began = time.monotonic()
            pixels = None if plan.untouched else drawn(pipeline, plan, index, bar)
            file = output if index == 0 else output.with_stem(f"{output.stem}-{index}")
            try:
                file.write_bytes(plan.file(index, pixels))
            except OSError as error:
                raise SettingsError(
                    f"Cannot write {file}: {error.strerror}. Give another place with --output."
                ) from error
            bar.console.print(
                f"{file}  {plan.params.delivered}  seed {seed}  {time.monotonic() - began:.2f} s", highlight=False
            )


def drawn(pipeline: Pipeline, plan: Plan, index: int, bar: Progress) -> bytes:
    """RGB rows of the canvas of picture `index`."""
    from flux_local.drawing import begin_picture
    from flux_local.model import memory
    from flux_local.model.parts import NO_ROOM

    try:
        picture = begin_picture(pipeline, plan.job(str(index), index), pipeline.text.encode)
        for _ in bar.track(range(picture.steps_left), description=f"seed {plan.params.seeds[index]}"):
            pipeline.denoiser_for(plan.params.go_fast).advance([picture])
        return pipeline.vae.decode(picture.latents, picture.width, picture.height)
    except ArithmeticError as error:
        raise GenerationInvalid("The model produced no valid picture. Try without --go-fast.") from error
    except Exception as error:
        if memory.is_exhausted(error):
            raise StartError(NO_ROOM) from error
        raise


def plan_of(given: dict[str, str], prompt: str, output: Path, model: ModelInfo, settings: Settings) -> Plan:
    """What is asked for.

    Raises:
        RequestError: a value or a file that will not do.
    """
    source = source_of(given.get("image"), given.get("mask"))
    raw = from_form({name: text for name, text in given.items() if name not in ("image", "mask")})
    raw |= {"prompt": prompt, "output_format": output.suffix.lstrip(".").lower() or "png"}
    checked = generation_params(
        raw,
        model,
        route="edits" if source else "generations",
        image=Size(*source.image.size) if source else None,
        go_fast=settings.fast_by_default(),
        max_pixels=settings.max_pixels,
    )
    for name in checked.ignored:
        print(f"flux-local: --{name.replace('_', '-')} changes nothing here", file=sys.stderr)
    adapters = loras.find(settings.loras_folder(), checked.loras)
    return Plan(checked, source, model.name, settings.png_metadata, adapters)


def source_of(image: str | None, mask: str | None) -> Source | None:
    """The picture to start from, and where to repaint it.

    Raises:
        MissingParameter: a mask without an image. InvalidImage: a file that is not there or cannot be read.
    """
    if image is None:
        if mask is not None:
            raise MissingParameter("--mask needs --image, the picture to repaint.", param="image")
        return None

    def read(path: str, purpose: Purpose) -> tuple[int, int, bytes]:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidImage(f"Cannot read {path}: {error.strerror}.", param=purpose) from error
        return decode_own(data, purpose)

    return Source.of(read(image, "image"), None if mask is None else read(mask, "mask"))
