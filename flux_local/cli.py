"""The command line, and the place where the parts are put together. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import flux_local
from flux_local import config, params
from flux_local.errors import FluxError, StartError


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        return int(options.run(options))
    except StartError as error:
        print(f"flux-local: {error.message}", file=sys.stderr)
        return error.exit_code
    except FluxError as error:
        print(f"flux-local: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="flux-local", description="A local inference server for FLUX.1 Krea [dev], with the OpenAI Images API."
    )
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the server")
    serve.set_defaults(run=run_serve)
    add_settings(serve)

    generate = commands.add_parser("generate", help="draw a picture without a server")
    generate.set_defaults(run=run_generate)
    generate.add_argument("prompt", help="what to draw")
    generate.add_argument("-o", "--output", default="out.png", metavar="FILE", help="file to write (default out.png)")
    settings = {setting.name: setting for setting in config.describe()}
    for name in ("model", "device"):
        add_setting(generate, settings[name])
    add_config_file(generate)
    for parameter in params.PARAMETERS:
        if parameter.name in GENERATE_FLAGS:
            add_parameter(generate, parameter)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=run_version)
    return root


GENERATE_FLAGS = frozenset(
    {"seed", "size", "aspect_ratio", "resolution", "cfg_scale", "num_inference_steps", "n", "output_quality"}
)


def add_settings(command: argparse.ArgumentParser) -> None:
    for setting in config.describe():
        if not setting.secret:
            add_setting(command, setting)
    add_config_file(command)


def add_config_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="TOML file with settings")


def add_setting(command: argparse.ArgumentParser, setting: config.Setting) -> None:
    shown = "" if setting.default in ("", None) else f" (default {setting.default})"
    command.add_argument(setting.flag, dest=setting.name, metavar="VALUE", default=None,
                         help=f"{setting.description}{shown} [{setting.variable}]".replace("%", "%%"))  # fmt: skip


def add_parameter(command: argparse.ArgumentParser, parameter: params.Parameter) -> None:
    kind: Any = {"integer": int, "number": float}.get(parameter.kind, str)
    flags = ["--" + name.replace("_", "-") for name in (parameter.name, *parameter.aliases)]
    command.add_argument(*flags, dest=parameter.name, type=kind, metavar=parameter.kind.split()[0].upper(),
                         help=f"{parameter.description} Default: {parameter.default}.".replace("%", "%%"))  # fmt: skip


def settings_from(options: argparse.Namespace) -> config.Settings:
    names = {setting.name for setting in config.describe()}
    flags = {name: value for name, value in vars(options).items() if name in names and value is not None}
    return config.load(flags, file=options.config)


def run_version(_: argparse.Namespace) -> int:
    print(f"flux-local {flux_local.__version__}")
    return 0


def run_serve(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    import asyncio

    from flux_local.messages import Ready
    from flux_local.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    began = time.monotonic()

    def announce(address: str, model: str, engine: Ready) -> None:
        print(
            f"""
flux-local {flux_local.__version__} serves {model} on {engine.device} ({engine.precision}), \
ready after {time.monotonic() - began:.1f} s

  address   {address}/v1
  try       curl -s {address}/v1/images/generations -H 'Content-Type: application/json' \
-d '{{"prompt": "a large red star on a blue background", "size": "512x512"}}'
""",
            flush=True,
        )

    print(f"flux-local {flux_local.__version__}: loading {settings.model} …", flush=True)
    asyncio.run(serve(settings, announce))
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """Draws in this process, with a bar for the steps; writes the file and prints seed and time."""
    from flux_local import weights

    settings = settings_from(options)
    folder = weights.find(settings.model)
    model = weights.info(folder)
    output = Path(options.output)
    raw = {name: getattr(options, name) for name in GENERATE_FLAGS}
    raw |= {"prompt": options.prompt, "output_format": output.suffix.lstrip(".").lower() or "png"}
    checked = params.generation_params(raw, model)

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from flux_local.engine import pick_device
    from flux_local.images import delivered, encode, parameters_text
    from flux_local.model.loader import load

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        loading = bar.add_task(f"loading {model.name}", total=None)
        pipeline = load(folder, pick_device(settings.device))
        bar.remove_task(loading)
        prompt = pipeline.text.encode(checked.prompt)
        for index, seed in enumerate(checked.seeds):
            began = time.monotonic()
            picture = pipeline.begin(prompt, *checked.canvas, seed=seed, steps=checked.steps, guidance=checked.guidance)
            for _ in bar.track(range(checked.steps), description=f"seed {seed}"):
                pipeline.denoiser.advance([picture])
            pixels = pipeline.vae.decode(picture.latents, *checked.canvas)
            file = output if index == 0 else output.with_stem(f"{output.stem}-{index}")
            text = parameters_text(checked, seed, model.name)
            file.write_bytes(encode(delivered(pixels, checked.canvas, checked.delivered), checked, text))
            bar.console.print(
                f"{file}  {checked.delivered}  seed {seed}  {time.monotonic() - began:.2f} s", highlight=False
            )
    return 0
