"""Parameters, without a server."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
from openai.types import ImageModel

from flux_local.errors import FluxError, InvalidValue, MissingParameter, ModelNotFound, NotAvailable
from flux_local.forms import from_form
from flux_local.parameters import PARAMETERS, Words, default_of
from flux_local.params import GenerationParams, ModelInfo, check, generation_params
from flux_local.plan import check_of
from flux_local.sizes import CanvasRange

MODEL = ModelInfo("some-folder", CanvasRange(128**2, 192**2), 12, 4.5)


def parse(**raw: Any) -> GenerationParams:
    return generation_params({"prompt": "a", **raw}, MODEL)


def test_defaults() -> None:
    found = parse()
    assert (found.steps, found.guidance, found.delivered, found.canvas) == (12, 4.5, (1024, 1024), (192, 192))
    assert (found.response_format, found.output_format, found.output_quality) == ("url", "png", 90)
    assert len(found.seeds) == 1
    assert 0 <= found.seeds[0] < 2**32


def test_random_seeds_differ() -> None:
    assert len({parse().seeds for _ in range(20)}) == 20


def test_seeds_count_up_and_wrap() -> None:
    assert parse(seed=0, n=3).seeds == (0, 1, 2)
    assert parse(seed=2**63 - 1, n=2).seeds == (2**63 - 1, 0)


def test_null_means_not_given() -> None:
    given = {p.name: None for p in PARAMETERS if p.name != "prompt"}
    assert parse(**given).steps == 12


@pytest.mark.parametrize(
    "name", ["flux.1-krea-dev", "FLUX.1-Krea-Dev", "some-folder", "Some-Folder", "dall-e-2", *get_args(ImageModel)]
)
def test_names_of_the_loaded_model(name: str) -> None:
    assert parse(model=name).steps == 12


def test_another_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound):
        parse(model="sdxl")


def test_prompt_may_be_empty_but_not_missing() -> None:
    assert parse(prompt="").prompt == ""
    with pytest.raises(MissingParameter):
        generation_params({}, MODEL)
    with pytest.raises(MissingParameter):
        generation_params({"prompt": None}, MODEL)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", 1), ("prompt", "x" * 32_001), ("prompt", ["a"]),
        ("n", 0), ("n", 11), ("n", True), ("n", "2"), ("n", 1.5), ("n", 10**30),
        ("seed", -1), ("seed", 2**63), ("seed", "1"), ("seed", 0.5), ("seed", False),
        ("steps", 0), ("num_inference_steps", 101), ("num_inference_steps", float("nan")),
        ("cfg_scale", -0.1), ("guidance", 20.1), ("guidance_scale", float("inf")), ("cfg_scale", True),
        ("cfg_scale", "4"), ("size", 1024), ("size", "huge"), ("aspect_ratio", "x"), ("resolution", True),
        ("megapixels", "2"), ("megapixels", 2), ("response_format", "file"), ("output_format", "bmp"),
        ("output_quality", 101), ("output_compression", -1), ("sync_mode", "true"), ("quality", "best"),
        ("stream", 1), ("partial_images", 4), ("acceleration", "max"), ("go_fast", "yes"), ("moderation", "off"),
        ("loras", {}), ("loras", [3]), ("loras", [{"scale": 1}]), ("loras", [{"path": "x", "scale": "1"}]),
        ("loras", [{"path": "x", "scale": 4.5}]), ("loras", ["x", "x"]), ("loras", [str(i) for i in range(9)]),
        ("lora_weights", 1), ("model", 3), ("background", "blue"),
    ],
)  # fmt: skip
def test_bad_values_name_the_parameter(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        parse(**{name: value})
    assert caught.value.param == name
    assert len(caught.value.message) < 200


def test_names_that_change_nothing_are_told_in_short() -> None:
    many = {f"{i:03} {'x' * 1000}": i for i in range(100)}
    assert parse(**many).ignored == tuple(name[:64] for name in list(many)[:64])


@pytest.mark.parametrize(
    ("given", "check"),
    [({}, None), ({"enable_safety_checker": True}, True), ({"disable_safety_checker": True}, False),
     ({"disable_safety_checker": False}, None),
     ({"enable_safety_checker": False, "disable_safety_checker": True}, False)],
)  # fmt: skip
def test_the_safety_checker_by_two_opposite_names(given: dict[str, bool], check: bool | None) -> None:
    assert parse(**given).check is check
    with pytest.raises(InvalidValue, match="contradict"):
        parse(enable_safety_checker=True, disable_safety_checker=True)


@pytest.mark.parametrize(
    ("asked", "has", "optional", "looks"),
    [(None, True, False, True), (True, True, False, True), (False, True, True, False), (None, False, False, False),
     (False, False, False, False), (True, False, False, None), (False, True, False, None)],
)  # fmt: skip
def test_who_decides_about_the_safety_checker(
    asked: bool | None, has: bool, optional: bool, looks: bool | None
) -> None:
    params = replace(parse(), check=asked)
    if looks is not None:
        assert check_of(params, has, optional) is looks
        return
    with pytest.raises(NotAvailable):
        check_of(params, has, optional)


@pytest.mark.parametrize("name", ["cfg_scale", "guidance_scale", "guidance"])
def test_guidance_by_each_name(name: str) -> None:
    assert parse(**{name: 3}).guidance == 3.0


def test_two_names_with_one_value_agree_and_with_two_do_not() -> None:
    assert parse(steps=5, num_inference_steps=5).steps == 5
    with pytest.raises(InvalidValue, match=r"'num_inference_steps'.*'steps'|'steps'.*'num_inference_steps'"):
        parse(num_inference_steps=5, steps=6)


def test_megapixels_is_resolution() -> None:
    assert parse(megapixels="0.25").delivered == parse(megapixels="0.250").delivered == (512, 512)
    assert parse(megapixels=0.25, resolution="0.5K").delivered == (512, 512)
    with pytest.raises(InvalidValue):
        parse(megapixels=1, resolution="0.5K")


def test_compression_wins_over_quality() -> None:
    assert parse(output_quality=10).output_quality == 10
    assert parse(output_quality=10, output_compression=20).output_quality == 20


def test_unknown_names_are_listed_and_change_nothing() -> None:
    found = parse(seed=3, banana=[1], strength=0.5, negative_prompt="fog")
    assert found.ignored == ("banana", "negative_prompt", "strength")


def test_real_guidance_needs_both() -> None:
    assert parse(negative_prompt="fog").negative_prompt is None
    found = parse(negative_prompt="fog", true_cfg_scale=3)
    assert (found.negative_prompt, found.true_cfg_scale, found.ignored) == ("fog", 3.0, ())
    found = parse(true_cfg_scale=3, lora_scale=2)
    assert (found.true_cfg_scale, found.ignored) == (1.0, ("lora_scale", "true_cfg_scale"))


def test_adapters_by_either_form() -> None:
    assert parse(loras=[{"path": "a", "scale": 0.5}, {"path": "b"}, "c"]).loras == (("a", 0.5), ("b", 1.0), ("c", 1.0))
    assert parse(lora_weights="a", lora_scale=0.5).loras == parse(loras=[{"path": "a", "scale": 0.5}]).loras
    assert parse(loras=[{"path": "a", "scale": 0}]).loras == parse().loras == ()
    with pytest.raises(InvalidValue, match="two values"):
        parse(loras=["a"], lora_weights="b")
    with pytest.raises(InvalidValue, match="must be a list"):
        parse(loras=[{"path": "a", "scale": False}], lora_weights="a", lora_scale=0)


def test_forms_mean_what_json_says() -> None:
    fields = {"prompt": "", "n": "2", "strength": "0.7", "go_fast": "false", "stream": "TRUE", "seed": "",
              "size": "1x1", "loras": "[]", "cfg_scale": "3", "other": "x", "steps": "many",
              "true_cfg_scale": "2e+0", "lora_scale": ".5"}  # fmt: skip
    assert from_form(fields) == {
        "prompt": "", "n": 2, "strength": 0.7, "go_fast": False, "stream": True, "size": "1x1", "loras": [],
        "cfg_scale": 3.0, "other": "x", "steps": "many", "true_cfg_scale": 2.0, "lora_scale": 0.5,
    }  # fmt: skip
    assert from_form({"steps": "1e1", "seed": "9007199254740993.0"}) == {"steps": 10, "seed": 9007199254740993}
    assert from_form({"steps": "1.5e0"}) == {"steps": "1.5e0"}


def test_every_row_of_the_table_describes_itself() -> None:
    names = [name for p in PARAMETERS for name in (p.name, *p.aliases)]
    assert len(names) == len(set(names))
    for parameter in PARAMETERS:
        assert parameter.description.endswith(".")
        assert parameter.default_in_words()
        if not isinstance(parameter.default, Words | None) and parameter.kind != "list":
            assert check(parameter, parameter.name, parameter.default) == parameter.default
    assert default_of("strength", "variations") != default_of("strength", "edits")


def test_errors_of_the_request_never_hold_the_input() -> None:
    canary = "canary-8d1f"
    for name in ("size", "aspect_ratio", "resolution", "model", "response_format", "megapixels", "quality"):
        with pytest.raises(FluxError) as caught:
            parse(**{name: canary})
        assert canary not in caught.value.message
