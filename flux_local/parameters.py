"""The parameter table of the API: the only place where a parameter's names, type, range, default and handling exist.

Validation (`params`), the OpenAPI schema, the README's table and the command line's flags are read off it. Knows
neither HTTP nor any model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from flux_local import sizes
from flux_local.steps import LEVELS

Kind = Literal["string", "integer", "number", "boolean", "number or string", "file", "list"]
Route = Literal["generations", "edits", "variations"]
ALL_ROUTES: tuple[Route, ...] = ("generations", "edits", "variations")
WITH_IMAGE: tuple[Route, ...] = ("edits", "variations")

MAX_SEED = 2**63 - 1
MAX_PROMPT = 32_000
MAX_TEXT = 512
"""T5 tokens that FLUX.1 reads."""
MAX_LORAS, MAX_LORA_SCALE = 8, 4.0


class Words(str):
    """A default that is no constant, in words."""


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    `default`: what applies when the parameter is not given; `elsewhere`, on some routes. `form`: a regular expression
    for the whole of a string value, for the schema; `sizes` checks it. `examples`: values for a form to offer.
    """

    name: str
    kind: Kind
    default: Any
    handling: str
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ALL_ROUTES
    form: str | None = None
    examples: tuple[str, ...] = ()
    elsewhere: tuple[tuple[Route, Any], ...] = ()

    @property
    def required(self) -> bool:
        return bool(self.default == "required")

    def default_in_words(self) -> str:
        """For people."""
        routes = [f"{route} {value}" for route, value in self.elsewhere if value != ""]
        return "; ".join([json.dumps(self.default).strip('"').replace("null", "none"), *routes])

    def values(self, mark: str = "") -> str:
        """What it may be, for people; each choice between two marks."""
        if self.choices:
            return ", ".join(f"{mark}{choice}{mark}" for choice in self.choices)
        if self.kind == "string" and self.high is not None:
            return f"string, up to {int(self.high):,} characters"
        if self.low is not None and self.high is not None:
            high = "2^63−1" if self.high == MAX_SEED else f"{self.high:g}"
            return f"{self.kind}, {self.low:g} … {high}"
        return self.kind


PARAMETERS: tuple[Parameter, ...] = (
    Parameter("prompt", "string", Words("required"), "passthrough",
              "What to draw; for variations, empty unless given. What the text encoder cannot read of it is cut, "
              "with the header `x-flux-prompt-truncated`.",
              high=MAX_PROMPT, elsewhere=(("variations", ""),)),
    Parameter("prompt_2", "string", Words("`prompt`"), "passthrough",
              "What T5 reads, where CLIP is to read something else.",
              high=MAX_PROMPT),
    Parameter("max_sequence_length", "integer", Words("the model's own"), "passthrough",
              "Tokens that T5 reads; no more than the model's own.", 1, MAX_TEXT),
    Parameter("model", "string", Words("the loaded one"), "passthrough",
              "The loaded model, by its own name, its folder's name or an OpenAI model's name."),
    Parameter("seed", "integer", Words("random"), "passthrough",
              "Image i of n has seed + i. 0 is a seed. Always reported back.", 0, MAX_SEED),
    Parameter("size", "string", None, "converted", "`WxH` in pixels, `W:H`, or `auto`.",
              form=sizes.SIZE_FORM),
    Parameter("aspect_ratio", "string", "1:1", "converted", "`W:H`; the nearest of the size table is taken.",
              form=sizes.RATIO_FORM, examples=tuple(sizes.RATIOS)),
    Parameter("resolution", "number or string", "1K", "converted",
              "A tier (`0.5K`, `1K`, `4K`) or megapixels (`0.25`, `1`); the nearest the model has is taken.",
              form=sizes.RESOLUTION_FORM, examples=tuple(sizes.TIERS)),
    Parameter("megapixels", "number or string", None, "renamed", "`resolution` in megapixels.",
              choices=("0.25", "1")),
    Parameter("image", "file", Words("required"), "converted", "The picture to start from: PNG, JPEG or WebP.",
              routes=WITH_IMAGE),
    Parameter("mask", "file", None, "converted", "PNG with alpha, the image's size; alpha under 128 is repainted.",
              routes=("edits",)),
    Parameter("strength", "number", 0.8, "passthrough",
              "0 keeps the image, 1 draws from the prompt alone.", 0, 1,
              routes=WITH_IMAGE, elsewhere=(("variations", 0.6),)),
    Parameter("cfg_scale", "number", Words("the model's own"), "renamed",
              "Guidance: how closely to follow the prompt.", 0, 20, aliases=("guidance_scale", "guidance")),
    Parameter("num_inference_steps", "integer", Words("the model's own"), "passthrough", "Denoising steps.", 1, 100,
              aliases=("steps",)),
    Parameter("n", "integer", 1, "emulated", "Pictures, each with its own seed.", 1, 10),
    Parameter("negative_prompt", "string", None, "passthrough",
              "What to keep away from; acts with `true_cfg_scale` above 1.", high=MAX_PROMPT),
    Parameter("true_cfg_scale", "number", 1, "passthrough",
              "Real classifier-free guidance, two passes a step.", 1, 20),
    Parameter("go_fast", "boolean", Words("the server's setting"), "converted", 
              "fp8 weights and matmuls; a server says in `x-flux-precision` what ran."),
    Parameter("acceleration", "string", "none", "converted",
              "Step caching: how many steps take an extrapolated velocity instead of a computed one.",
              choices=LEVELS),
    Parameter("enable_safety_checker", "boolean", Words("the server's policy"), "converted",
              "Leave out pictures that the checker flags; `false` only where the server allows it."),
    Parameter("disable_safety_checker", "boolean", Words("the server's policy"), "converted",
              "`true` is `enable_safety_checker` false; `false` leaves it to the server."),
    Parameter("loras", "list", None, "converted",
              "Adapters of the folder `--loras-dir`, by name: `[{\"path\": \"night\", \"scale\": 0.8}]`."),
    Parameter("lora_weights", "string", None, "renamed", "One adapter's name.", high=200),
    Parameter("lora_scale", "number", 1, "renamed", "Its scale.", -MAX_LORA_SCALE, MAX_LORA_SCALE),
    Parameter("response_format", "string", Words("the server's setting"), "emulated",
              "A URL on this server, or the file in the answer.",
              choices=("url", "b64_json")),
    Parameter("output_format", "string", "png", "converted", "The file's format; `jpg` means jpeg.",
              choices=("png", "jpeg", "gif", "webp", "avif", "jpg")),
    Parameter("output_compression", "integer", 90, "renamed",
              "Quality of jpeg, webp and avif; wins over `output_quality`.", 0, 100),
    Parameter("output_quality", "integer", 90, "passthrough", "Quality of jpeg, webp and avif.", 0, 100),
    Parameter("sync_mode", "boolean", False, "emulated", "The `url` is a data URI; nothing is stored."),
    Parameter("stream", "boolean", False, "emulated", "Server-sent events."),
    Parameter("partial_images", "integer", 0, "emulated", "Pictures sent while denoising, with `stream`.", 0, 3),
    Parameter("user", "string", None, "passthrough", "Kept with the request.", high=1000),
    Parameter("style", "string", None, "accepted", "Changes nothing.", choices=("vivid", "natural")),
    Parameter("quality", "string", "auto", "accepted", "Changes nothing.",
              choices=("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd")),
    Parameter("background", "string", "auto", "accepted", "Pictures are opaque.",
              choices=("auto", "opaque", "transparent")),
    Parameter("moderation", "string", "auto", "accepted", "Changes nothing.", choices=("auto", "low")),
    Parameter("input_fidelity", "string", "low", "accepted", "Changes nothing.", choices=("low", "high")),
)  # fmt: skip

BY_NAME: dict[str, Parameter] = {
    name: parameter for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)
}


def default_of(name: str, route: Route = "generations") -> Any:
    """What applies on a route where the parameter is not given; None where that is no constant."""
    parameter = BY_NAME[name]
    value = dict(parameter.elsewhere).get(route, parameter.default)
    return None if isinstance(value, Words) else value
