"""Every setting of the server, once: its name, type, default and meaning.

Flags, environment variables (`FLUX_LOCAL_` and the name in capitals) and the keys of a TOML file are derived from
`Settings`; flags win over the environment, the environment over the file. Secrets have no flag.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from flux_local.errors import SettingsError, WeightsError
from flux_local.sizes import MAX_PIXELS

PREFIX = "FLUX_LOCAL_"
NOT_SETTINGS = frozenset({"FLUX_LOCAL_FAULTS"})
SECRET = {"secret": True}
BOOLEAN = "{true,false}"
"""A value of yes or no, in a command's help."""
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
MEANT = dict.fromkeys(YES, "true") | dict.fromkeys(NO, "false")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Checked settings. Build with `load`."""

    host: Annotated[str, Meta(description="Address to listen on. Anything but loopback wants API keys.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 takes a free one.")] = 8000
    model: Annotated[str, Meta(description="A model folder, or the name of one under weights/.")] = "flux-krea-mini"
    devices: Annotated[
        str,
        Meta(
            description="'auto' (the first GPU, else the CPU), 'cpu', a GPU such as 'cuda:0', or several by commas: "
            "an engine runs on each."
        ),
    ] = "auto"
    cluster: Annotated[
        str,
        Meta(
            description="A Ray cluster whose machines run the engines: 'auto' for the one that this machine is a part "
            "of, or its address. --devices then says how many, as cuda,cuda; 'auto' is every GPU in it."
        ),
    ] = ""
    reference: Annotated[
        bool, Meta(description="Run diffusers' own transformer instead of flux-local's: slower, for comparison.")
    ] = False
    precisions: Annotated[
        Literal["both", "full", "fp8"],
        Meta(description="What to load: the model's own precision (bf16, on a CPU fp32), fp8, or both if they fit."),
    ] = "both"
    memory: Annotated[
        Literal["auto", "both", "full", "fp8", "swap", "offload"],
        Meta(description="How the device's memory is used; 'auto' takes the fastest way that fits."),
    ] = "auto"
    go_fast: Annotated[bool, Meta(description="Draw in fp8 when the request does not say.")] = False
    fp8_attention: Annotated[
        bool,
        Meta(description="Attention in fp8 too. A GPU needs a library for it, or the server does not start."),
    ] = False
    safety_checker: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="Check every picture; 'auto': if the checker's weights are there."),
    ] = "auto"
    safety_model: Annotated[str, Meta(description="Folder of the checker, an image classifier.")] = "weights/safety"
    safety_labels: Annotated[
        str, Meta(description="Labels of the classifier, separated by commas, whose pictures are left out.")
    ] = "nsfw,unsafe,porn,hentai,nude,explicit"
    safety_threshold: Annotated[
        float,
        Meta(gt=0, le=1, description="A picture is left out if those labels' probabilities add up to this or more."),
    ] = 0.5
    safety_optional: Annotated[bool, Meta(description="Whether a request may turn the checker off.")] = False
    cache_dir: Annotated[str, Meta(description="Folder for what `flux-local prepare` makes.")] = "~/.cache/flux-local"
    loras_dir: Annotated[str, Meta(description="Folder of LoRA adapters that requests may name.")] = "weights/loras"
    data_dir: Annotated[str, Meta(description="Folder for pictures behind URLs and the history of requests.")] = (
        "~/.local/share/flux-local"
    )
    public_url: Annotated[str, Meta(description="Base of the URLs in answers, if clients see another address.")] = ""
    response_format: Annotated[
        Literal["url", "b64_json"], Meta(description="What an answer holds when the request does not say.")
    ] = "url"
    url_lifetime: Annotated[
        int, Meta(ge=60, description="Seconds for which a picture's URL and its request in the history are kept.")
    ] = 86_400
    max_pixels: Annotated[int, Meta(ge=256, description="Largest picture delivered, in pixels.")] = MAX_PIXELS
    max_waiting: Annotated[
        int, Meta(ge=1, description="Pictures accepted and not finished; more are refused with 429.")
    ] = 256
    max_wait: Annotated[
        float,
        Meta(
            gt=0, description="Seconds of work accepted and not finished, by measured speed; more is refused with 429."
        ),
    ] = 600.0
    key_share: Annotated[
        float,
        Meta(
            gt=0,
            le=1,
            description="Share of --max-waiting and --max-wait that one API key may hold, where there are several.",
        ),
    ] = 0.5
    request_timeout: Annotated[float, Meta(gt=0, description="Seconds after which a request is given up.")] = 1800.0
    engine_timeout: Annotated[
        float, Meta(gt=0, description="Seconds that a step or a decoding may take before the engine counts as hung.")
    ] = 60.0
    engine_falls: Annotated[
        int,
        Meta(
            ge=1,
            description="Crashes or hangs within --engine-window, and no picture between, that end an engine for good.",
        ),
    ] = 5
    engine_window: Annotated[float, Meta(gt=0, description="Seconds within which --engine-falls are counted.")] = 600.0
    png_metadata: Annotated[bool, Meta(description="Write prompt and parameters into PNG files.")] = True
    allow_anonymous: Annotated[
        bool, Meta(description="Listen beyond loopback without API keys: anyone who can connect can generate.")
    ] = False
    cors_origins: Annotated[
        str, Meta(description="Web pages that may call from a browser: origins like https://example.org, by commas.")
    ] = ""
    api_keys_file: Annotated[str, Meta(description="File with one API key a line.")] = ""
    api_keys: Annotated[str, Meta(description="API keys, separated by commas.", extra=SECRET)] = ""

    def device_list(self) -> list[str]:
        return [name.strip() for name in self.devices.split(",") if name.strip()] or ["auto"]

    def one_device(self) -> str:
        """For a command that draws by itself.

        Raises:
            SettingsError: several are named.
        """
        if len(found := self.device_list()) > 1:
            raise SettingsError("This command uses one device. Name one of them with --devices.")
        return found[0]

    def cache_folder(self) -> Path:
        return Path(self.cache_dir).expanduser()

    def loras_folder(self) -> Path:
        return folder_at(self.loras_dir)

    def tier(self) -> Literal["both", "full", "fp8", "swap", "offload"] | None:
        """How memory is to be used; None for the best way that fits."""
        return None if self.memory == "auto" else self.memory

    def safety_folder(self) -> Path | None:
        """Where the safety checker is, or None for a server without.

        Raises:
            WeightsError: it is to be on, and is not there.
        """
        folder = folder_at(self.safety_model)
        is_there = (folder / "config.json").is_file()
        if self.safety_checker == "on" and not is_there:
            raise WeightsError(
                f"The safety checker is to be on, but {folder} holds no classifier. Put one there, name its folder "
                "with --safety-model, or set --safety-checker off."
            )
        return folder if is_there and self.safety_checker != "off" else None

    def engine_options(self) -> list[str]:
        """What an engine program has to be told."""
        options = [
            "--cache",
            str(self.cache_folder()),
            "--precisions",
            self.precisions,
            "--beside",
            ",".join(self.device_list()),
            *(["--reference"] if self.reference else []),
            *(["--fp8-attention"] if self.fp8_attention else []),
            *(["--adapters"] if any(self.loras_folder().glob("*.safetensors")) else []),
        ]
        if (tier := self.tier()) is not None:
            options += ["--memory", tier]
        if (folder := self.safety_folder()) is not None:
            options += ["--safety", str(folder), "--safety-labels", self.safety_labels]
            options += ["--safety-threshold", str(self.safety_threshold)]
        return options

    def fast_by_default(self, loaded: Sequence[str] = ()) -> bool:
        """What `go_fast` is where a request does not say, by what is loaded, or as far as the settings tell."""
        if not loaded:
            plain = self.reference or self.precisions == "full" or self.memory in ("full", "offload")
            alone = self.precisions == "fp8" or self.memory in ("fp8", "swap")
            loaded = ("bf16",) if plain else ("fp8",) if alone else ("bf16", "fp8")
        return loaded[0] == "fp8" or ("fp8" in loaded and self.go_fast)

    def origins(self) -> list[str]:
        """The origins that browsers may call from.

        Raises:
            SettingsError: one that is no origin; `*` is none.
        """
        found = [origin.strip().lower() for origin in self.cors_origins.split(",") if origin.strip()]
        for origin in found:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[\w.\-\[\]:]+", origin, re.ASCII):
                raise SettingsError("cors_origins must be origins like https://example.org, separated by commas.")
        return found

    def public_name(self) -> str | None:
        """The host in `public_url`.

        Raises:
            SettingsError: there is an address, and no host in it.
        """
        if not self.public_url:
            return None
        with contextlib.suppress(ValueError):
            parts = urlsplit(self.public_url)
            if parts.scheme in ("http", "https") and parts.hostname:
                return parts.hostname
        raise SettingsError("public_url must be an address like https://images.example.org or http://host:8000/flux.")

    def keys(self) -> frozenset[str]:
        """All API keys, from both places.

        Raises:
            SettingsError: the keys file cannot be read or is empty.
        """
        found = {key.strip() for key in self.api_keys.split(",")}
        if self.api_keys_file:
            try:
                lines = {line.strip() for line in Path(self.api_keys_file).expanduser().read_text().splitlines()}
            except (OSError, ValueError) as error:
                raise SettingsError(f"Cannot read the API keys file: {error}.") from error
            if not lines - {""}:
                raise SettingsError("The API keys file holds no key. Put one key on a line, or unset api_keys_file.")
            found |= lines
        return frozenset(found - {""})


def folder_at(path: str) -> Path:
    """A folder from the working directory, or else, if it is there, from the package's checkout."""
    here, beside = Path(path).expanduser(), Path(__file__).resolve().parent.parent / path
    return beside if beside.is_dir() and not here.exists() else here


class Setting(typing.NamedTuple):
    """One field of `Settings`, for whoever derives something from it."""

    name: str
    type: Any
    default: Any
    description: str
    secret: bool

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What stands for its value in a command's help."""
        if self.type is bool:
            return BOOLEAN
        return "{" + ",".join(typing.get_args(self.type)) + "}" if typing.get_origin(self.type) is Literal else "VALUE"

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()


def describe() -> list[Setting]:
    """All settings, in order."""
    hints = typing.get_type_hints(Settings, include_extras=True)
    found = []
    for field in msgspec.structs.fields(Settings):
        base, meta = typing.get_args(hints[field.name])
        secret = bool((meta.extra or {}).get("secret"))
        found.append(Setting(field.name, base, field.default, meta.description, secret))
    return found


def load(flags: Mapping[str, str], environment: Mapping[str, str] | None = None, file: str | None = None) -> Settings:
    """Settings from flags, environment and file.

    Args:
        flags: name → value as typed, for the flags that were given.
        environment: defaults to the process's own.
        file: a TOML file, or None.

    Raises:
        SettingsError: an unknown setting or a bad value; the message says where it came from.
    """
    environment = os.environ if environment is None else environment
    kinds = {setting.name: setting.type for setting in describe()}
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        try:
            values |= msgspec.toml.decode(Path(file).expanduser().read_bytes(), type=dict[str, Any])
        except (OSError, ValueError) as error:
            raise SettingsError(f"Cannot read the settings file {file}: {error}") from error
        origins |= {name: f"{name} in {file}" for name in values}
    for variable, value in environment.items():
        if variable.startswith(PREFIX) and variable not in NOT_SETTINGS:
            name = variable.removeprefix(PREFIX).lower()
            values[name], origins[name] = value, variable
    values |= flags
    origins |= {name: f"--{name.replace('_', '-')}" for name in flags}
    if unknown := sorted(set(values) - set(kinds)):
        raise SettingsError(
            f"No such setting: {', '.join(unknown)}. `flux-local serve --help` lists them all, and says where API keys "
            "belong."
        )
    for name, value in values.items():
        if kinds[name] is bool and isinstance(value, str):
            values[name] = MEANT.get(value.lower(), value)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        found = re.search(r" - at `\$\.(\w+)`$", str(error))
        where = f"{origins[found[1]]}: {str(error)[: found.start()]}" if found else str(error)
        raise SettingsError(f"Bad setting: {where}. `flux-local serve --help` says what it takes.") from error
    settings.origins()
    settings.public_name()
    return msgspec.structs.replace(settings, host=settings.host.strip("[]"))  # as an IPv6 address stands in a URL


def check_open(settings: Settings) -> None:
    """Whether it is meant that whoever reaches the address may ask for pictures.

    Raises:
        SettingsError: other machines reach it, and no keys are set.
    """
    if not is_loopback(settings.host) and not settings.keys() and not settings.allow_anonymous:
        raise SettingsError(
            f"Refusing to listen on {settings.host} without API keys. Set {PREFIX}API_KEYS_FILE, listen on 127.0.0.1, "
            "or say --allow-anonymous true."
        )


def is_loopback(host: str) -> bool:
    """True for addresses that only this machine can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
