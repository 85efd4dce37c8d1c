#!/usr/bin/env python3
"""What loading FLUX.1 costs on this card, and what a client waits then: seconds a gigabyte, memory, adapters.

    make load-check           (or: scripts/load_check.py --out docs/benchmarks/CARD-load.json)

Writes FLUX.1's whole architecture with random weights to a folder (36 GB; --folder says where), then loads it in a
process of its own in each way that the memory can be used, draws a picture, then a step of the largest canvas, and
compares the device's peak with the plan. Last it serves the folder and asks for pictures over HTTP, where all that
flux-local needs is installed. Needs torch, triton, diffusers, transformers, accelerate and safetensors. Ends with a
table and one JSON document, and exits 1 when a check fails. `--small` runs it at toy sizes, on a CPU too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from proof.bench import Bench, say  # noqa: E402
from proof.host import Watch  # noqa: E402
from proof.scale import REAL, SMALL, Scale  # noqa: E402

from flux_local.model import memory  # noqa: E402
from flux_local.model.checkpoint import identify  # noqa: E402
from flux_local.model.flux1 import CONFIGS, SCHEDULER  # noqa: E402

EMBEDDED = ROOT / "weights" / "flux-krea-mini"
LARGEST = 2048
WITHIN = 0.10
"""Of the plan, how far what the allocator takes may be above it."""
SPACE = 36e9
"""Bytes of disk for the model."""
HOST = 1.3
"""Times the largest shard that a load may hold in host memory, beside what is to stay there."""
SWITCH = 0.5
"""Seconds for a change of adapters in fp8."""
RANK = 16
STEPS = 28
REQUESTS = 3
"""Of each kind over HTTP, after one that does not count."""
TOKENS = 512
"""Of T5's, as FLUX.1 reads them."""
SERVERS = {"served": list[str](), "with fp8 attention": ["--fp8-attention"]}
"""By name, the flags that a server is started with; the second fails where no library does that attention."""
BODIES: dict[str, dict[str, Any]] = {
    "1024²": {"size": "1024x1024"},
    "1024² go_fast": {"size": "1024x1024", "go_fast": True},
    "1024² go_fast regular": {"size": "1024x1024", "go_fast": True, "acceleration": "regular"},
    "1024² go_fast high": {"size": "1024x1024", "go_fast": True, "acceleration": "high"},
    "512²": {"size": "512x512"},
    "512² go_fast": {"size": "512x512", "go_fast": True},
}
SMALL_BODIES: dict[str, dict[str, Any]] = {
    "128²": {"size": "128x128"},
    "128² go_fast": {"size": "128x128", "go_fast": True},
}


def write_model(folder: Path, device: str, scale: Scale) -> None:
    """A diffusers folder of the architecture; the tokenizers are the embedded model's, whose numbers are fewer."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    bench = Bench(device, scale)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    clip = CONFIGS["text_encoder"]
    if scale is SMALL:
        clip = {**clip, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "transformer": lambda: FluxTransformer2DModel(**scale.transformer),
        "vae": lambda: AutoencoderKL(**scale.vae, **kinds),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**clip)),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**scale.t5, feed_forward_proj="gated-gelu")),
    }
    for name, make in parts.items():
        module = bench.filled(make)
        module.save_pretrained(folder / name, max_shard_size="10GB")
        del module
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(EMBEDDED / name, folder / name)
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": TOKENS}))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))


def load_once(folder: Path, device: str, tier: memory.Tier, side: int, born: float) -> dict[str, Any]:
    """Loads, draws a picture and a step of the largest canvas, and changes adapters; what each of that took.

    With no more of the device than planned and a tenth: on an empty card the allocator keeps for later what it would
    give back on a full one.

    Args:
        born: when the process was started, by the clock on the wall.
    """
    import diffusers  # noqa: F401, its import is no part of loading
    import transformers  # noqa: F401

    from flux_local.model.fp8 import has_products
    from flux_local.model.loader import load

    checkpoint = identify(folder)
    cuda = device.startswith("cuda")
    if cuda:
        plan = memory.plan(
            memory.Sizes.of(checkpoint), memory.room(device), tier=tier, largest=side * side,
            emulated=not has_products(device), host_room=memory.host_room(),
        )  # fmt: skip
        at = torch.device(device).index
        whole = torch.cuda.get_device_properties(at).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (1 + WITHIN) * plan.needed / whole), at)
    with Watch() as watch:
        began = time.perf_counter()
        pipeline = load(checkpoint, device, tier=tier, largest=side * side)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    transformer = checkpoint.parts["transformer"]
    found: dict[str, Any] = {
        "tier": tier, "plan": str(pipeline.plan), "planned_gb": pipeline.plan.needed / 1e9,
        "load_s": seconds, "gb": checkpoint.nbytes / 1e9, "s_per_gb": seconds / checkpoint.nbytes * 1e9,
        "host_gb": watch.held / 1e9, "host_planned_gb": pipeline.plan.host / 1e9,
        "largest_shard_gb": max(header.size for header in transformer.headers) / 1e9,
    }  # fmt: skip
    if tier != "offload":
        first = min(side, 1024)
        picture = pipeline.begin(pipeline.text.encode("first"), first, first, seed=0, steps=STEPS, guidance=4.5)
        while picture.steps_left:
            pipeline.denoiser.advance([picture])
        pipeline.vae.decode(picture.latents, first, first)
        found["start_to_first_picture_s"] = time.time() - born
    picture = pipeline.begin(pipeline.text.encode("a step"), side, side, seed=0, steps=2, guidance=4.5)
    pipeline.denoiser.advance([picture])
    pipeline.denoiser.advance([picture])
    decoded = min(side, 1024)
    small = pipeline.begin(pipeline.text.encode("a step"), decoded, decoded, seed=0, steps=1, guidance=4.5)
    pipeline.vae.decode(small.latents, decoded, decoded)
    if cuda:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    if pipeline.fast is not None and pipeline.adapters is not None:
        found["switch_s"] = switches(pipeline, folder)
    return found


def switches(pipeline: Any, folder: Path) -> dict[str, float]:
    """Seconds to a set of adapters on every layer, from it, and back to it."""
    from safetensors.torch import save_file

    from flux_local.model.lora import shapes

    transformer, factors = pipeline.fast.transformer, {}
    for name, (out, into) in shapes(transformer).items():
        factors[f"transformer.{name}.lora_A.weight"] = torch.randn(RANK, into) * into**-0.5
        factors[f"transformer.{name}.lora_B.weight"] = 0.01 * torch.randn(out, RANK)
    path = folder / "adapter.safetensors"
    save_file(factors, path)
    choice = ((str(path), 1.0, path.stat().st_mtime_ns),)
    taken = {}
    for name, wanted in (("first", choice), ("off", ()), ("again", choice), ("off again", ()), ("held", choice)):
        began = time.perf_counter()
        pipeline.adapters.use(transformer, wanted)
        if transformer.device.type == "cuda":
            torch.cuda.synchronize()
        taken[name] = time.perf_counter() - began
    return taken


def judge(found: dict[str, Any]) -> list[str]:
    """What is not as promised."""
    failed = []
    if found["host_gb"] > HOST * found["largest_shard_gb"] + found["host_planned_gb"]:
        failed.append(f"{found['tier']}: {found['host_gb']:.1f} GB of host memory")
    if "reserved_gb" in found and found["reserved_gb"] > (1 + WITHIN) * found["planned_gb"]:
        failed.append(f"{found['tier']}: {found['reserved_gb']:.1f} GB, planned {found['planned_gb']:.1f}")
    if "switch_s" in found and found["switch_s"]["held"] > SWITCH:
        failed.append(f"{found['tier']}: {found['switch_s']['held']:.2f} s to change adapters")
    return failed


def child(folder: Path, device: str, tier: str, side: int) -> dict[str, Any]:
    """`load_once` in a process of its own, so that nothing is left of the one before."""
    command = [sys.executable, __file__, "--child", tier, "--folder", str(folder), "--device", device]
    command += ["--side", str(side), "--born", str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"tier": tier, "failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def served(folder: Path, device: str, flags: list[str], bodies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Seconds to ready and to the first picture, and what a lone client waits for each kind of request."""
    try:
        from flux_local import bench
        from flux_local.errors import StartError
    except ImportError as error:
        return {"skipped": f"not installed ({error})"}
    found: dict[str, Any] = {"flags": flags}
    try:
        with contextlib.ExitStack() as stack:
            server = bench.own_server(["--model", str(folder), "--devices", device, *flags])
            url, found["ready_s"] = stack.enter_context(server)
            client = stack.enter_context(bench.client_of(url, None, 1))
            found["server"] = bench.ready(client)
            for name, body in bodies.items():
                request = bench.requester(client, {"prompt": "a picture", "steps": STEPS, **body})
                first = bench.timed(partial(request, -1))
                found.setdefault("first_picture_s", found["ready_s"] + first)
                found[name] = statistics.median(bench.timed(partial(request, i)) for i in range(REQUESTS))
    except StartError as error:
        found["failed"] = str(error)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes: a test of this script")
    parser.add_argument("--tiers", default=",".join(memory.TIERS), help="which to load, by commas")
    parser.add_argument("--servers", default=",".join(SERVERS), help="which to ask over HTTP, by commas")
    parser.add_argument("--folder", type=Path, help="where to write the model, 36 GB (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, default=LARGEST, help=argparse.SUPPRESS)
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(load_once(options.folder, options.device, options.child, options.side, options.born)))
        return 0
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("load_check: torch sees no GPU. Try --device cpu --small to see what this does.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("accelerate") is None:
        print("load_check: text encoders are loaded by accelerate: pip install accelerate", file=sys.stderr)
        return 2
    disk = options.folder or Path(tempfile.gettempdir())
    if not disk.is_dir():
        print(f"load_check: there is no folder {disk}", file=sys.stderr)
        return 2
    if not options.small and (free := shutil.disk_usage(disk).free) < SPACE:
        print(f"load_check: {disk} has {free / 1e9:.0f} GB free, and {SPACE / 1e9:.0f} are needed. Name a larger "
              "place with --folder (make: FOLDER=).", file=sys.stderr)  # fmt: skip
        return 2
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place) / "model"
        began = time.perf_counter()
        write_model(folder, options.device, SMALL if options.small else REAL)
        say(f"model written in {time.perf_counter() - began:.0f} s")
        if options.device.startswith("cuda"):
            torch.cuda.empty_cache()
        found: list[dict[str, Any]] = []
        server: dict[str, Any] = {}
        document: dict[str, Any] = {"loads": found, "served": server, "failed": [], "small": options.small}

        def write() -> None:  # what is known by then, whatever comes after
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(document, indent=2) + "\n")

        for tier in filter(None, options.tiers.split(",")):
            found.append(child(folder, options.device, tier, 128 if options.small else options.side))
            say(json.dumps(found[-1]))
            write()
        kinds = SMALL_BODIES if options.small else BODIES
        for name in filter(None, options.servers.split(",")):
            flags = SERVERS[name]
            wanted = {kind: body for kind, body in kinds.items() if not flags or "go_fast" in body}
            server[name] = served(folder, options.device, flags, wanted)
            say(f"{name}: {json.dumps(server[name])}")
            write()
    failed = [f"{one['tier']}: {one['failed']}" for one in found if "failed" in one]
    failed += [reason for one in found if "failed" not in one and not options.small for reason in judge(one)]
    if "failed" in server.get("served", {}):
        failed.append(f"served: {server['served']['failed']}")
    say(f"\n{'tier':10}{'load s':>8}{'s a GB':>8}{'host GB':>9}{'planned':>9}{'peak GB':>9}{'reserved':>10}")
    for one in found:
        if "failed" not in one:
            say(f"{one['tier']:10}{one['load_s']:8.1f}{one['s_per_gb']:8.2f}{one['host_gb']:9.2f}"
                f"{one['planned_gb']:9.1f}{one.get('peak_gb', 0):9.1f}{one.get('reserved_gb', 0):10.1f}")  # fmt: skip
    say(f"\n{len(failed)} failed{': ' + '; '.join(failed) if failed else ''}")
    document["failed"] = failed
    write()
    print(json.dumps(document))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
