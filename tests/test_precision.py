"""`go_fast` and `acceleration`, through the server and below it."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from flux_local.model.fp8 import PRODUCT_TOLERANCE, Fp8Linear, RoundedLinear, in_fp8, product_error, rounded
from flux_local.model.fp8_attention import scales
from flux_local.model.geometry import Geometry
from flux_local.model.latents import initial_noise
from flux_local.model.layers import Layers, Linear
from flux_local.model.loader import Pipeline
from flux_local.model.ops import LARGEST, Layout, Ops, Rows, heads_quantised, part, quantised
from flux_local.model.transformer import FluxTransformer
from tests.servers import Server, pictures, running
from tests.test_transformer import SMALL, prompt_of, random_module

BODY = {"prompt": "a large red star on a blue background", "size": "128x128", "steps": 12, "seed": 3,
        "response_format": "b64_json"}  # fmt: skip
FAST = {**BODY, "go_fast": True}


def pixels(answer: httpx.Response) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures(answer)[0]))).convert("RGB"), dtype=float)


class TestRounding:
    def test_the_largest_of_a_row_is_the_largest_of_fp8(self) -> None:
        rows = torch.tensor([[1.0, -3.0, 0.5], [0.0, 0.0, 0.0], [1e-30, 1e30, -1e30]])
        values, scale = quantised(rows)
        assert values.float().abs().amax(1).tolist() == [LARGEST, 0.0, LARGEST]
        torch.testing.assert_close(scale[0], torch.tensor([3.0 / LARGEST]))
        assert torch.isfinite(rounded(rows)).all()

    def test_a_value_keeps_four_significant_bits(self) -> None:
        rows = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
        small = rows.abs() > rows.abs().amax(1, keepdim=True) * 2**-14
        assert ((rounded(rows) - rows).abs() / rows.abs())[small].max() <= 2**-4

    def test_what_an_mlp_of_normal_numbers_loses_is_the_format_s_and_no_scale_s(self) -> None:
        """Over two products: by our scales, and by the best of sixteen that each row and each output could have."""
        width, generator = 768, torch.Generator().manual_seed(0)
        x = torch.randn(128, width, generator=generator)
        into = torch.randn(4 * width, width, generator=generator) / width**0.5
        out_of = torch.randn(width, 4 * width, generator=generator) / width**0.5

        def best(rows: torch.Tensor) -> torch.Tensor:
            scaled = [rounded(rows)]
            largest = rows.abs().amax(1, keepdim=True) / LARGEST
            for i in range(16):
                scale = largest * 2 ** (i / 16)
                scaled.append((rows / scale).to(torch.float8_e4m3fn).float() * scale)
            errors = torch.stack([(each - rows).square().sum(1) for each in scaled])
            return torch.stack(scaled)[errors.argmin(0), torch.arange(len(rows))]

        def mlp(by: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
            hidden = torch.nn.functional.gelu(by(x) @ by(into).T, approximate="tanh")
            return by(hidden) @ by(out_of).T

        exact = mlp(lambda rows: rows)
        ours, least = (float((mlp(by) - exact).norm() / exact.norm()) for by in (rounded, best))
        assert 0.05 < least < ours < 0.055

    def test_scales_of_some_rows_begin_where_cublas_takes_them(self) -> None:
        x = quantised(torch.randn(90, 32, generator=torch.Generator().manual_seed(2)))
        for first in (0, 3, 4, 77):
            some = part(x, slice(first, None))
            assert isinstance(some, Rows)
            assert some.scale.data_ptr() % 16 == 0
            assert torch.equal(some.scale, x.scale[first:])
            assert torch.equal(some.values.float(), x.values[first:].float())

    def test_a_product_that_is_wrong_is_found_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        shape = (77, 512, 256, torch.device("cpu"))
        assert product_error(*shape) < 0.01
        product = torch._scaled_mm
        monkeypatch.setattr(torch, "_scaled_mm", lambda *a, bias, **k: product(*a, bias=0.9 * bias, **k))
        assert product_error(*shape) > PRODUCT_TOLERANCE

    def test_a_row_does_not_know_its_company(self) -> None:
        rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(rounded(rows)[2:3], rounded(rows[2:3]))

    @pytest.mark.parametrize(("rows", "into", "out"), [(1, 32, 16), (7, 64, 48), (33, 16, 32)])
    def test_the_emulation_is_what_the_product_in_fp8_gives(self, rows: int, into: int, out: int) -> None:
        generator = torch.Generator().manual_seed(rows)
        weight, bias, x = (
            torch.randn(*shape, generator=generator).bfloat16() for shape in ((out, into), (out,), (rows, into))
        )
        linear = Linear(weight, bias)
        native, emulated = Fp8Linear.of(linear), RoundedLinear.of(Linear(weight.float(), bias.float()))
        expected = emulated(x.float())
        assert (native(x).float() - expected).norm() / expected.norm() < 4e-3
        written = torch.empty(rows, out, dtype=torch.bfloat16)
        native.into(written, x)
        assert torch.equal(written, native(x))

    def test_only_the_blocks_are_rounded(self, pipeline: Pipeline) -> None:
        own: Any = pipeline.denoiser.transformer
        fast = in_fp8(own)
        assert fast.modulation is own.modulation
        assert fast.image_in is own.image_in
        assert fast.out is own.out
        assert not torch.equal(fast.singles[0].out.weight, own.singles[0].out.weight)
        assert isinstance(fast.doubles[0].text.qkv, RoundedLinear)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch forms", "kernels"])
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks_in_fp8_give_what_the_emulation_gives(kernels: bool, batch: int) -> None:
    """Products in fp8 and rows rounded where they are made (`torch._scaled_mm` runs on a CPU too), against fp32."""
    from flux_local.model.kernels import KERNELS

    module = random_module(SMALL)
    exact = FluxTransformer(Geometry.of(module.config), Layers(module.state_dict().__getitem__))
    chosen = {name: op for name, op in KERNELS.items() if name != "attention"} if kernels else {}
    narrow = FluxTransformer(
        exact.geometry, Layers(lambda name: module.state_dict()[name].bfloat16()), replace(Ops(), **chosen)
    )  # fmt: skip
    layout = Layout(batch, 4, 6)
    rotary = exact.rotary(48, 32, layout.text)
    x = torch.randn(layout.rows, exact.geometry.width, generator=torch.Generator().manual_seed(2)).bfloat16()
    emulated, native = in_fp8(exact, native=False), in_fp8(narrow, native=True)
    with torch.inference_mode():
        for plain, rounding, fast in zip(exact.branches(), emulated.branches(), native.branches(), strict=True):
            truth, expected = plain(x.float(), rotary, layout), rounding(x.float(), rotary, layout)
            found = fast(quantised(x), rotary, layout).float()
            assert 0.01 < (expected - truth).norm() / truth.norm() < 0.1
            assert (found - expected).norm() / truth.norm() < 0.05
        latents = torch.cat([initial_noise(i, 48, 32) for i in range(batch)])
        velocity = []
        for transformer in (exact, native):
            prompt = prompt_of(module.config, 4, 1)
            conditions = [transformer.condition(prompt, [0.8], 2.0)] * batch
            drawn = transformer.velocity(latents.to(transformer.dtype), conditions, [0] * batch, 48, 32)
            velocity.append(drawn.float())
    assert (velocity[1] - velocity[0]).norm() / velocity[0].norm() < 0.02


class TestAttention:
    """`--fp8-attention` where it is emulated."""

    @pytest.mark.parametrize("batch", [1, 3])
    def test_it_is_attention_on_rounded_heads(self, batch: int) -> None:
        module = random_module(SMALL)
        exact = FluxTransformer(Geometry.of(module.config), Layers(module.state_dict().__getitem__))
        rounding, more = in_fp8(exact), in_fp8(exact, attention=True)
        latents = torch.cat([initial_noise(i, 48, 32) for i in range(batch)])
        found = []
        for transformer in (exact, rounding, more):
            conditions = [transformer.condition(prompt_of(module.config, 4, i), [0.8], 2.0) for i in range(batch)]
            found.append(transformer.velocity(latents, conditions, [0] * batch, 48, 32))
        truth, without, with_it = found
        assert not torch.equal(without, with_it)
        assert (with_it - truth).norm() / truth.norm() < 2 * (without - truth).norm() / truth.norm()
        alone = more.velocity(latents[:1], conditions[:1], [0], 48, 32)
        torch.testing.assert_close(with_it[:1], alone, atol=1e-5, rtol=1e-5)

    def test_a_picture_does_not_feel_its_company(self) -> None:
        generator = torch.Generator().manual_seed(0)
        size, layout = 16, Layout(2, 3, 5)
        weights = torch.rand(2, 2, size, generator=generator) + 0.5
        rotary = torch.randn(8, size // 2, 2, generator=generator)
        qkv = torch.randn(layout.rows, 7 * 2 * size, generator=generator)
        qkv[layout.text : layout.text_rows] *= 1000  # the other picture's
        both = heads_quantised(qkv, 2, weights, rotary, scales(weights), layout)
        own = torch.cat([qkv[:3], qkv[6:11]])
        alone = heads_quantised(own, 2, weights, rotary, scales(weights), Layout(1, 3, 5))
        for together, single in zip(both, alone, strict=True):
            first = together[:1] if together.ndim > 1 else together
            assert torch.equal(first.float(), single.float())

    def test_no_query_and_no_key_is_too_large(self) -> None:
        """One that points along a single axis is as long as a number can get."""
        size = 16
        weights = torch.tensor([[[2.0] * size, [0.5] * size]])
        qkv = torch.zeros(2, 3 * size)
        qkv[:, 3] = qkv[:, size + 3] = 1e4
        still = torch.tensor([1.0, 0.0]).expand(2, size // 2, 2).contiguous()
        heads = heads_quantised(qkv, 1, weights, still, scales(weights), Layout(1, 1, 1))
        assert heads.query.float().abs().max() == heads.key.float().abs().max() == LARGEST
        torch.testing.assert_close(heads.query.float()[0, 0, 0, 3] * heads.scales[0], torch.tensor(8.0))

    def test_a_server_says_so(self, tmp_path: Path, server: Server) -> None:
        plain = server.post(FAST)
        assert plain.headers["x-flux-attention"] == "torch"
        assert httpx.get(server.url + "/ready").json()["attention"] == {"fp32": "torch", "fp8": "torch"}
        with running(tmp_path, "--fp8-attention") as other:
            assert httpx.get(other.url + "/ready").json()["attention"] == {"fp32": "torch", "fp8": "fp8 emulated"}
            assert other.post(BODY).headers["x-flux-attention"] == "torch"
            more = other.post(FAST)
        assert more.headers["x-flux-attention"] == "fp8 emulated"
        difference = np.abs(pixels(plain) - pixels(more))
        assert 0 < difference.mean() < 12, "another rounding, the same picture"


class TestServed:
    def test_the_answer_says_what_ran(self, server: Server) -> None:
        plain, fast = server.post(BODY), server.post(FAST)
        assert plain.headers["x-flux-precision"] == "fp32"
        assert fast.headers["x-flux-precision"] == "fp8"
        assert "x-flux-acceleration" not in fast.headers
        assert httpx.get(server.url + "/ready").json()["precisions"] == ["fp32", "fp8"]
        difference = np.abs(pixels(plain) - pixels(fast))
        assert 0 < difference.mean() < 12, "another rounding, the same picture"

    def test_the_same_bytes_in_company_and_after_a_restart(self, server: Server, tmp_path: Path) -> None:
        alone = pictures(server.post(FAST))
        bodies = [FAST, BODY, {**FAST, "seed": 4, "steps": 9}, {**FAST, "acceleration": "high"}, {**BODY, "seed": 9}]
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            in_company = list(pool.map(server.post, bodies))
        assert pictures(in_company[0]) == alone
        with running(tmp_path) as other:
            assert pictures(other.post(FAST)) == alone
            assert pictures(other.post(bodies[3])) == pictures(in_company[3])

    @pytest.mark.parametrize("level", ["regular", "high"])
    def test_steps_are_left_out(self, server: Server, level: str) -> None:
        whole, cached = server.post({**BODY, "steps": 28}), server.post({**BODY, "steps": 28, "acceleration": level})
        assert cached.headers["x-flux-acceleration"].startswith(f"{level}; ")
        assert np.abs(pixels(whole) - pixels(cached)).mean() < 25
        for answer, computed in ((whole, 28), (cached, {"regular": 18, "high": 12}[level])):
            entry = httpx.get(f"{server.url}/v1/images/requests/{answer.json()['id']}").json()
            assert (entry["params"]["steps_run"], entry["params"]["steps_computed"]) == (28, computed)

    def test_none_is_the_default(self, server: Server) -> None:
        assert pictures(server.post({**BODY, "acceleration": "none"})) == pictures(server.post(BODY))

    def test_edits_and_streams(self, server: Server, tmp_path: Path) -> None:
        """The mask is over the steps that run, and partial pictures come where one stops."""
        source = io.BytesIO()
        Image.new("RGB", (128, 128), "green").save(source, "PNG")
        data = {"prompt": "a red star", "strength": "0.6", "steps": "20", "acceleration": "high", "go_fast": "true",
                "response_format": "b64_json", "stream": "true", "partial_images": "3"}  # fmt: skip
        answer = httpx.post(server.url + "/v1/images/edits", data=data, files={"image": source.getvalue()}, timeout=60)
        assert answer.status_code == 200
        assert answer.text.count("event: image_edit.partial_image") == 3
        assert answer.text.count("event: image_edit.completed") == 1


@pytest.mark.parametrize(("loaded", "refused", "precision"), [("full", True, "fp32"), ("fp8", False, "fp8")])
def test_what_is_not_loaded_is_refused(tmp_path: Path, loaded: str, refused: bool, precision: str) -> None:
    with running(tmp_path, "--precisions", loaded) as server:
        answer = server.post({**BODY, "go_fast": refused})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "not_available"
        assert answer.json()["error"]["param"] == "go_fast"
        assert precision in answer.json()["error"]["message"]
        assert server.post(BODY).headers["x-flux-precision"] == precision
        assert httpx.get(server.url + "/ready").json()["precisions"] == [precision]


def test_the_default_is_a_setting(tmp_path: Path) -> None:
    with running(tmp_path, "--go-fast") as server:
        assert server.post(BODY).headers["x-flux-precision"] == "fp8"
        assert server.post({**BODY, "go_fast": False}).headers["x-flux-precision"] == "fp32"
