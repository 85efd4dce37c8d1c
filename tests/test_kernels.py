"""The Triton kernels under Triton's CPU interpreter: against the torch forms in float64, whatever the shapes."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flux_local.model import selfcheck
from flux_local.model.ops import Heads, Layout, Ops, Site, Vectors, scatter_into
from flux_local.model.selfcheck import FP8_TOLERANCE, TRIALS, Data, Sizes
from tests.servers import ROOT, environment

pytest.importorskip("triton", reason="Triton exists for Linux only")
DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 5e-3}  # the interpreter truncates where a GPU rounds
SITE = Site(Vectors(0, 1, 2), Vectors(3, 4, 5))


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    from flux_local.model.kernels import KERNELS

    return KERNELS


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


SIZES = st.builds(
    Sizes,
    heads=st.integers(1, 3),
    head_size=st.sampled_from([2, 6, 16, 48]),
    layout=st.builds(Layout, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)),
    channels=st.sampled_from([4, 24, 96]),
    groups=st.sampled_from([1, 2, 4]),
    side=st.integers(1, 19),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(TRIALS.keys() - {"attention", "attention_quantised", "linear_gelu"}))
@example(sizes=Sizes(11, 16, Layout(2, 3, 40)))  # more heads and tokens than one program takes
@given(sizes=SIZES)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(kernels: dict[str, Any], name: str, dtype: torch.dtype, sizes: Sizes) -> None:
    """The kernel is as near to float64 as rounding allows."""
    truth = TRIALS[name](getattr(Ops(), name), sizes, Data("cpu", dtype, torch.float64))
    found = TRIALS[name](kernels[name], sizes, Data("cpu", dtype, dtype))
    assert found.dtype == dtype
    limit = FP8_TOLERANCE if name.endswith("quantised") else ROUNDING[dtype]
    assert distance(found, truth) <= limit


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # numpy's, for sigmoid(−∞)
@pytest.mark.parametrize("value", [0.0, 1e-20, -3e4, 1e9])
def test_edge_values(kernels: dict[str, Any], value: float) -> None:
    """Constant rows have no variance, and large ones must not overflow on the way."""
    layout = Layout(1, 1, 2)
    x = torch.full((3, 40), value)
    table = torch.ones(1, 6, 40)
    normed = kernels["modulated_norm"](x, table, layout, SITE)
    torch.testing.assert_close(normed, Ops().modulated_norm(x, table, layout, SITE), atol=1e-5, rtol=1e-5)
    found, expected = kernels["gelu_quantised"](x, None), Ops().gelu_quantised(x, None)
    torch.testing.assert_close(found.values.float() * found.scale, expected.values.float() * expected.scale)


def test_every_number_is_rounded_to_fp8_as_torch_rounds_it(kernels: dict[str, Any]) -> None:
    """All e4m3 numbers, the midpoints between them, and what lies just beside."""
    grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([middle.nextafter(grid[1:]), middle.nextafter(grid[:-1])])
    row = torch.cat([grid, middle, near, torch.tensor([448.0])])
    rows = torch.stack([row, -row])
    values, scale = kernels["quantised"](rows)
    expected, _ = Ops().quantised(rows)
    assert scale.tolist() == [[1.0], [1.0]]
    assert torch.equal(values.float(), expected.float())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16], ids=str)
def test_heads_go_back_to_their_rows(dtype: torch.dtype) -> None:
    from flux_local.model import kernels

    layout = Layout(2, 3, 4)
    tokens = torch.randn(2, 7, 3, 6).to(dtype)
    found, expected = (torch.zeros(14, 40) for _ in range(2))
    kernels.scatter_into(found[:, 10:28], tokens, layout, scale := torch.rand(2, 3))
    scatter_into(expected[:, 10:28], tokens, layout, scale)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["quantised", "gelu_quantised"])
def test_what_is_not_a_number_leaves_no_product_finite(kernels: dict[str, Any], name: str) -> None:
    """Else a failed picture would look finite."""
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    rows[0, 7], rows[2, 3] = float("nan"), torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for quantised in (kernels[name], getattr(Ops(), name)):
        values, scale = quantised(rows)
        finite = (values.float().sum(dim=1, keepdim=True) * scale).isfinite().flatten()
        assert finite.tolist() == [False, True, False]


class TestSelfCheck:
    """A kernel that is wrong or broken is not used, and the rest are."""

    SIZES = Sizes(2, 16, Layout(1, 3, 4), channels=8, groups=2, side=5)

    def test_all_good(self, kernels: dict[str, Any]) -> None:
        ops, findings = selfcheck.choose(kernels, self.SIZES, "cpu", torch.bfloat16)
        assert all(finding.good for finding in findings)
        assert ops.add_norm is kernels["add_norm"]

    def test_wrong_and_broken_ones(self, kernels: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        def slightly_wrong(x: torch.Tensor, *rest: Any) -> torch.Tensor:
            return 1.05 * Ops().modulated_norm(x, *rest)

        def broken(*_: Any) -> None:
            raise RuntimeError("no such instruction")

        def not_finite(x: torch.Tensor, groups: int, *rest: Any) -> torch.Tensor:
            return torch.full_like(x, float("nan"))

        bad = {"modulated_norm": slightly_wrong, "norm_rotate_": broken, "group_norm_silu": not_finite}
        ops, findings = selfcheck.choose(kernels | bad, self.SIZES, "cpu", torch.bfloat16)
        assert {finding.name for finding in findings if not finding.good} == set(bad)
        assert ops.modulated_norm is Ops().modulated_norm
        assert ops.norm_rotate_ is Ops().norm_rotate_
        assert ops.group_norm_silu is Ops().group_norm_silu
        assert ops.quantised is kernels["quantised"]
        assert "no such instruction" in caplog.text


class TestFp8Attention:
    """The first library that is there and right is taken, and named; the others say why not."""

    SIZES = Sizes(2, 16, Layout(2, 3, 4))

    def chosen(self, monkeypatch: pytest.MonkeyPatch, **libraries: Any) -> tuple[Ops, list[str]]:
        monkeypatch.setattr(selfcheck, "LIBRARIES", libraries)
        ops, findings = selfcheck.with_fp8_attention(Ops(), self.SIZES, "cpu", torch.bfloat16)
        return ops, [f"{finding.name}: {finding.reason}" for finding in findings]

    @staticmethod
    def missing(_: Any) -> Any:
        raise ImportError("no module")

    @staticmethod
    def coarse(_: Any) -> Any:
        """Probabilities in e4m3, as libraries have them."""

        def attention(heads: Heads, layout: Layout, out: torch.Tensor) -> None:
            q, k, v = (x.float().transpose(1, 2) for x in heads[:3])
            q, k = q * heads.scales[0], k * heads.scales[1]
            likely = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
            likely = (likely * 256).to(torch.float8_e4m3fn).float() / 256
            scatter_into(out, (likely @ v).transpose(1, 2).to(out.dtype), layout, heads.value_scale)

        return attention

    @staticmethod
    def wrong(_: Any) -> Any:
        def attention(heads: Heads, layout: Layout, out: torch.Tensor) -> None:
            right = Ops().attention_quantised
            right(heads._replace(value_scale=heads.value_scale.flip(1)), layout, out)

        return attention

    def test_it_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops, said = self.chosen(
            monkeypatch, absent=self.missing, wrong=self.wrong, coarse=self.coarse, later=self.coarse
        )
        assert ops.attention_quantised_by == "coarse"
        assert said[0] == "fp8 attention absent: not installed (no module)"
        assert "off by" in said[1]
        assert len(said) == 3

    def test_none_is_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops, _ = self.chosen(monkeypatch, wrong=self.wrong)
        assert ops.attention_quantised_by == "emulated"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton brings its assembler for x86-64")
@pytest.mark.slow
def test_they_compile_for_gpus_without_spilling() -> None:
    """With Triton's own compiler, which needs no GPU: for Ada and Hopper, at FLUX.1's sizes."""
    kept = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    script = ROOT / "scripts" / "compile_kernels.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 32
    assert {f["capability"] for f in found} == {89, 90}
    assert max(f["registers"] for f in found) <= 80
