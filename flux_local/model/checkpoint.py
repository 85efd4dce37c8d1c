"""What the files of a model are, told by their headers: a diffusers folder, or single files as other tools write them.

A component is known by a tensor that no other has, and that two belong together by their widths; names of files only
settle a tie. Reads headers only, never a tensor's numbers, and never a pickle. Knows neither torch nor how to draw.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flux_local.errors import FETCH_AGAIN, WeightsError
from flux_local.model.headers import Header, read_header, volume

Component = Literal["transformer", "vae", "text_encoder", "text_encoder_2"]
Layout = Literal["diffusers", "bfl"]
COMPONENTS: tuple[Component, ...] = ("transformer", "vae", "text_encoder", "text_encoder_2")
FOLDERS = ("scheduler", *COMPONENTS, "tokenizer", "tokenizer_2")
"""Of a diffusers folder."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKEN = 64
"""Numbers of a token of latents: two by two of sixteen channels."""
SUFFIXES = (".safetensors", ".gguf")
PICKLES = frozenset({".ckpt", ".pt", ".pth", ".bin"})
READ = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "GGUF"})
"""Types of numbers that weights may have."""
BESIDE = ("vae", "clip", "text_encoders")
"""Where ComfyUI's `models` folder keeps the parts that a transformer needs."""
ASIDE = re.compile(r"(^|\.)(scale_weight|weight_scale|scale_input|input_scale|scaled_fp8|comfy_quant|spiece_model)$")
"""What stands beside the tensors in ComfyUI's files and is none of them."""

T5_TOKENS = 32128
"""Of T5's vocabulary."""

MARKS: tuple[tuple[Component, Layout, str], ...] = (
    ("transformer", "bfl", "double_blocks.0.img_mod.lin.weight"),
    ("transformer", "diffusers", "transformer_blocks.0.norm1_context.linear.weight"),
    ("vae", "bfl", "decoder.up.0.block.0.conv1.weight"),
    ("vae", "diffusers", "decoder.up_blocks.0.resnets.0.conv1.weight"),
    ("text_encoder", "diffusers", "encoder.layers.0.self_attn.q_proj.weight"),
    ("text_encoder_2", "diffusers", "encoder.block.0.layer.0.SelfAttention.q.weight"),
)
"""A tensor by which a component and the names of its tensors are known, whatever prefix stands before it."""

WIDTHS = {
    "vae": ("decoder.conv_in.weight", {"bfl": "img_in.weight", "diffusers": "x_embedder.weight"}),
    "text_encoder": (
        "encoder.layers.0.self_attn.q_proj.weight",
        {"bfl": "vector_in.in_layer.weight", "diffusers": "time_text_embed.text_embedder.linear_1.weight"},
    ),
    "text_encoder_2": (
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        {"bfl": "txt_in.weight", "diffusers": "context_embedder.weight"},
    ),
}
"""A tensor whose input the component determines, and the transformer's layer that takes it, by layout."""

NAMED = {
    "vae": "the autoencoder (ae.safetensors)",
    "text_encoder": "the CLIP text encoder (clip_l.safetensors)",
    "text_encoder_2": "the T5 text encoder (t5xxl_fp16.safetensors or one in fp8)",
}
USUAL = {"vae": r"(?<![a-z])ae(?![a-z])", "text_encoder": "clip_l", "text_encoder_2": "t5xxl"}
"""Part of the name that a component's file has in FLUX.1's own repository. 'sd3_vae' is not the 'ae', and as large."""

log = logging.getLogger("flux_local.checkpoint")


@dataclass(frozen=True)
class Part:
    """One component's tensors: in these files, after this prefix, with the names of this layout."""

    headers: tuple[Header, ...]
    layout: Layout = "diffusers"
    prefix: str = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name without the prefix."""
        start = len(self.prefix)
        return {
            name[start:]: shape
            for header in self.headers
            for name, shape in header.shapes.items()
            if name.startswith(self.prefix) and not ASIDE.search(name)
        }

    @property
    def parameters(self) -> int:
        return sum(volume(shape) for shape in self.shapes().values())

    @property
    def types(self) -> set[str]:
        """Of its matrices."""
        return {
            kind
            for header in self.headers
            for name, kind in header.types.items()
            if name.startswith(self.prefix) and len(header.shapes[name]) == 2
        }


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    `home`: the folder of its tokenizers, and of its components' `config.json` where there are any.
    """

    path: Path
    home: Path
    parts: dict[Component, Part]

    def config(self, component: Component) -> dict[str, Any]:
        """The component's own, or FLUX.1's.

        Raises:
            WeightsError: its file is damaged.
        """
        from flux_local.model.flux1 import CONFIGS

        if (own := self.own(f"{component}/config.json")) is not None:
            return own
        return CONFIGS[component] if component != "transformer" else transformer_config(self.parts["transformer"])

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's configuration, its own or FLUX.1's: [schnell]'s for a transformer that takes no guidance."""
        from flux_local.model.flux1 import SCHEDULER, UNSHIFTED

        if (own := self.own("scheduler/scheduler_config.json")) is not None:
            return own
        return SCHEDULER if self.config("transformer")["guidance_embeds"] else UNSHIFTED

    def own(self, name: str) -> dict[str, Any] | None:
        """A file of JSON in its home; a home that is another model's lends its tokenizers only."""
        path = self.home / name
        if (self.home != self.path and (self.home / "model_index.json").is_file()) or not path.is_file():
            return None
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} is damaged. {FETCH_AGAIN}") from error

    @property
    def nbytes(self) -> int:
        """Of all files of weights."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of weights, each once."""
        found = [header.path for part in self.parts.values() for header in part.headers]
        return tuple(dict.fromkeys(found))


def identify(path: Path, homes: Sequence[Path] = ()) -> Checkpoint:
    """What a path is: a diffusers folder, a file of weights, or a folder of such files.

    Args:
        homes: folders to look for tokenizers in, after those around the path.

    Raises:
        WeightsError: nothing that can be served; the message names what is missing or in the way.
    """
    if (path / "model_index.json").is_file():
        return of_folder(path)
    return of_files(path, homes)


def is_model(path: Path) -> bool:
    """Whether a path looks like one of the forms, before anything is read."""
    if path.is_file():
        return path.suffix.lower() in SUFFIXES or path.suffix.lower() in PICKLES
    return (path / "model_index.json").is_file() or next(weight_files(path), None) is not None


def of_folder(folder: Path) -> Checkpoint:
    """A diffusers folder.

    Raises:
        WeightsError: it is no FLUX.1 model, or a component is missing or damaged.
    """
    index = folder / "model_index.json"
    try:
        kind = json.loads(index.read_text()).get("_class_name")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{index} is damaged. {FETCH_AGAIN}") from error
    if kind != "FluxPipeline":
        raise WeightsError(f"{folder} holds a {kind}, not a FluxPipeline. flux-local serves FLUX.1 models only.")
    for name in FOLDERS:
        if not (folder / name).is_dir():
            raise WeightsError(f"{folder / name} is missing. {FETCH_AGAIN}")
    parts = {}
    for component in COMPONENTS:
        headers = tuple(read_header(file) for file in sorted((folder / component).glob("*.safetensors")))
        if not headers:
            raise WeightsError(f"{folder / component} holds no .safetensors file. {FETCH_AGAIN}")
        parts[component] = Part(headers)
        for header in headers:
            check_types(header, parts[component])
    check_transformer(parts["transformer"])
    return Checkpoint(folder, folder, parts)


def of_files(path: Path, homes: Sequence[Path]) -> Checkpoint:
    """A file of weights and what lies around it, or a folder of such files.

    Raises:
        WeightsError: what cannot be read, or is missing.
    """
    given = [path] if path.is_file() else sorted(weight_files(path))
    if path.suffix.lower() in PICKLES:
        raise WeightsError(f"{path} is a pickle, which can run any program. Get the model as .safetensors or .gguf.")
    if not given:
        raise WeightsError(f"No model at {path}: no model_index.json is there, and no .safetensors or .gguf file.")
    found = [part for file in given for part in parts_of(read_header(file))]
    transformers = [part for component, part in found if component == "transformer"]
    if not transformers:
        raise WeightsError(
            f"{path} holds no FLUX.1 transformer that can be read here. Give a diffusers folder, a FLUX.1 checkpoint "
            "as .safetensors (bf16, fp16 or fp8) or a .gguf file."
        )
    if len(transformers) > 1:
        names = ", ".join(part.headers[0].path.name for part in transformers)
        raise WeightsError(f"{path} holds several transformers ({names}). Give the path of one of them.")
    transformer = transformers[0]
    check_transformer(transformer)
    around = path.parent if path.is_file() else path
    places = [around, around.parent, *(around.parent / name for name in BESIDE)]
    circles = [[part for part in found if part[1].headers == transformer.headers], found]
    circles += [[part for file in sorted(weight_files(place)) for part in alone(file)] for place in places]
    parts: dict[Component, Part] = {"transformer": transformer}
    for component in COMPONENTS[1:]:
        for circle in circles:
            fitting = [part for name, part in circle if name == component and fits(component, part, transformer)]
            if fitting:
                parts[component] = max(fitting, key=lambda part: (finest(part), usual(component, part)))
                break
        else:
            raise WeightsError(
                f"{path} is a transformer; {NAMED[component]} is missing. Put it into {around} or beside that, "
                "or give a diffusers folder."
            )
    for component in COMPONENTS[1:]:
        log.info("%s: %s", NAMED[component], parts[component].headers[0].path)
    return Checkpoint(path, home_of([around, around.parent, *homes]), parts)


def finest(part: Part) -> int:
    """More, the less its numbers are rounded."""
    return -len(part.types & {"F8_E4M3", "F8_E5M2", "GGUF"})


def usual(component: Component, part: Part) -> bool:
    """Whether its file has the name that FLUX.1's has everywhere; a fine-tuned one beside it has another."""
    return re.search(USUAL[component], part.headers[0].path.stem.lower()) is not None


def check_transformer(part: Part) -> None:
    """Raises `WeightsError` for one that is given more than noisy latents (FLUX.1 Fill, Canny or Depth), or one of
    whose blocks lacks a tensor that another of its kind has."""
    shapes, path = part.shapes(), part.headers[0].path
    shape = shapes.get("img_in.weight" if part.layout == "bfl" else "x_embedder.weight")
    if shape is not None and shape[1] != TOKEN:
        raise WeightsError(
            f"{path} takes {shape[1]} numbers a token where FLUX.1 [dev], [schnell] and Krea take {TOKEN}: a model for "
            "filling or control, which is not served. Give one of text to image."
        )
    blocks: dict[str, dict[str, set[str]]] = {}
    for name in shapes:
        kind, _, rest = name.partition(".")
        if kind.endswith("_blocks"):
            index, _, tensor = rest.partition(".")
            blocks.setdefault(kind, {}).setdefault(index, set()).add(tensor)
    for kind, found in blocks.items():
        every = set[str]().union(*found.values())
        for index in map(str, range(len(found))):
            for tensor in sorted(every - found.get(index, set())):
                raise WeightsError(
                    f"{path.parent} lacks the tensor {part.prefix}{kind}.{index}.{tensor}. {FETCH_AGAIN}"
                )


def home_of(places: Sequence[Path]) -> Path:
    """The first folder with both tokenizers.

    Raises:
        WeightsError: none has them.
    """
    for place in places:
        if all((place / name).is_dir() for name in TOKENIZERS):
            return place
    raise WeightsError(
        f"The tokenizers are missing: checkpoints of single files hold none. Fetch them with `flux-local download "
        f"--only tokenizers --to {places[0]}`, or copy FLUX.1's folders tokenizer and tokenizer_2 there."
    )


def weight_files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())


def parts_of(header: Header) -> list[tuple[Component, Part]]:
    """The components that a file holds.

    Raises:
        WeightsError: a component whose numbers are packed in a way that is not read here.
    """
    found = []
    for component, layout, mark in MARKS:
        for name in header.shapes:
            if name == mark or name.endswith("." + mark):
                part = Part((header,), layout, name.removesuffix(mark))
                check_types(header, part)
                found.append((component, part))
                break
    return found


def alone(path: Path) -> list[tuple[Component, Part]]:
    """The component that a file near the transformer holds; nothing, where it holds more, or cannot be read.

    A checkpoint of everything is another model's, whose encoders may be fine-tuned for it.
    """
    try:
        header = read_header(path)
        found = parts_of(header)
    except WeightsError:
        return []
    known = sum(len(part.shapes()) for _, part in found)
    whole = sum(not ASIDE.search(name) for name in header.shapes)
    return found if len(found) == 1 and found[0][0] != "transformer" and 2 * known > whole else []


def check_types(header: Header, part: Part) -> None:
    for name, kind in header.types.items():
        if name.startswith(part.prefix) and name.endswith(".weight") and kind not in READ:
            raise WeightsError(
                f"{header.path} holds weights packed as {kind} (nf4, nvfp4 or the like), which are not read here. "
                "Get the model in bf16, fp16, fp8 (e4m3) or as GGUF."
            )


def fits(component: Component, part: Part, transformer: Part) -> bool:
    """Whether what the component gives is as wide as what the transformer takes."""
    mark, layers = WIDTHS[component]
    if component == "text_encoder_2" and part.shapes().get("shared.weight", (T5_TOKENS,))[0] > T5_TOKENS:
        return False  # umT5, which other models read with
    gives, takes = part.shapes().get(mark), transformer.shapes().get(layers[transformer.layout])
    if gives is None or takes is None:
        return False
    return gives[1] == (takes[1] // 4 if component == "vae" else takes[1])


def transformer_config(part: Part) -> dict[str, Any]:
    """The configuration of a `FluxTransformer2DModel` that has tensors of these shapes, with FLUX.1's rotary axes."""
    shapes = part.shapes()
    if part.layout == "bfl":
        double, single, guidance = "double_blocks", "single_blocks", "guidance_in.in_layer.weight"
        image, text, pooled = "img_in.weight", "txt_in.weight", "vector_in.in_layer.weight"
        norm = "single_blocks.0.norm.query_norm.scale"
    else:
        double, single = "transformer_blocks", "single_transformer_blocks"
        guidance = "time_text_embed.guidance_embedder.linear_1.weight"
        image, text, pooled = "x_embedder.weight", "context_embedder.weight", WIDTHS["text_encoder"][1]["diffusers"]
        norm = "single_transformer_blocks.0.attn.norm_q.weight"
    missing = [name for name in (image, text, pooled, norm) if name not in shapes]
    if missing:
        raise WeightsError(f"{part.headers[0].path} lacks the tensor {missing[0]}. {FETCH_AGAIN}")
    size = shapes[norm][0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": shapes[image][1],
        "num_layers": count(shapes, double),
        "num_single_layers": count(shapes, single),
        "attention_head_dim": size,
        "num_attention_heads": shapes[image][0] // size,
        "joint_attention_dim": shapes[text][1],
        "pooled_projection_dim": shapes[pooled][1],
        "guidance_embeds": guidance in shapes,
        "axes_dims_rope": [size // 8, 7 * size // 16, 7 * size // 16],
    }


def count(shapes: dict[str, tuple[int, ...]], blocks: str) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")})
