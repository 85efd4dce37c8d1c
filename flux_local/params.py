"""What a request becomes once it has been checked against the parameter table.

Knows neither HTTP nor the model beyond `ModelInfo`.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from flux_local import sizes
from flux_local.errors import InvalidValue, MissingParameter, ModelNotFound
from flux_local.parameters import BY_NAME, MAX_LORA_SCALE, MAX_LORAS, MAX_TEXT, PARAMETERS, Parameter, Route, default_of
from flux_local.sizes import CanvasRange, Size
from flux_local.steps import Mask, Masks

MANY_NAMES, LONG_NAME = 64, 64
"""Of names that change nothing: how many are told, and how many characters of each."""
PUBLIC_NAME = "flux.1-krea-dev"
OPENAI_NAMES = re.compile(r"(gpt-image-|dall-e-)[0-9][a-z0-9.-]{0,39}|chatgpt-image-latest")
"""What clients made for OpenAI's images send: its models of today, and of the day after."""


@dataclass(frozen=True)
class ModelInfo:
    """What the request side has to know of the loaded model."""

    name: str
    canvas: CanvasRange
    default_steps: int
    default_guidance: float
    masks: Masks = field(default_factory=Masks)
    text_length: int = MAX_TEXT
    """T5 tokens that it reads."""

    def answers_to(self, name: str) -> bool:
        name = name.lower()
        return name in (PUBLIC_NAME, self.name.lower()) or OPENAI_NAMES.fullmatch(name) is not None


@dataclass(frozen=True)
class GenerationParams:
    """A checked request: every value in range, every default filled in. To be trusted from here on."""

    prompt: str
    seeds: tuple[int, ...]
    delivered: Size
    canvas: Size
    steps: int
    guidance: float
    negative_prompt: str | None
    true_cfg_scale: float
    strength: float | None
    """Of an edit; None where there is no image."""
    response_format: Literal["url", "b64_json"]
    output_format: Literal["png", "jpeg", "gif", "webp", "avif"]
    output_quality: int
    sync_mode: bool
    quality: str
    user: str | None
    stream: bool
    partial_images: int
    ignored: tuple[str, ...]
    go_fast: bool = False
    acceleration: str = "none"
    computed: Mask = ()
    """Which of the steps that run are computed; empty for all."""
    computed_origin: str = "none"
    loras: tuple[tuple[str, float], ...] = ()
    """Names of adapters, each with its scale."""
    prompt_2: str | None = None
    max_length: int | None = None
    """T5 tokens, where the request says."""
    check: bool | None = None
    """Whether the safety checker is to look at the pictures; None where the request does not say."""

    @property
    def prompt_read(self) -> str:
        """What T5 is to read."""
        return self.prompt if self.prompt_2 is None else self.prompt_2

    @property
    def steps_run(self) -> int:
        return steps_run(self.steps, self.strength)

    @property
    def steps_computed(self) -> int:
        return sum(self.computed) if self.computed else self.steps_run


def steps_run(steps: int, strength: float | None) -> int:
    """ceil(steps · strength), free of the last digits of binary fractions."""
    strength = 1.0 if strength is None else strength
    return 0 if strength == 0 else min(steps, max(1, math.ceil(round(steps * strength, 9))))


def generation_params(
    raw: Mapping[str, Any],
    model: ModelInfo,
    *,
    route: Route = "generations",
    image: Size | None = None,
    response_format: Literal["url", "b64_json"] = "url",
    go_fast: bool = False,
    max_pixels: int = sizes.MAX_PIXELS,
    random_seed: Callable[[], int] = lambda: secrets.randbelow(2**32),
) -> GenerationParams:
    """Checks a request's values against the table and fills in what was not given.

    Args:
        raw: names and values as JSON gives them. None means not given.
        image: the size of the input, on the routes that take one.
        response_format, go_fast: the server's defaults.

    Raises:
        InvalidValue, MissingParameter, ModelNotFound: with the parameter's name in `param`.
    """
    given, ignored = canonical(raw, route)

    def got(name: str) -> Any:
        return given.get(name, default_of(name, route))

    if got("prompt") is None:
        raise MissingParameter("'prompt' is required. An empty string is allowed.", param="prompt")
    if "model" in given and not model.answers_to(given["model"]):
        raise ModelNotFound(
            f"This server has one model, '{PUBLIC_NAME}' ('{model.name}'). Use that name or leave 'model' out.",
            param="model",
        )
    true_cfg_scale = float(got("true_cfg_scale"))
    if "negative_prompt" in given and true_cfg_scale == 1:
        ignored.append("negative_prompt")
    if "negative_prompt" not in given and true_cfg_scale > 1:
        ignored.append("true_cfg_scale")
        true_cfg_scale = 1.0
    if "lora_scale" in given and "lora_weights" not in given:
        ignored.append("lora_scale")
    delivered = size_of(given, image, max_pixels)
    first = given["seed"] if "seed" in given else random_seed()
    output_format = got("output_format")
    strength = None if image is None else float(got("strength"))
    count = given.get("num_inference_steps", model.default_steps)
    level, run = got("acceleration"), steps_run(count, strength)
    return GenerationParams(
        prompt=got("prompt"),
        seeds=tuple((first + i) % 2**63 for i in range(got("n"))),
        delivered=delivered,
        canvas=sizes.canvas_for(delivered, model.canvas),
        steps=count,
        guidance=float(given.get("cfg_scale", model.default_guidance)),
        negative_prompt=given.get("negative_prompt") if true_cfg_scale > 1 else None,
        true_cfg_scale=true_cfg_scale,
        strength=strength,
        response_format=given.get("response_format", response_format),
        output_format="jpeg" if output_format == "jpg" else output_format,
        output_quality=given.get("output_compression", got("output_quality")),
        sync_mode=got("sync_mode"),
        quality={"low": "low", "medium": "medium", "standard": "medium"}.get(given.get("quality", ""), "high"),
        user=given.get("user"),
        stream=got("stream"),
        partial_images=got("partial_images"),
        ignored=tuple(sorted(ignored)[:MANY_NAMES]),
        go_fast=given.get("go_fast", go_fast),
        acceleration=level,
        computed=() if level == "none" or run == 0 else model.masks(level, run),
        computed_origin=model.masks.origin(level, run),
        loras=loras_of(given),
        prompt_2=given.get("prompt_2"),
        max_length=length_of(given, model),
        check=asked_check(given),
    )


def table_for(model: ModelInfo) -> list[Parameter]:
    """The parameter table as it holds for a model."""
    own = {"max_sequence_length": model.text_length}
    return [replace(row, high=own[row.name]) if row.name in own else row for row in PARAMETERS]


def length_of(given: Mapping[str, Any], model: ModelInfo) -> int | None:
    length: int | None = given.get("max_sequence_length")
    if length is not None and length > model.text_length:
        raise InvalidValue(
            f"'max_sequence_length' must be between 1 and {model.text_length} with this model.",
            param="max_sequence_length",
        )
    return None if length == model.text_length else length


def asked_check(given: Mapping[str, Any]) -> bool | None:
    """Either of two opposite names."""
    enabled, disabled = given.get("enable_safety_checker"), given.get("disable_safety_checker")
    if enabled and disabled:
        raise InvalidValue(
            "'enable_safety_checker' and 'disable_safety_checker' contradict each other; send one.",
            param="disable_safety_checker",
        )
    return False if disabled else enabled


def loras_of(given: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """Names and scales, from either form; a scale of 0 is as good as none."""
    listed: list[Any] = given.get("loras", [])
    if len(listed) > MAX_LORAS:
        raise InvalidValue(f"'loras' may name at most {MAX_LORAS} adapters.", param="loras")
    found = [lora_of(entry) for entry in listed]
    if "lora_weights" in given:
        one = [lora_of({"path": given["lora_weights"], "scale": given.get("lora_scale", default_of("lora_scale"))})]
        if found and found != one:
            raise InvalidValue("'loras' and 'lora_weights' are one parameter with two values; send one.", param="loras")
        found = one
    if len({name for name, _ in found}) < len(found):
        raise InvalidValue("'loras' names an adapter twice; give it once, with the scales added.", param="loras")
    return tuple((name, scale) for name, scale in found if scale)


def lora_of(entry: Any) -> tuple[str, float]:
    """One entry: an object with `path`, and a `scale` of 1 if it has none; or a name alone."""
    if isinstance(entry, str):
        entry = {"path": entry}
    if isinstance(entry, dict) and isinstance(entry.get("path"), str):
        scale = entry.get("scale", 1)
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if is_number and abs(scale) <= MAX_LORA_SCALE:
            return entry["path"].removesuffix(".safetensors"), float(scale)
    raise InvalidValue(
        f'\'loras\' must be a list like [{{"path": "name", "scale": 1}}], scales up to {MAX_LORA_SCALE:g}.',
        param="loras",
    )


def size_of(given: Mapping[str, Any], image: Size | None, max_pixels: int) -> Size:
    """The delivered size; an edit that asks for none gets its input's."""
    resolution = resolution_of(given)
    size = given.get("size")
    asked = sizes.delivered_size(size, given.get("aspect_ratio"), resolution, max_pixels)
    if image is not None and size in (None, "auto") and "aspect_ratio" not in given and resolution is None:
        return sizes.clamp(image, max_pixels)
    return asked


def resolution_of(given: Mapping[str, Any]) -> str | float | None:
    """`resolution` or its megapixel form; both only if they agree."""
    if "megapixels" not in given:
        return given.get("resolution")
    megapixels = float(given["megapixels"])
    if "resolution" in given and sizes.parse_resolution(given["resolution"]) != megapixels:
        raise InvalidValue("'megapixels' and 'resolution' differ; send one of them.", param="megapixels")
    return megapixels


def canonical(raw: Mapping[str, Any], route: Route) -> tuple[dict[str, Any], list[str]]:
    """Checked values under their canonical names, and the names that change nothing.

    Raises:
        InvalidValue: a value of the wrong type or outside its range, or two names of one parameter that differ.
    """
    given: dict[str, Any] = {}
    sources: dict[str, str] = {}
    ignored: list[str] = []
    for name, value in raw.items():
        if value is None:
            continue
        parameter = BY_NAME.get(name)
        if parameter is None or route not in parameter.routes:
            ignored.append(name[:LONG_NAME])
            continue
        checked = check(parameter, name, value)
        if parameter.name in given and given[parameter.name] != checked:
            other = sources[parameter.name]
            raise InvalidValue(f"'{other}' and '{name}' are one parameter with two values; send one.", param=name)
        given[parameter.name], sources[parameter.name] = checked, name
    return given, ignored


def check(parameter: Parameter, name: str, value: Any) -> Any:
    """The value, if it is of the parameter's type and inside its range."""
    value = typed(parameter, name, value)
    shown = str(value)
    if parameter.kind == "number or string" and re.fullmatch(sizes.NUMBER, shown):
        shown = f"{float(shown):g}"
    if parameter.choices and shown not in parameter.choices:
        allowed = ", ".join(parameter.choices)
        raise InvalidValue(f"'{name}' must be one of: {allowed}.", param=name)
    if parameter.kind == "string":
        if parameter.high is not None and len(value) > parameter.high:
            raise InvalidValue(f"'{name}' may have at most {int(parameter.high):,} characters.", param=name)
    elif parameter.low is not None and parameter.high is not None and not parameter.low <= value <= parameter.high:
        raise InvalidValue(f"'{name}' must be between {parameter.low} and {parameter.high}.", param=name)
    return value


def typed(parameter: Parameter, name: str, value: Any) -> Any:
    """The value if JSON gave it in the parameter's type: booleans and strings are no numbers, 7.0 is an integer."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    match parameter.kind:
        case "string" if isinstance(value, str):
            return value
        case "integer" if is_number and value == int(value):
            return int(value)
        case "number" if is_number:
            return value
        case "boolean" if isinstance(value, bool):
            return value
        case "number or string" if is_number or isinstance(value, str):
            return value
        case "list" if isinstance(value, list):
            return value
    article = "an" if parameter.kind[0] in "aeiou" else "a"
    raise InvalidValue(f"'{name}' must be {article} {parameter.kind}.", param=name)
