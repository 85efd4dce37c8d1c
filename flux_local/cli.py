"""The command line, and the place where the parts are put together. Heavy imports happen inside the commands."""

from __future__ import annotations

import argparse
import difflib
import getpass
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import flux_local
from flux_local import config
from flux_local.config import BOOLEAN, MEANT
from flux_local.errors import FluxError, StartError
from flux_local.model.checkpoint import TOKENIZERS
from flux_local.parameters import PARAMETERS, Parameter
from flux_local.weights import REPOSITORY

if TYPE_CHECKING:
    from rich.progress import TaskID


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = parser().parse_args(with_values(sys.argv[1:] if argv is None else argv))
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


def with_values(words: Sequence[str]) -> list[str]:
    """A flag of yes or no may stand alone and means yes; what follows is its value only if that says yes or no."""
    flags = {setting.flag for setting in config.describe() if setting.type is bool}
    flags |= {flag for parameter in PARAMETERS if parameter.kind == "boolean" for flag in flags_of(parameter)}
    found, left = list[str](), list(words)
    while left and left[0] != "--":
        word = left.pop(0)
        if word in flags:
            word += f"={MEANT[left.pop(0).lower()] if left and left[0].lower() in MEANT else 'true'}"
        found.append(word)
    return found + left


class Command(argparse.ArgumentParser):
    """Takes flags in full only: a shortened one may mean another, and print a secret as a file's name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know, where argparse leaves that to the root, which does not know the flags."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(self.refusal(unknown[0].partition("=")[0]))
        return found, unknown

    def refusal(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected word '{word}'. Put text with spaces in quotes."
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"there is no {word}." + (f" Did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: {message}{end} {self.prog} --help lists what it takes.\n")


def parser() -> argparse.ArgumentParser:
    root = Command(
        prog="flux-local", description="A local inference server for FLUX.1 Krea [dev], with the OpenAI Images API."
    )
    root.add_argument("--version", action="version", version=f"flux-local {flux_local.__version__}")
    commands = root.add_subparsers(title="commands", required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start the server")
    serve.set_defaults(run=run_serve)
    add_settings(serve)

    generate = commands.add_parser("generate", help="draw a picture without a server")
    generate.set_defaults(run=run_generate)
    generate.add_argument("prompt", help="what to draw")
    generate.add_argument("-o", "--output", default="out.png", metavar="FILE", help="file to write (default out.png)")
    settings = {setting.name: setting for setting in config.describe()}
    for name in PIPELINE_SETTINGS:
        add_setting(generate, settings[name])
    add_config_file(generate)
    for parameter in PARAMETERS:
        if parameter.name not in ONLY_SERVED:
            add_parameter(generate, parameter)

    download = commands.add_parser("download", help="get the real model from the hub, whole and checked")
    download.set_defaults(run=run_download)
    download.add_argument("repository", nargs="?", default=REPOSITORY, help=f"on the hub (default: {REPOSITORY})")
    download.add_argument("--to", metavar="FOLDER", help="default: weights/ and the model's name")
    download.add_argument("--revision", help="a branch, tag or commit of it (default: its newest)")
    download.add_argument("--only", choices=["tokenizers"], help="what a checkpoint of single files lacks")

    prepare = commands.add_parser("prepare", help="write the model's fp8 form once, so that starts need not make it")
    prepare.set_defaults(run=run_prepare)
    for name in ("model", "devices", "cache_dir"):
        add_setting(prepare, settings[name])
    add_config_file(prepare)

    bench = commands.add_parser("bench", help="measure a server's latency and pictures a second")
    bench.set_defaults(run=run_bench)
    bench.add_argument("--url", help="of a server that runs; its key is in FLUX_LOCAL_API_KEYS (default: start one)")
    bench.add_argument("--requests", type=at_least_one, default=32, help="requests measured for each row (default 32)")
    bench.add_argument("--concurrency", type=at_least_one, nargs="+", default=[1, 4, 16], metavar="CLIENTS",
                       help="a row for each: so many clients at once (default 1 4 16)")  # fmt: skip
    bench.add_argument("--prompt", default="a large red star on a blue background", metavar="STRING",
                       help="what to draw; each request has a number after it")  # fmt: skip
    bench.add_argument("--json", action="store_true", help="as one JSON document")
    for name in PIPELINE_SETTINGS:
        add_setting(bench, settings[name])
    add_config_file(bench)
    for parameter in PARAMETERS:
        if parameter.name not in ONLY_SERVED | NOT_MEASURED:
            add_parameter(bench, parameter)

    doctor = commands.add_parser("doctor", help="check everything that a start depends on")
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("--verify", action="store_true", help="read all weights and compare their hashes")
    doctor.add_argument("--json", action="store_true", help="as one JSON document")
    add_settings(doctor)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=run_version)
    return root


PIPELINE_SETTINGS = (
    "model", "devices", "precisions", "memory", "fp8_attention", "reference", "loras_dir", "cache_dir"
)  # fmt: skip
ONLY_SERVED = frozenset(
    {"prompt", "model", "response_format", "output_format", "sync_mode", "stream", "partial_images", "user", "style",
     "quality", "background", "moderation", "input_fidelity", "enable_safety_checker", "disable_safety_checker"}
)  # fmt: skip
"""No flags of `generate`: they speak of an answer over HTTP or of a server's policy, or have another form here."""
NOT_MEASURED = frozenset({"image", "mask", "strength", "output_compression", "output_quality"})
"""No flags of `bench`, which asks for plain pictures as PNG."""


def add_settings(command: argparse.ArgumentParser) -> None:
    for setting in config.describe():
        if not setting.secret:
            add_setting(command, setting)
    add_config_file(command)
    command.epilog = (
        f"API keys cannot be flags, which anyone on the machine can read: set {config.PREFIX}API_KEYS (separated by "
        "commas), or name a file with --api-keys-file."
    )


def add_config_file(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="TOML file with settings")


def add_setting(command: argparse.ArgumentParser, setting: config.Setting) -> None:
    shown = "" if setting.default in ("", None) else f" (default {setting.default})"
    command.add_argument(setting.flag, dest=setting.name, metavar=setting.metavar, default=None,
                         help=f"{setting.description}{shown} [{setting.variable}]".replace("%", "%%"))  # fmt: skip


def add_parameter(command: argparse.ArgumentParser, parameter: Parameter) -> None:
    default = "none" if parameter.kind == "file" else parameter.default_in_words()
    text = f"{parameter.description} ({parameter.values()}; default: {default})"
    metavar = BOOLEAN if parameter.kind == "boolean" else parameter.kind.split()[0].upper()
    command.add_argument(*flags_of(parameter), dest=parameter.name, metavar=metavar,
                         help=text.replace("%", "%%"))  # fmt: skip


def flags_of(parameter: Parameter) -> list[str]:
    return ["--" + name.replace("_", "-") for name in (parameter.name, *parameter.aliases)]


def settings_from(options: argparse.Namespace) -> config.Settings:
    names = {setting.name for setting in config.describe()}
    flags = {name: value for name, value in vars(options).items() if name in names and value is not None}
    return config.load(flags, file=options.config)


def at_least_one(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 up")
    return int(text)


def run_version(_: argparse.Namespace) -> int:
    print(f"flux-local {flux_local.__version__}")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    from dataclasses import asdict

    from flux_local.doctor import examine

    found = []
    for verdict in examine(settings, options.verify):
        found.append(verdict)
        if not options.json:
            print(f"{verdict.verdict:5} {verdict.name:18} {verdict.text}", flush=True)
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in found], indent=2))
    return 1 if any(verdict.verdict == "bad" for verdict in found) else 0


def run_download(options: argparse.Namespace) -> int:
    """Fetches and checks, with a bar for each file and one for all; asks for a token where one is needed."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from flux_local import download

    folder = Path(options.to or Path("weights") / options.repository.rpartition("/")[2]).expanduser()
    only = TOKENIZERS if options.only == "tokenizers" else ()
    token = None
    try:
        plan = download.plan(options.repository, options.revision, token, only)
    except download.Denied as denied:
        if download.default_token() or not sys.stdin.isatty():
            raise
        print(f"flux-local: {denied.message}", file=sys.stderr)
        token = getpass.getpass("Token (not shown): ").strip()
        plan = download.plan(options.repository, options.revision, token, only)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress:
        total = progress.add_task("all", total=plan.size)
        tasks: dict[str, TaskID] = {}

        def report(name: str, count: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=plan.files[name].size)
            progress.advance(tasks[name], count)
            progress.advance(total, count)

        download.fetch(plan, folder, token, report)
    print(f"{len(plan.files)} files, {plan.size / 1e9:.2f} GB, checked: {folder}")
    if plan.whole:
        print(f"Next: flux-local serve --model {folder}")
    return 0


def run_prepare(options: argparse.Namespace) -> int:
    """Writes the transformer's final fp8 form for the first device, with a bar over the weights that are read."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from flux_local import weights
    from flux_local.engine_process import pick_device
    from flux_local.model import loader, prepared

    settings = settings_from(options)
    path = weights.find(settings.model)
    weights.verify(path)
    checkpoint, device = weights.identify(path), pick_device(settings.one_device())
    began = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as bar:
        dtype = loader.dtype_of(device)
        total = checkpoint.parts["transformer"].parameters * dtype.itemsize
        task = bar.add_task(f"preparing {weights.info(path).name}", total=total)
        folder = prepared.write(
            settings.cache_folder(), checkpoint, loader.weights_of(checkpoint, device), dtype,
            lambda count: bar.advance(task, count),
        )  # fmt: skip
    seconds = time.monotonic() - began
    print(f"{total / 1e9:.2f} GB prepared in {seconds:.1f} s, {seconds / total * 1e9:.2f} s a GB: {folder}")
    print("A start that keeps the transformer in fp8 alone uses it: flux-local serve --memory fp8")
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Has a server that runs, or one of its own, draw at each concurrency; prints a table or JSON."""
    from rich.console import Console

    from flux_local import bench
    from flux_local.forms import from_form

    settings = settings_from(options)
    body = {"prompt": options.prompt} | from_form(parameters_of(options))
    flags = [f"{s.flag}={getattr(settings, s.name)}" for s in config.describe() if s.name in PIPELINE_SETTINGS]
    key = min(settings.keys(), default=None)
    result = bench.run(body, options.concurrency, options.requests, flags, options.url, key)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        server = result["server"]
        print(f"{server['model']} on {server['device']} ({', '.join(server['precisions'])}), {json.dumps(body)}")
        Console().print(bench.table(result["rows"]))
    return 0


def parameters_of(options: argparse.Namespace) -> dict[str, str]:
    """The parameters of a request among the flags, as text."""
    names = {parameter.name for parameter in PARAMETERS} - ONLY_SERVED
    return {name: text for name, text in vars(options).items() if name in names and text is not None}


def run_serve(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    config.check_open(settings)
    import asyncio

    from flux_local.messages import Ready
    from flux_local.server import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    began = time.monotonic()
    checker = settings.safety_folder()
    key = "-H 'Authorization: Bearer YOUR_KEY' " if settings.keys() else ""

    def announce(address: str, model: str, engine: Ready) -> None:
        print(
            f"""
flux-local {flux_local.__version__} serves {model} on {engine.device} ({", ".join(engine.precisions)}), \
ready after {time.monotonic() - began:.1f} s, {engine.weights_bytes / 1e9:.2f} GB loaded in {engine.load_seconds:.1f} s

  memory    {engine.memory}
  checker   {checker or "none: pictures are not looked at"}
  address   {address}/v1
  web page  {address}
  try       curl -s {address}/v1/images/generations {key}-H 'Content-Type: application/json' \
-d '{{"prompt": "a large red star on a blue background", "size": "512x512"}}'
""",
            flush=True,
        )

    print(f"flux-local {flux_local.__version__}: loading {settings.model} …", flush=True)
    asyncio.run(serve(settings, announce))
    return 0


def run_generate(options: argparse.Namespace) -> int:
    from flux_local import generate

    generate.run(parameters_of(options), options.prompt, Path(options.output), settings_from(options))
    return 0
