"""Step caching: the masks, and what a picture drawn with one is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_local.model.loader import Pipeline
from flux_local.steps import LEVELS, Masks, advances, formula, partial_steps

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
