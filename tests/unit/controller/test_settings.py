"""Settings come from file, environment and command line, in this order; a wrong one stops the start with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpu_tenancy.controller.settings import Settings


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"GPU_TENANCY_{name.upper()}", raising=False)


def _file(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_without_anything_said_the_defaults_hold() -> None:
    settings = Settings.load(None)
    assert (settings.port, settings.system_namespace, settings.events) == (8080, "gpu-tenancy-system", True)


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, "port: 1\nresync_seconds: 7\ncoalesce_ms: 3\n")
    monkeypatch.setenv("GPU_TENANCY_PORT", "2")
    monkeypatch.setenv("GPU_TENANCY_RESYNC_SECONDS", "9")
    settings = Settings.load(path, port=4, host=None)
    assert (settings.port, settings.resync_seconds, settings.coalesce_ms) == (4, 9, 3)
    assert settings.host == "0.0.0.0"  # noqa: S104  (the default is what is asserted)


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings.load(None).port = 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("prot: 8080", "setting prot: Extra inputs are not permitted"),
        ("port: 70000", "setting port: Input should be less than or equal to 65535"),
        ("port: eighty", "setting port: Input should be a valid integer"),
        ("resync_seconds: 1", "setting resync_seconds: Input should be greater than or equal to 5"),
        ("port: 70000\nresync_seconds: 1", "setting port: .*; setting resync_seconds: "),
        ("events: perhaps", "setting events: Input should be a valid boolean"),
        ("- port: 8080", "settings file .*settings.yaml is not a mapping; write one `name: value` per line"),
        ("8080", "settings file .*settings.yaml is not a mapping"),
        ("port: [8080", "settings file .*settings.yaml is not YAML"),
    ],
)
def test_a_wrong_setting_is_named_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Settings.load(_file(tmp_path, text))


def test_a_wrong_variable_of_the_environment_is_named_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TENANCY_MAX_IN_FLIGHT", "0")
    with pytest.raises(ValueError, match="setting max_in_flight: Input should be greater than or equal to 1"):
        Settings.load(None)


def test_variables_that_are_no_settings_are_other_peoples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes puts one for each Service into every pod, such as those of a Service gpu-tenancy-operator."""
    monkeypatch.setenv("GPU_TENANCY_OPERATOR_SERVICE_HOST", "10.0.0.1")
    assert Settings.load(None) == Settings()


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert Settings.load(_file(tmp_path, "# nothing\n")) == Settings()
