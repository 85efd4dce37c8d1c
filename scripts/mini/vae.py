"""Stage one: the autoencoder. Learns to carry flat drawings through 16 latent channels at an eighth of the size.

Knows nothing of prompts or of the transformer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from .drawings import draw, random_scene
from .run import Run

SIDES = ((64, 16), (64, 16), (64, 16), (96, 7), (128, 4))  # (side in pixels, pictures in a batch)


def new_autoencoder() -> AutoencoderKL:
    """FLUX.1's autoencoder class and latent geometry, thin enough for a CPU; no attention, so any size will do."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        sample_size=192,
    )
    start_transparent(vae)
    return vae


def start_transparent(vae: AutoencoderKL) -> None:
    """Weights under which a flat picture passes almost unchanged in size, and residual branches start near zero.

    PyTorch's own initialisation shrinks the signal by a factor of 0.6 a convolution, about 0.004 in all: flat
    colours then take thousands of steps to get through. The posterior starts narrow for the same reason.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d):
            continue
        fan_in = module.weight[0].numel()
        assert module.bias is not None
        nn.init.zeros_(module.bias)
        if name.endswith("conv1"):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            continue
        nn.init.normal_(module.weight, 0.0, 0.2 * fan_in**-0.5)
        if not name.endswith("conv2"):
            centre = module.kernel_size[0] // 2
            with torch.no_grad():
                tap = module.weight[:, :, centre, centre]
                tap += torch.randn_like(tap) * module.in_channels**-0.5
    latent_channels = vae.config.latent_channels
    with torch.no_grad():
        vae.encoder.conv_out.weight[latent_channels:] *= 0.1
    nn.init.constant_(vae.encoder.conv_out.bias[latent_channels:], -6.0)


def pictures(rng: random.Random, count: int, width: int, height: int) -> torch.Tensor:
    """[count, 3, height, width] in −1 … 1."""
    drawn = [np.asarray(draw(random_scene(rng, width, height), width, height)) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def batches(seed: int, start: int) -> Iterator[torch.Tensor]:
    """The training stream from step `start`: each step's pictures depend on the seed and the step alone."""
    step = start
    while True:
        rng = random.Random(f"{seed} vae {step}")
        side, count = SIDES[step % len(SIDES)]
        yield pictures(rng, count, side, side)
        step += 1


def train(run: Run, steps: int) -> AutoencoderKL:
    """Trains for `steps`, going on from the last checkpoint; afterwards sets scale and shift of the latents."""
    torch.manual_seed(run.seed)
    vae = new_autoencoder().to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    start = run.resume("vae", vae, optimiser)
    rate = run.one_cycle(steps)
    stream = batches(run.seed, start)
    with run.progress("autoencoder", steps, start) as progress:
        for step in range(start, steps):
            x = next(stream).to(run.device, memory_format=torch.channels_last)
            torch.manual_seed(run.seed * 1_000_003 + step)
            with run.autocast():
                posterior = vae.encode(x).latent_dist
                y = vae.decode(posterior.sample()).sample.float()
            l1 = F.l1_loss(y, x)
            edge = torch.stack([F.l1_loss(a, b) for a, b in zip(edges(y), edges(x), strict=True)]).sum()
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            loss = l1 + 0.5 * edge + 1e-4 * kl + F.mse_loss(y, x)
            run.step(optimiser, loss, vae, rate(step))
            progress(step + 1, l1=l1.item(), edge=edge.item(), kl=kl.item())
            run.checkpoint("vae", step + 1, steps, vae, optimiser)
    vae.eval()
    measure_latents(run, vae)
    return vae


@torch.no_grad()
def measure_latents(run: Run, vae: AutoencoderKL) -> None:
    """Sets the scale and shift that give the latents mean 0 and deviation 1, as FLUX.1's own config does."""
    rng = random.Random(f"{run.seed} latents")
    latents = torch.cat([vae.encode(pictures(rng, 8, 128, 128).to(run.device)).latent_dist.mean for _ in range(16)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())


@torch.no_grad()
def psnr(vae: AutoencoderKL, device: torch.device, side: int, count: int = 64) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of fresh drawings, after rounding to 8 bits."""
    rng = random.Random("psnr")
    values = []
    for _ in range(count // 4):
        x = pictures(rng, 4, side, side).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        error = (((y.clamp(-1, 1) - x) * 127.5).round() ** 2).mean(dim=(1, 2, 3))
        values += (20 * np.log10(255) - 10 * torch.log10(error.clamp(min=1e-3))).tolist()
    return float(np.mean(values))
