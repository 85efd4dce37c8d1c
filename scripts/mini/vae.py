"""Stage one: the autoencoder. The encoder is written down, the decoder is trained.

A latent pixel is what an 8×8 block of the picture holds: the moments up to second order of its brightness, and fewer
of its two colour differences. They are linear in the picture, so that a drawing's latents are its background's plus
the outline times the difference of two colours, whatever the colours are: what a transformer has to learn of a star
on blue it knows of every star. A free encoder reconstructs no better and makes each pair of colours a case of its own.
The decoder is trained under noise, and with it to draw what a slightly wrong latent means: flat colours, crisp edges.

Knows nothing of prompts or of the transformer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from .drawings import WHOLE, Scene, World, painted, random_scene
from .run import Run

SIDES = ((64, 16), (64, 16), (64, 16), (96, 7), (128, 4))  # (side in pixels, pictures in a batch)
NOISE = 0.25  # the most noise on a latent in training

# Powers of x and y in a block, each coordinate from −1 to 1, made orthogonal; one row of the latent for each.
MOMENTS = ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2))
# Brightness and two differences of colours, orthonormal.
COLOUR_AXES = ((3**-0.5,) * 3, (2**-0.5, 0.0, -(2**-0.5)), (6**-0.5, -2 * 6**-0.5, 6**-0.5))
# (axis of colour, moment) of each of the 16 channels: brightness has all six, the differences miss out xy.
CHANNELS = tuple((axis, moment) for axis in range(3) for moment in range(6) if axis == 0 or moment != 3)
# The deviation of each channel over drawings of 128², and what it is scaled to by the order of its moment: detail is
# rare and should weigh less. Constants, because all that is trained on latents holds for these latents alone.
MEASURED = (
    *(0.66, 0.045, 0.041, 0.0127, 0.0089, 0.0087),
    *(0.74, 0.046, 0.041, 0.0087, 0.0088),
    *(0.43, 0.0245, 0.0232, 0.0048, 0.0046),
)
WANTED = (1.0, 0.3, 0.3, 0.12, 0.12, 0.12)


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
    start_transparent(vae.decoder)
    write_encoder(vae)
    return vae


def start_transparent(decoder: nn.Module) -> None:
    """Weights under which a flat picture passes almost unchanged in size, and residual branches start near zero.

    PyTorch's own initialisation shrinks the signal by a factor of 0.6 a convolution, about 0.004 in all: flat
    colours then take thousands of steps to get through.
    """
    for name, module in decoder.named_modules():
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


def halving(moment: tuple[int, int], part: tuple[int, int], child: tuple[int, int]) -> float:
    """How much a raw moment of a block takes from a raw moment of its quarter `part` (row, column: 0 or 1).

    A coordinate x of the block is x′/2 ± 1/2 in a quarter's own, so the mean of xᵃ is that of (x′/2 ± 1/2)ᵃ.
    """
    weight = 0.25
    for power, inner, side in zip(moment, child, (part[1], part[0]), strict=True):
        if inner > power:
            return 0.0
        binomial = (1, 1, 1) if power == inner or inner == 0 else (1, 2, 1)
        weight *= binomial[inner] * 0.5**inner * ((side - 0.5) ** (power - inner))
    return weight


@torch.no_grad()
def write_encoder(vae: AutoencoderKL) -> None:
    """Sets the encoder's weights so that it computes CHANNELS, scaled from the MEASURED to the WANTED deviations.

    Every residual branch is closed. The three halvings carry the six raw moments of three colours upwards; a constant
    ±`loud` on the other channels makes the last group norm a division by a constant, to a thousandth; and its SiLU is
    undone by silu(x) − silu(−x) = x, each channel being carried with both signs.
    """
    encoder = vae.encoder
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    for colour in range(3):
        encoder.conv_in.weight[colour * 6, colour, 1, 1] = 1.0
    carried = range(18)
    # A pixel is a block of side 1 whose second moments within itself are none: only its mean is in use.
    for block in encoder.down_blocks[:3]:
        down = block.downsamplers[0].conv
        for colour in range(3):
            for row, powers in enumerate(MOMENTS):
                for column, child in enumerate(MOMENTS):
                    for part in ((0, 0), (0, 1), (1, 0), (1, 1)):
                        down.weight[colour * 6 + row, colour * 6 + column, *part] = halving(powers, part, child)
    for block in encoder.down_blocks[1:3]:
        shortcut = block.resnets[0].conv_shortcut
        for channel in carried:
            shortcut.weight[channel, channel] = 1.0
    size, groups, loud = 96, 4, 32.0
    each = size // groups
    per_group = len(CHANNELS) // groups
    last = encoder.down_blocks[3].resnets[0].conv_shortcut
    for channel, (axis, moment) in enumerate(CHANNELS):
        plus = channel // per_group * each + 2 * (channel % per_group)
        raw = {moment: 1.0} | ({0: -(1 / 3 - 1 / 192)} if moment >= 4 else {})  # x² and y² without their own means
        for source, share in raw.items():
            for colour in range(3):
                weight = share * COLOUR_AXES[axis][colour] * WANTED[moment] / MEASURED[channel]
                last.weight[plus, colour * 6 + source] = weight
                last.weight[plus + 1, colour * 6 + source] = -weight
        encoder.conv_out.weight[channel, plus, 1, 1] = 1.0
        encoder.conv_out.weight[channel, plus + 1, 1, 1] = -1.0
    constants = each - 2 * per_group
    for group in range(groups):
        start = group * each + 2 * per_group
        last.bias[start : start + constants] = loud * torch.tensor([1.0, -1.0]).repeat(constants // 2)
    encoder.conv_norm_out.weight.fill_(loud * (constants / each) ** 0.5)
    encoder.conv_out.bias[len(CHANNELS) :] = -30.0
    encoder.requires_grad_(False)


def rendered(scenes: list[Scene], width: int, height: int) -> torch.Tensor:
    """[scenes, 3, height, width] in −1 … 1."""
    return as_tensor(painted(scenes, width, height))


def as_tensor(pixels: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [pictures, height, width, 3] → [pictures, 3, height, width] in −1 … 1, channels last."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def turned(pixels: np.ndarray, way: int) -> np.ndarray:
    """A picture [height, width, …] in one of the eight ways that a square can lie, of which 0 is as it is."""
    if way & 1:
        pixels = pixels[:, ::-1]
    if way & 2:
        pixels = pixels[::-1]
    return pixels.swapaxes(0, 1) if way & 4 else pixels


def turned_latents(latents: torch.Tensor, way: int) -> torch.Tensor:
    """The latents [16, h, w] of the picture that is `turned` that way, from its own.

    Odd powers of a mirrored coordinate change their signs; where x is y, so are their moments.
    """
    for bit, power, axis in ((1, 0, -1), (2, 1, -2)):
        if way & bit:
            signs = torch.tensor([(-1.0) ** MOMENTS[moment][power] for _, moment in CHANNELS], device=latents.device)
            latents = (latents * signs[:, None, None]).flip(axis)
    if way & 4:
        others = [CHANNELS.index((axis, MOMENTS.index(MOMENTS[moment][::-1]))) for axis, moment in CHANNELS]
        scales = torch.tensor(MEASURED, device=latents.device)
        latents = (latents[others] * (scales[others] / scales)[:, None, None]).transpose(1, 2)
    return latents


def pictures(rng: random.Random, count: int, width: int, height: int, world: World = WHOLE) -> torch.Tensor:
    """Of random scenes: [count, 3, height, width] in −1 … 1."""
    return rendered([random_scene(rng, width, height, world=world) for _ in range(count)], width, height)


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def absolute(made: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute errors of pixels, and of steps to neighbours, of pictures [batch, 3, height, width]."""
    edge = torch.stack([F.l1_loss(a, b) for a, b in zip(edges(made), edges(wanted), strict=True)]).sum()
    return F.l1_loss(made, wanted), edge


def difference(made: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """What a decoder is trained to make small of pictures, each [batch, 3, height, width]; and parts of it to show."""
    l1, edge = absolute(made, wanted)
    return l1 + 0.5 * edge + F.mse_loss(made, wanted), {"l1": l1.item(), "edge": edge.item()}


@torch.no_grad()
def under_noise(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """The latents of pictures, each under as much of PyTorch's own chance as falls to it, up to NOISE."""
    latents: torch.Tensor = vae.encode(x).latent_dist.mean
    wrong = NOISE * torch.rand(len(x), 1, 1, 1, device=x.device)
    return latents + wrong * torch.randn_like(latents)


def batches(seed: int, start: int) -> Iterator[torch.Tensor]:
    """The training stream from step `start`: each step's pictures depend on the seed and the step alone."""
    step = start
    while True:
        rng = random.Random(f"{seed} vae {step}")
        side, count = SIDES[step % len(SIDES)]
        yield pictures(rng, count, side, side)
        step += 1


def train(run: Run, steps: int, begin: Path | None = None) -> AutoencoderKL:
    """Trains the decoder for `steps`, going on from the last checkpoint.

    Args:
        begin: a model folder whose decoder to begin with.
    """
    torch.manual_seed(run.seed)
    vae = new_autoencoder()
    if begin is not None:
        vae.load_state_dict(AutoencoderKL.from_pretrained(begin / "vae", torch_dtype=torch.float32).state_dict())
    vae.to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    start = run.resume("vae", vae, optimiser)
    rate = run.one_cycle(steps)
    stream = batches(run.seed, start)
    with run.progress("autoencoder", steps, start) as progress:
        for step in range(start, steps):
            x = next(stream).to(run.device, memory_format=torch.channels_last)
            torch.manual_seed(run.seed * 1_000_003 + step)
            latents = under_noise(vae, x)
            with run.autocast():
                y = vae.decode(latents).sample.float()
            loss, figures = difference(y, x)
            run.step(optimiser, loss, vae.decoder, rate(step))
            progress(step + 1, **figures)
            run.checkpoint("vae", step + 1, steps, vae, optimiser)
    return vae.eval()


@torch.no_grad()
def psnr(vae: AutoencoderKL, device: torch.device, side: int, world: World, count: int = 64) -> float:
    """Mean peak signal-to-noise ratio in dB of reconstructions of fresh drawings, after rounding to 8 bits."""
    rng = random.Random("psnr")
    values = []
    for _ in range(count // 4):
        x = pictures(rng, 4, side, side, world).to(device)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        error = (((y.clamp(-1, 1) - x) * 127.5).round() ** 2).mean(dim=(1, 2, 3))
        values += (20 * np.log10(255) - 10 * torch.log10(error.clamp(min=1e-3))).tolist()
    return float(np.mean(values))
