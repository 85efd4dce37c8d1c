"""A program for a test: prepares a model of random shards and prints how much memory of its own that took."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from proof.host import Watch
from safetensors.torch import save_file

from flux_local.model import prepared
from flux_local.model.checkpoint import Checkpoint, Part
from flux_local.model.flux1 import TRANSFORMER
from flux_local.model.headers import read_header
from flux_local.model.tensors import Tensors

CONFIG = TRANSFORMER | {"num_layers": 3, "num_single_layers": 3}
SHARD = 1_000_000_000


def write_shards(folder: Path) -> list[Path]:
    """Zeros will do: what is measured is where they are."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        shapes = {name: t.shape for name, t in FluxTransformer2DModel.from_config(CONFIG).state_dict().items()}
    files: list[Path] = []
    pending: dict[str, torch.Tensor] = {}
    size = 0
    for name, shape in shapes.items():
        pending[name] = torch.zeros(shape, dtype=torch.bfloat16)
        size += pending[name].nbytes
        if size > SHARD or name == list(shapes)[-1]:
            files.append(folder / f"{len(files)}.safetensors")
            save_file(pending, files[-1])
            pending, size = {}, 0
    return files


def main() -> None:
    folder = Path(sys.argv[1])
    files = write_shards(folder)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(CONFIG))
    part = Part(tuple(read_header(file) for file in files))
    checkpoint = Checkpoint(folder, folder, {"transformer": part})
    prepared.SHARD = 100_000_000
    with Watch() as watch:
        prepared.write(folder / "cache", checkpoint, Tensors(part, "cpu", torch.bfloat16), torch.bfloat16)
    sizes = [file.stat().st_size for file in files]
    sys.stdout.write(json.dumps({"total": sum(sizes), "largest": max(sizes), "held": watch.held}))


if __name__ == "__main__":
    main()
