"""Settings: one definition, three sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_local import config
from flux_local.cli import parser
from flux_local.errors import SettingsError


def test_flags_win_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('port = 1\nmodel = "from-file"\nmax_pixels = 5000\n')
    settings = config.load({"port": "3"}, {"FLUX_LOCAL_PORT": "2", "FLUX_LOCAL_MODEL": "from-env"}, str(file))
    assert (settings.port, settings.model, settings.max_pixels) == (3, "from-env", 5000)


@pytest.mark.parametrize(
    ("flags", "environment"),
    [
        ({}, {"FLUX_LOCAL_PROT": "1"}),
        ({"port": "many"}, {}),
        ({"port": "70000"}, {}),
        ({"response_format": "file"}, {}),
        ({"api_keys_file": "/nonexistent"}, {}),
        ({"cors_origins": "*"}, {}),
        ({"cors_origins": "https://a.example/path"}, {}),
    ],
)
def test_bad_settings_are_refused(flags: dict[str, str], environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError):
        config.load(flags, environment).keys()


def test_unknown_settings_in_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(SettingsError, match="prot"):
        config.load({}, {}, str(file))
    file.write_text("port = = 1\n")
    with pytest.raises(SettingsError):
        config.load({}, {}, str(file))


def test_a_bad_value_is_told_by_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('max_wait = "long"\n')
    for flags, environment, path, said in (
        ({"max_pixels": "5"}, {"FLUX_LOCAL_MAX_PIXELS": "x"}, None, "--max-pixels: Expected `int` >= 256"),
        ({}, {"FLUX_LOCAL_PORT": "x"}, None, "FLUX_LOCAL_PORT: Expected `int`"),
        ({"port": "1"}, {}, str(file), f"max_wait in {file}: Expected `float`"),
    ):
        with pytest.raises(SettingsError) as refused:
            config.load(flags, environment, path)
        assert said in refused.value.message


@pytest.mark.parametrize(("word", "meant"), [("yes", True), ("ON", True), ("0", False), ("No", False)])
def test_yes_and_no_mean_the_same_everywhere(word: str, meant: bool, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(f'go_fast = "{word}"\n')
    assert config.load({}, {"FLUX_LOCAL_GO_FAST": word}).go_fast is meant
    assert config.load({"go_fast": word}, {}).go_fast is meant
    assert config.load({}, {}, str(file)).go_fast is meant


def test_beyond_loopback_wants_keys_or_a_clear_word() -> None:
    config.check_open(config.load({"host": "0.0.0.0"}, {"FLUX_LOCAL_API_KEYS": "a, b"}))
    config.check_open(config.load({"host": "0.0.0.0", "allow_anonymous": "true"}, {}))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.8.8"):
        config.check_open(config.load({"host": host}, {}))
    for host in ("0.0.0.0", "example.org", "::"):
        with pytest.raises(SettingsError, match="API_KEYS_FILE"):
            config.check_open(config.load({"host": host}, {}))


def test_keys_come_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    settings = config.load({}, {"FLUX_LOCAL_API_KEYS_FILE": str(file), "FLUX_LOCAL_API_KEYS": "three"})
    assert settings.keys() == {"one", "two", "three"}
    file.write_text("\n")
    with pytest.raises(SettingsError):
        settings.keys()


def test_every_setting_but_a_secret_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["serve", "--help"])
    help_text = capsys.readouterr().out
    for setting in config.describe():
        assert (setting.flag + " " in help_text) != setting.secret
        assert setting.secret or setting.variable in help_text


@pytest.mark.parametrize(
    ("flags", "fast"),
    [({}, False), ({"go_fast": "true"}, True), ({"precisions": "fp8"}, True),
     ({"go_fast": "true", "precisions": "full"}, False), ({"go_fast": "true", "reference": "true"}, False)],
)  # fmt: skip
def test_the_default_precision_is_one_that_is_loaded(flags: dict[str, str], fast: bool) -> None:
    assert config.load(flags, {}).fast_by_default() is fast
