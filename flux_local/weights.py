"""Where a model is, and what stands beside its weights. Never the network, never torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from flux_local.errors import WeightsError
from flux_local.params import ModelInfo
from flux_local.sizes import CanvasRange
from flux_local.steps import Masks

INFO = "flux-local.json"
KREA = ModelInfo("FLUX.1-Krea-dev", CanvasRange(100_000, 4_200_000), 28, 4.5)
"""What applies to a FLUX.1 folder without a file of its own."""
MANIFEST = "manifest.json"
"""What a download brought: each file's size and hash."""
MAX_HEADER = 100_000_000
"""Bytes: the format's own limit."""


@dataclass(frozen=True)
class Recorded:
    """A file as the manifest knows it. Small files have no hash."""

    size: int
    sha256: str | None = None


def find(model: str) -> Path:
    """The folder of a model given by path or by name.

    A name is looked for under `weights/` here, beside the package's checkout, and inside the installed package.

    Raises:
        WeightsError: nothing there.
    """
    package = Path(__file__).resolve().parent
    places = [
        Path(model).expanduser(),
        Path("weights") / model,
        package.parent / "weights" / model,
        package / "weights" / model,
    ]
    for place in places:
        if (place / "model_index.json").is_file():
            return place.resolve()
    raise WeightsError(
        f"No model at '{model}'. Give the path of a diffusers folder (one with a model_index.json), "
        "or 'flux-krea-mini' for the embedded model."
    )


def info(folder: Path) -> ModelInfo:
    """The model's canvas range and defaults.

    Raises:
        WeightsError: the file is there but damaged.
    """
    path = folder / INFO
    if not path.is_file():
        return ModelInfo(folder.name, KREA.canvas, KREA.default_steps, KREA.default_guidance)
    try:
        found = json.loads(path.read_text())
        canvas = CanvasRange(int(found["canvas"]["min_area"]), int(found["canvas"]["max_area"]))
        defaults = found["defaults"]
        masks = Masks.read(found.get("acceleration", {}))
        return ModelInfo(
            folder.name, canvas, int(defaults["num_inference_steps"]), float(defaults["guidance_scale"]), masks
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is damaged. Copy or download the model again.") from error


def verify(folder: Path) -> None:
    """Whether every file of weights is there and whole, by sizes and headers alone: milliseconds for any model.

    Raises:
        WeightsError: a file that the manifest names, or a shard that an index names, is missing, or one is shorter or
            longer than the manifest or its header says.
    """
    for name, recorded in manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"{path} is missing. Run `flux-local download` again.")
        if path.stat().st_size != recorded.size:
            raise WeightsError(
                f"{path} has {path.stat().st_size:,} bytes where the hub's has {recorded.size:,}. "
                "Run `flux-local download` again."
            )
    for index in sorted(folder.glob("*/*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is damaged. Copy or download the model again.") from error
        for shard in sorted(shards):
            if not (index.parent / shard).is_file():
                raise WeightsError(f"{index.parent / shard} is missing. Copy or download the model again.")
    for path in sorted(folder.glob("*/*.safetensors")):
        size, said = path.stat().st_size, said_size(path)
        if size != said:
            raise WeightsError(
                f"{path} has {size:,} bytes where its header says {said:,}. Copy or download the model again."
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
        raise WeightsError(f"{path} is damaged. Run `flux-local download` again.") from error


def write_manifest(folder: Path, repository: str, revision: str, files: dict[str, Recorded]) -> None:
    record = {"repository": repository, "revision": revision, "files": {n: asdict(f) for n, f in files.items()}}
    (folder / MANIFEST).write_text(json.dumps(record, indent=2) + "\n")


def write_info(folder: Path) -> None:
    """FLUX.1's canvas range and defaults into a folder that says nothing of its own."""
    path = folder / INFO
    if not path.exists():
        canvas = {"min_area": KREA.canvas.min_area, "max_area": KREA.canvas.max_area}
        defaults = {"num_inference_steps": KREA.default_steps, "guidance_scale": KREA.default_guidance}
        path.write_text(json.dumps({"canvas": canvas, "defaults": defaults}, indent=2) + "\n")


def said_size(path: Path) -> int:
    """The bytes that a safetensors file should have: eight, its header, and up to the end of its last tensor.

    Raises:
        WeightsError: there is no header to be read.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("a header of that size cannot be")
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise WeightsError(
            f"{path} is damaged: it has no safetensors header. Copy or download the model again."
        ) from error
