"""What containers get of NVIDIA's driver: asked once for each version, and never without an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_tenancy.agent.driver import edits
from gpu_tenancy.agent.gpus import GpuError
from gpu_tenancy.agent.settings import AgentSettings

LIBRARY = {"hostPath": "/usr/lib/libcuda.so.1", "containerPath": "/usr/lib/libcuda.so.1"}
SPEC = {"containerEdits": {"mounts": [LIBRARY], "deviceNodes": [{"path": "/dev/nvidiactl"}], "env": ["A=1"]}}


def tool(folder: Path, text: str, status: int = 0) -> Path:
    """An nvidia-ctk that says this, and counts how often it was asked."""
    program = folder / "nvidia-ctk"
    answer = folder / "answer"
    answer.write_text(text)
    program.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/asked"\ncat "{answer}"\nexit {status}\n')
    program.chmod(0o755)
    return program


def settings(folder: Path, **more: object) -> AgentSettings:
    return AgentSettings.model_validate({"state_dir": folder / "state", **more})


def test_nvidias_tool_is_asked_once_for_each_version_of_the_driver(tmp_path: Path) -> None:
    here = settings(tmp_path, nvidia_ctk=str(tool(tmp_path, json.dumps(SPEC))))
    for version in ("570.1", "570.1", "580.2"):
        assert edits(here, version) == {"mounts": [LIBRARY], "env": ["A=1"]}, "device nodes are the claim's own matter"
    assert (tmp_path / "asked").read_text().splitlines() == ["cdi generate --format=json"] * 2


def test_a_file_takes_the_place_of_the_tool(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text(json.dumps(SPEC))
    here = settings(tmp_path, driver_cdi=tmp_path / "edits.json", nvidia_ctk="/nowhere")
    assert edits(here, "570.1")["env"] == ["A=1"]


@pytest.mark.parametrize(
    ("text", "status", "sentence"),
    [
        ("no driver", 1, "failed with exit code 1"),
        ("{}", 0, "holds no CDI specification with containerEdits"),
        ("not json", 0, "cannot be read as JSON"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_sentence(tmp_path: Path, text: str, status: int, sentence: str) -> None:
    here = settings(tmp_path, nvidia_ctk=str(tool(tmp_path, text, status)))
    with pytest.raises(GpuError, match=sentence):
        edits(here, "570.1")


def test_a_node_without_the_tool_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="install NVIDIA's container toolkit, or name a file"):
        edits(settings(tmp_path, nvidia_ctk="/nowhere/nvidia-ctk"), "570.1")
