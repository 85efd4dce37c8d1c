"""The autoencoder as a GPU runs it, under Triton's CPU interpreter: its kernels, and biases that what follows adds."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from flux_local.model.denoiser import initial_noise
from flux_local.model.loader import Pipeline
from flux_local.model.ops import Ops
from flux_local.model.vae import Autoencoder, finished

pytest.importorskip("triton", reason="Triton exists for Linux only")


def channels_last(seed: int, *shape: int) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def kernels() -> Any:
    from flux_local.model import vae_kernels

    return vae_kernels


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, where a GPU says nothing
class TestGroupNorm:
    CHANNELS, GROUPS = 512, 32

    def normed(self, norm: Any, x: torch.Tensor, addend: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = (channels_last(seed, 1, self.CHANNELS, 1, 1).flatten().to(x) for seed in (1, 2))
        found: torch.Tensor = norm(x, self.GROUPS, weight, bias, 1e-6, addend)
        return found

    def test_sums_of_many_blocks(self, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two at a time, in each of which the picture is another."""
        monkeypatch.setattr(kernels, "SUMS", 2 * self.CHANNELS // self.GROUPS)
        monkeypatch.setattr(kernels, "BLOCKS", 6)
        x = channels_last(0, 2, self.CHANNELS, 16, 17) * torch.linspace(0.1, 3, 2 * 16 * 17).view(2, 1, 16, 17)
        found = self.normed(kernels.group_norm_silu, x)
        torch.testing.assert_close(found.double(), self.normed(Ops().group_norm_silu, x.double()), atol=1e-5, rtol=0)

    def test_an_addend_is_as_good_as_the_sum(self, kernels: Any) -> None:
        """Even one that takes away what is most of the picture."""
        addend = torch.linspace(-100, 100, self.CHANNELS)
        x = channels_last(0, 1, self.CHANNELS, 8, 9) - addend[:, None, None]
        found = self.normed(kernels.group_norm_silu, x, addend)
        truth = self.normed(Ops().group_norm_silu, x.double(), addend.double())
        assert float((found - truth).norm() / truth.norm()) < 1e-3

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_what_is_not_finite_stays_so(self, kernels: Any, value: float) -> None:
        """In its group and nowhere else: else a failed picture would look finite."""
        x = channels_last(0, 1, self.CHANNELS, 8, 9)
        x[0, 17, 3, 4] = value
        found = self.normed(kernels.group_norm_silu, x)
        finite = found.isfinite().flatten(2).all(dim=2).view(self.GROUPS, -1)
        assert finite.any(dim=1).tolist() == [group != 1 for group in range(self.GROUPS)]

    def test_constant_pictures(self, kernels: Any) -> None:
        """Have no variance, and none that rounding makes less than nothing."""
        x = torch.full((1, self.CHANNELS, 9, 10), 100.1).contiguous(memory_format=torch.channels_last)
        assert bool(self.normed(kernels.group_norm_silu, x).isfinite().all())


def test_a_picture_is_the_same_with_biases_added_later(pipeline: Pipeline, kernels: Any) -> None:
    """By what follows each convolution: the next norm, the sum of a block, or both of the next block."""
    vae, latents = copy.deepcopy(pipeline.vae.vae), initial_noise(0, 64, 48)
    for seed, conv in enumerate(m for m in vae.decoder.modules() if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.normal_(conv.bias, generator=torch.Generator().manual_seed(seed))
    expected = finished(Autoencoder(vae).layers(latents, 64, 48))
    names = ("group_norm_silu", "residual_sum", "doubled")
    for ops in (Ops(), replace(Ops(), **{name: getattr(kernels, name) for name in names})):
        apart = Autoencoder(vae, ops)
        apart.biases_apart = True
        found = finished(apart.layers(latents, 64, 48))
        np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-4)
