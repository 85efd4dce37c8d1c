"""Step caching: the masks, and what a picture drawn with one is."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from calibrate_steps import best_mask, skipping
from hypothesis import given
from hypothesis import strategies as st

from flux_local import weights
from flux_local.model.loader import Pipeline
from flux_local.steps import LEVELS, Masks, advances, formula, partial_steps
from tests.servers import MODEL, ROOT, environment

SCRIPT = ROOT / "scripts" / "calibrate_steps.py"
PROMPT = "a large red star on a blue background"


@given(st.sampled_from(LEVELS), st.integers(1, 100))
def test_the_first_two_and_the_last_are_always_computed(level: str, steps: int) -> None:
    mask = formula(level, steps)
    assert len(mask) == steps
    assert mask[-1]
    assert all(mask[:2])
    assert level != "none" or all(mask)


@given(st.sampled_from(LEVELS[1:]), st.integers(20, 100))
def test_how_much_is_computed(level: str, steps: int) -> None:
    share = {"regular": 0.67, "high": 0.48}[level]
    assert sum(formula(level, steps)) / steps <= share


def test_at_the_real_models_default() -> None:
    assert sum(formula("regular", 28)) == 18
    assert sum(formula("high", 28)) == 12


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 3))
def test_advances_end_before_each_computed_step(rest: list[bool], partials: int) -> None:
    mask = (True, True, *rest, True)
    ends = advances(mask)
    assert len(ends) == sum(mask)
    assert ends[-1] == len(mask)
    assert all(mask[end] for end in ends[:-1])
    sent = partial_steps(ends, partials)
    assert len(sent) <= partials
    assert set(sent) <= set(ends[:-1])


def test_calibrated_masks_win_and_are_named() -> None:
    masks = Masks.read({"regular": {"4": "1101"}})
    assert masks("regular", 4) == (True, True, False, True)
    assert masks.origin("regular", 4) == "regular; calibrated"
    assert masks.origin("regular", 5) == "regular; formula"
    assert masks("high", 4) == formula("high", 4)


@pytest.mark.parametrize("written", [{"regular": {"4": "1110"}}, {"regular": {"5": "1101"}}, {"wild": {"3": "111"}}])
def test_masks_that_cannot_be(written: dict[str, dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="no mask"):
        Masks.read(written)


def drawn(pipeline: Pipeline, mask: tuple[bool, ...], steps: int = 12) -> tuple[object, int]:
    """Final latents, and how often the transformer was asked."""
    picture = pipeline.begin(
        pipeline.text.encode(PROMPT), 128, 128, seed=3, steps=steps, guidance=4.5, computed=mask
    )  # fmt: skip
    asked = 0
    while picture.steps_left:
        pipeline.denoiser.advance([picture])
        asked += 1
    return picture.latents, asked


def test_all_steps_computed_is_no_step_caching_to_the_bit(pipeline: Pipeline) -> None:
    plain, asked = drawn(pipeline, ())
    masked, asked_too = drawn(pipeline, formula("none", 12))
    assert asked == asked_too == 12
    assert bool((plain == masked).all())  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", LEVELS[1:])
def test_extrapolation_is_nearer_than_leaving_steps_out(pipeline: Pipeline, level: str) -> None:
    """Against the whole run, at the same number of passes: a mask over 28 steps beats fewer even steps."""
    mask = formula(level, 28)
    truth, _ = drawn(pipeline, (), 28)
    cached, asked = drawn(pipeline, mask, 28)
    fewer, _ = drawn(pipeline, (), asked)
    assert asked == sum(mask)
    assert (cached - truth).norm() < (fewer - truth).norm()  # type: ignore[operator]


class TestCalibration:
    """`scripts/calibrate_steps.py`."""

    def test_the_mask_found_is_the_best_there_is(self) -> None:
        generator = torch.Generator().manual_seed(0)
        steps = 7
        sigmas = [1.0, 0.93, 0.85, 0.7, 0.55, 0.4, 0.2, 0.0]
        velocities = [torch.randn(steps, 5, generator=generator).cumsum(0) for _ in range(2)]

        def cost(mask: tuple[bool, ...]) -> float:
            """By drawing it out: every skipped step's own error."""
            total = 0.0
            for v in velocities:
                done: list[int] = []
                for i in range(steps):
                    if mask[i]:
                        done.append(i)
                        continue
                    a, b = done[-2:]
                    line = v[b] + (sigmas[i] - sigmas[b]) / (sigmas[b] - sigmas[a]) * (v[b] - v[a])
                    total += float((line - v[i]).norm()) * abs(sigmas[i + 1] - sigmas[i]) / len(velocities)
            return total

        errors = skipping(velocities, sigmas)
        for count in range(3, steps + 1):
            inner = combinations(range(2, steps - 1), count - 3)
            masks = [tuple(i in (0, 1, steps - 1, *chosen) for i in range(steps)) for chosen in inner]
            found = best_mask(errors, count)
            assert sum(found) == count
            assert cost(found) == pytest.approx(min(map(cost, masks)), abs=1e-5)

    @pytest.mark.slow
    def test_the_script_writes_masks_that_the_server_reads(self, tmp_path: Path) -> None:
        for source in MODEL.iterdir():
            (tmp_path / source.name).symlink_to(source)
        (tmp_path / "flux-local.json").unlink()
        info = json.loads((MODEL / "flux-local.json").read_text())
        info["acceleration"] = {  # of the weights before
            level: {str(steps): "".join("01"[c] for c in formula(level, steps)) for steps in (9, 11, 20)}
            for level in LEVELS[1:]
        }
        (tmp_path / "flux-local.json").write_text(json.dumps(info))
        done = subprocess.run(
            [sys.executable, str(SCRIPT), "--model", str(tmp_path), "--steps", "9", "20"],
            capture_output=True,
            text=True,
            env=environment(),
        )
        assert done.returncode == 0, done.stderr
        rows = json.loads(done.stdout.splitlines()[-1])
        masks = weights.info(tmp_path).masks
        by_formula = {(row["steps"], row["level"]): row for row in rows if row["mask"] == "formula"}
        calibrated = [row for row in rows if row["mask"] == "calibrated"]
        assert len(calibrated) == len(by_formula) == 4
        for row in calibrated:
            steps, level = row["steps"], row["level"]
            written = masks.origin(level, steps).endswith("calibrated")
            assert written == (row["error"] < by_formula[steps, level]["error"])
            if written:
                assert "".join("01"[c] for c in masks(level, steps)) == row["digits"]
        assert {masks.origin(level, 11) for level in LEVELS[1:]} == {f"{level}; calibrated" for level in LEVELS[1:]}
