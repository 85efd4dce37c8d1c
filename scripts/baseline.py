#!/usr/bin/env python3
"""What flux-local is measured against: a plain loop over diffusers' `FluxPipeline` behind HTTP, with a lock.

    scripts/baseline.py FOLDER --port 8001

One request at a time, first come first served, PNG at the same fast level: what one writes in an afternoon, done well.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import logging
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import FluxPipeline
from fastapi import FastAPI, Request

PNG_LEVEL = 1


def create_app(folder: Path, device: str) -> FastAPI:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
    pipeline.set_progress_bar_config(disable=True)
    length = pipeline.tokenizer_2.model_max_length
    turn = asyncio.Lock()
    app = FastAPI()

    def draw(body: dict[str, Any]) -> str:
        width, height = map(int, body["size"].split("x"))
        picture = pipeline(
            body["prompt"],
            width=width,
            height=height,
            num_inference_steps=body["steps"],
            guidance_scale=4.5,
            max_sequence_length=length,
            generator=torch.Generator("cpu").manual_seed(body["seed"]),
        ).images[0]
        out = io.BytesIO()
        picture.save(out, "PNG", compress_level=PNG_LEVEL)
        return base64.b64encode(out.getvalue()).decode()

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> dict[str, Any]:
        body = await request.json()
        async with turn:
            return {"data": [{"b64_json": await asyncio.to_thread(draw, body)}]}

    return app


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--port", type=int, default=8001)
    p.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    o = p.parse_args()
    app = create_app(o.folder, o.device)
    logging.disable(logging.WARNING)
    print(f"address http://127.0.0.1:{o.port}/v1", flush=True)
    uvicorn.run(app, port=o.port, log_level="error")


if __name__ == "__main__":
    main()
