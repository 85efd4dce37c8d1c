"""Where a model is, and what stands beside its weights. Never the network, never torch."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux_local.errors import FETCH_AGAIN, WeightsError
from flux_local.model import checkpoint
from flux_local.model.checkpoint import Checkpoint, is_model
from flux_local.model.headers import read_header
from flux_local.parameters import MAX_TEXT
from flux_local.params import ModelInfo
from flux_local.sizes import CanvasRange
from flux_local.steps import Masks

INFO = "flux-local.json"
KREA = ModelInfo("FLUX.1-Krea-dev", CanvasRange(100_000, 4_200_000), 28, 4.5)
"""What applies to a FLUX.1 folder without a file of its own."""
REPOSITORY = "black-forest-labs/FLUX.1-Krea-dev"
"""Where a hub has it."""
MANIFEST = "manifest.json"
"""What a download brought: each file's size and hash."""
TOKENIZERS = ("FLUX.1-Krea-dev", "FLUX.1-dev", "FLUX.1-schnell")
"""Models that may lend theirs: all FLUX.1 models have the same. Their makers' names for them, too."""


@dataclass(frozen=True)
class Recorded:
    """A file as the manifest knows it. Small files have no hash."""

    size: int
    sha256: str | None = None


def find(model: str) -> Path:
    """A model given by path or by name: a diffusers folder, a file of weights, or a folder of such files.

    Raises:
        WeightsError: nothing there.
    """
    for place in (Path(model).expanduser(), *places(model)):
        if is_model(place):
            return Path(os.path.abspath(place))  # links stay: what stands beside a file, and its suffix, count
    fetched = model if model in TOKENIZERS else "FLUX.1-Krea-dev"
    raise WeightsError(
        f"No model at '{model}'. Give the path of a diffusers folder (one with a model_index.json), of a .safetensors "
        "or .gguf file or a folder of such, or 'flux-krea-mini' for the embedded model; "
        f"`flux-local download black-forest-labs/{fetched}` fetches {fetched}."
    )


def places(name: str) -> list[Path]:
    """Where a model of a name may be: under `weights/` here, beside the package's checkout, and in the package."""
    package = Path(__file__).resolve().parent
    return [Path("weights") / name, package.parent / "weights" / name, package / "weights" / name]


def identify(path: Path) -> Checkpoint:
    """What the model at a path consists of.

    Raises:
        WeightsError: a component is missing, or none of it can be read here.
    """
    lenders = [place for name in TOKENIZERS for place in places(name)]
    return checkpoint.identify(path, lenders)


def info(path: Path) -> ModelInfo:
    """The model's canvas range and defaults: what its folder says, or FLUX.1's.

    Raises:
        WeightsError: the file is there but damaged.
    """
    name = path.stem if path.is_file() else path.name
    path = (path.parent if path.is_file() else path) / INFO
    if not path.is_file():
        return ModelInfo(name, KREA.canvas, KREA.default_steps, KREA.default_guidance)
    try:
        found = json.loads(path.read_text())
        canvas = CanvasRange(int(found["canvas"]["min_area"]), int(found["canvas"]["max_area"]))
        defaults = found["defaults"]
        masks = Masks.read(found.get("acceleration", {}))
        steps, guidance = int(defaults["num_inference_steps"]), float(defaults["guidance_scale"])
        return ModelInfo(name, canvas, steps, guidance, masks, int(found.get("text_length", MAX_TEXT)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged. {FETCH_AGAIN}") from error


def verify(path: Path) -> None:
    """Whether every file of weights is there and whole, by sizes and headers alone: milliseconds for any model.

    Raises:
        WeightsError: a file that the manifest names, or a shard that an index names, is missing, or one is shorter or
            longer than the manifest or its header says.
    """
    for name, recorded in manifest(path).items():
        file = path / name
        if not file.is_file():
            raise WeightsError(f"{file} is missing. Run `{download_again(path)}`.")
        if file.stat().st_size != recorded.size:
            raise WeightsError(
                f"{file} has {file.stat().st_size:,} bytes where the hub's has {recorded.size:,}. "
                f"Run `{download_again(path)}`."
            )
    for index in sorted(path.glob("*/*.safetensors.index.json")):
        try:
            places = dict(json.loads(index.read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is damaged. {FETCH_AGAIN}") from error
        shards = sorted(set(places.values()))
        for shard in shards:
            if not (index.parent / shard).is_file():
                raise WeightsError(f"{index.parent / shard} is missing. {FETCH_AGAIN}")
        for shard in shards:
            file = index.parent / shard
            lost = {name for name, place in places.items() if place == shard} - set(read_header(file).shapes)
            if lost:
                raise WeightsError(f"{file} lacks the tensor {min(lost)} that {index.name} says it has. {FETCH_AGAIN}")
    for part in identify(path).parts.values():
        for header in part.headers:
            size = header.path.stat().st_size
            if size != header.size and (header.path.suffix == ".safetensors" or size < header.size):
                raise WeightsError(
                    f"{header.path} has {size:,} bytes where its header says {header.size:,}. {FETCH_AGAIN}"
                )


def manifest(folder: Path) -> dict[str, Recorded]:
    """What a download of the folder recorded; nothing, where the folder came another way.

    Raises:
        WeightsError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        return {name: Recorded(**entry) for name, entry in json.loads(path.read_text())["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{path} is damaged. Run `flux-local download REPOSITORY --to {folder}`, with where the model came from."
        ) from error


def download_again(folder: Path) -> str:
    """The command that brings what a folder with a manifest lacks."""
    record = json.loads((folder / MANIFEST).read_text())
    command = ["flux-local", "download", record["repository"], "--revision", record["revision"], "--to", str(folder)]
    return shlex.join(command)


def write_manifest(folder: Path, repository: str, revision: str, files: dict[str, Recorded]) -> None:
    record = {"repository": repository, "revision": revision, "files": {n: asdict(f) for n, f in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")


def write_info(folder: Path) -> None:
    """FLUX.1's canvas range and defaults into a folder that says nothing of its own."""
    path = folder / INFO
    if not path.exists():
        path.write_text(json.dumps(described(KREA), indent=2) + "\n")


def described(model: ModelInfo) -> dict[str, Any]:
    """What the file beside the weights says of a model, less masks of steps."""
    return {
        "canvas": asdict(model.canvas),
        "defaults": {"num_inference_steps": model.default_steps, "guidance_scale": model.default_guidance},
        "text_length": model.text_length,
    }
