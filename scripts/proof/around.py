"""What lies around the steps, and whole pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from flux_local import png
from flux_local.model.autoencoder import AutoencoderKL
from flux_local.model.denoiser import Denoiser
from flux_local.model.graphs import Graphs, recorded
from flux_local.model.latents import initial_noise
from flux_local.model.parts import Held, built
from flux_local.model.t5 import T5Encoder, fastest
from flux_local.model.vae import Autoencoder
from flux_local.steps import LEVELS, formula

from .bench import Bench, say


def around(bench: Bench) -> None:
    """What lies around the steps, then whole pictures: prompt, steps, decoding, PNG."""
    from PIL import Image, PngImagePlugin
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**bench.scale.t5, feed_forward_proj="gated-gelu")
    theirs = bench.filled(lambda: T5EncoderModel(config))
    t5 = built(T5Encoder, config.to_dict(), Held(theirs.state_dict()))
    tokens = torch.arange(bench.scale.text, device=bench.device)[None]
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = Autoencoder(bench.filled(lambda: AutoencoderKL(bench.scale.vae | kinds | {"sample_size": 1024})), bench.ops)
    timings = bench.report.timings
    with torch.inference_mode():
        read = reader(bench, t5)
        for name, work in (("t5_ms", read), ("t5_by_transformers_ms", lambda ids: theirs(ids).last_hidden_state)):
            timings[name] = bench.milliseconds(lambda: work(tokens))  # noqa: B023
        say(f"  T5: {timings['t5_ms']:.2f} ms, by transformers {timings['t5_by_transformers_ms']:.2f} ms")
        if isinstance(read, Graphs):
            bench.report.check("CUDA graphs, T5", bool(read.captured) and not read.refused)
        for side in bench.scale.sides:
            noise = initial_noise(0, side, side).to(bench.device, bench.dtype)
            timings[f"decode_{side}_ms"] = bench.milliseconds(lambda: vae.decode(noise, side, side))  # noqa: B023
            say(f"  decoding at {side}²: {timings[f'decode_{side}_ms']:.2f} ms")
        whole = {}
        transformers = [t for t in (bench.ours, bench.fast, bench.fastest) if t is not None]
        modes = [(bench.scale.sides[0], *mode) for mode in product(transformers, LEVELS)]
        modes += [(bench.scale.sides[-1], transformer, "none") for transformer in transformers]
        for side, transformer, level in modes:
            denoiser, mask = Denoiser(transformer), formula(level, bench.scale.steps)
            precision = "own precision" if transformer is bench.ours else "fp8"
            name = f"{side}² {precision}, attention {transformer.attention_by}, acceleration {level}"
            taken = []
            for _ in range(2):
                if bench.cuda:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                read(tokens)
                pictures = bench.pictures(transformer, side, 1, bench.scale.steps)
                pictures[0].computed = mask
                while pictures[0].steps_left:
                    denoiser.advance(pictures)
                pixels = vae.decode(pictures[0].latents, side, side)
                png.encode(Image.frombytes("RGB", (side, side), pixels), PngImagePlugin.PngInfo())
                taken.append(time.perf_counter() - began)
            whole[name] = min(taken)
            say(f"  whole picture, {name}, {bench.scale.steps} steps: {whole[name]:.3f} s")
        timings["picture_s"] = whole


def reader(bench: Bench, t5: T5Encoder) -> Callable[[Tensor], Tensor]:
    """T5 as the server has it on this device."""
    if not bench.cuda:
        return t5
    device = torch.device(bench.device)
    found = fastest(t5, bench.scale.text, device)
    bench.report.check("T5 takes the fused attention", found is not t5)
    return recorded(found, device)
