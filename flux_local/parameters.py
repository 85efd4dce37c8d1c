"""The parameter table of the API: the only place where a parameter's names, type, range, default and handling exist.

Validation (`params`), the OpenAPI schema, the README's table and the command line's flags are read off it. Knows
neither HTTP nor any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Parameter:
    """One row of the table.

    `default` is for reading: a word or two for what applies when the parameter is not given. `form`: a regular
    expression for the whole of a string value, for the schema; `sizes` checks it.
    """

    name: str
    kind: Kind
    default: str
    handling: str
    description: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ALL_ROUTES
    form: str | None = None

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
    Parameter("prompt", "string", "required", "passthrough",
              "What to draw; for variations, empty unless given. What the text encoder cannot read of it is cut, "
              "with the header `x-flux-prompt-truncated`.",
              high=MAX_PROMPT),
    Parameter("prompt_2", "string", "`prompt`", "passthrough", "What T5 reads, where CLIP is to read something else.",
              high=MAX_PROMPT),
    Parameter("max_sequence_length", "integer", "the model's own", "passthrough",
              "Tokens that T5 reads; no more than the model's own.", 1, MAX_TEXT),
    Parameter("model", "string", "the loaded one", "passthrough",
              "The loaded model, by its own name, its folder's name or an OpenAI model's name."),
    Parameter("seed", "integer", "random", "passthrough",
              "Image i of n has seed + i. 0 is a seed. Always reported back.", 0, MAX_SEED),
    Parameter("size", "string", "none", "converted", "`WxH` in pixels, `W:H`, or `auto`.",
              form=sizes.SIZE_FORM),
    Parameter("aspect_ratio", "string", "1:1", "converted", "`W:H`; the nearest of the size table is taken.",
              form=sizes.RATIO_FORM),
    Parameter("resolution", "number or string", "1K", "converted",
              "A tier (`0.5K`, `1K`, `4K`) or megapixels (`0.25`, `1`); the nearest the model has is taken.",
              form=sizes.RESOLUTION_FORM),
    Parameter("megapixels", "number or string", "none", "renamed", "`resolution` in megapixels.",
              choices=("0.25", "1")),
    Parameter("image", "file", "required", "converted", "The picture to start from: PNG, JPEG or WebP.",
              routes=WITH_IMAGE),
    Parameter("mask", "file", "none", "converted", "PNG with alpha, the image's size; alpha under 128 is repainted.",
              routes=("edits",)),
    Parameter("strength", "number", "0.8; variations 0.6", "passthrough",
              "0 keeps the image, 1 draws from the prompt alone.", 0, 1,
              routes=WITH_IMAGE),
    Parameter("cfg_scale", "number", "the model's own", "renamed",
              "Guidance: how closely to follow the prompt.", 0, 20, aliases=("guidance_scale", "guidance")),
    Parameter("num_inference_steps", "integer", "the model's own", "passthrough", "Denoising steps.", 1, 100,
              aliases=("steps",)),
    Parameter("n", "integer", "1", "emulated", "Pictures, each with its own seed.", 1, 10),
    Parameter("negative_prompt", "string", "none", "passthrough",
              "What to keep away from; acts with `true_cfg_scale` above 1.", high=MAX_PROMPT),
    Parameter("true_cfg_scale", "number", "1", "passthrough",
              "Real classifier-free guidance, two passes a step.", 1, 20),
    Parameter("go_fast", "boolean", "the server's setting", "converted", 
              "fp8 weights and matmuls; what ran is in `x-flux-precision`."),
    Parameter("acceleration", "string", "none", "converted",
              "Step caching: how many steps take an extrapolated velocity instead of a computed one.",
              choices=LEVELS),
    Parameter("enable_safety_checker", "boolean", "the server's policy", "converted",
              "Leave out pictures that the checker flags; `false` only where the server allows it."),
    Parameter("disable_safety_checker", "boolean", "the server's policy", "converted",
              "The opposite of `enable_safety_checker`."),
    Parameter("loras", "list", "none", "converted",
              "Adapters of the server's own folder, by name: `[{path, scale}]`."),
    Parameter("lora_weights", "string", "none", "renamed", "One adapter's name.", high=200),
    Parameter("lora_scale", "number", "1", "renamed", "Its scale.", -MAX_LORA_SCALE, MAX_LORA_SCALE),
    Parameter("response_format", "string", "url", "emulated", "A URL on this server, or the file in the answer.",
              choices=("url", "b64_json")),
    Parameter("output_format", "string", "png", "converted", "The file's format; `jpg` means jpeg.",
              choices=("png", "jpeg", "gif", "webp", "avif", "jpg")),
    Parameter("output_compression", "integer", "90", "renamed",
              "Quality of jpeg, webp and avif; wins over `output_quality`.", 0, 100),
    Parameter("output_quality", "integer", "90", "passthrough", "Quality of jpeg, webp and avif.", 0, 100),
    Parameter("sync_mode", "boolean", "false", "emulated", "The `url` is a data URI; nothing is stored."),
    Parameter("stream", "boolean", "false", "emulated", "Server-sent events."),
    Parameter("partial_images", "integer", "0", "emulated", "Pictures sent while denoising, with `stream`.", 0, 3),
    Parameter("user", "string", "none", "passthrough", "Kept with the request.", high=1000),
    Parameter("style", "string", "none", "accepted", "Changes nothing.", choices=("vivid", "natural")),
    Parameter("quality", "string", "auto", "accepted", "Changes nothing.",
              choices=("auto", "low", "medium", "high", "standard", "hd")),
    Parameter("background", "string", "auto", "accepted", "Pictures are opaque.",
              choices=("auto", "opaque", "transparent")),
    Parameter("moderation", "string", "auto", "accepted", "Changes nothing.", choices=("auto", "low")),
    Parameter("input_fidelity", "string", "low", "accepted", "Changes nothing.", choices=("low", "high")),
)  # fmt: skip

BY_NAME: dict[str, Parameter] = {
    name: parameter for parameter in PARAMETERS for name in (parameter.name, *parameter.aliases)
}
