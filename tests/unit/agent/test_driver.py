"""What containers get of NVIDIA's driver: asked once for each version, and never without an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu_tenancy.agent.driver import part
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
        assert part(here, version).edits == {"mounts": [LIBRARY], "env": ["A=1"]}, (
            "device nodes are the claim's own matter"
        )
    assert (tmp_path / "asked").read_text().splitlines() == ["cdi generate --format=json"] * 2


def test_a_file_takes_the_place_of_the_tool(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text(json.dumps(SPEC))
    here = settings(tmp_path, driver_cdi=tmp_path / "edits.json", nvidia_ctk="/nowhere")
    assert part(here, "570.1").edits["env"] == ["A=1"]


def test_a_driver_that_the_agent_sees_elsewhere_is_told_with_the_hosts_paths(tmp_path: Path) -> None:
    spec = {
        "cdiVersion": "0.7.0",
        "containerEdits": {
            "mounts": [
                {"hostPath": "/host/usr/lib/libcuda.so.1", "containerPath": "/usr/lib/libcuda.so.1"},
                {"hostPath": "/etc/vulkan", "containerPath": "/etc/vulkan"},
            ],
            "hooks": [{"hookName": "createContainer", "path": "/host/usr/bin/nvidia-cdi-hook", "args": ["update"]}],
        },
    }
    here = settings(
        tmp_path,
        nvidia_ctk=str(tool(tmp_path, json.dumps(spec))),
        driver_root=Path("/host"),
        host_driver_root=Path("/run/nvidia/driver"),
    )
    found = part(here, "570.1")
    assert found.cdi_version == "0.7.0"
    assert [one["hostPath"] for one in found.edits["mounts"]] == [
        "/run/nvidia/driver/usr/lib/libcuda.so.1",
        "/etc/vulkan",
    ]
    assert found.edits["mounts"][0]["containerPath"] == "/usr/lib/libcuda.so.1"
    assert found.edits["hooks"] == [
        {"hookName": "createContainer", "path": "/run/nvidia/driver/usr/bin/nvidia-cdi-hook", "args": ["update"]}
    ]
    assert (tmp_path / "asked").read_text().split() == [
        "cdi", "generate", "--format=json", "--driver-root=/host", "--dev-root=/host",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "status", "sentence"),
    [
        ("no driver", 1, "failed with exit code 1"),
        ("{}", 0, "holds no CDI specification with containerEdits"),
        ('{"cdiVersion": "new", "containerEdits": {}}', 0, "names the CDI version 'new', which is none"),
        ("not json", 0, "cannot be read as JSON"),
    ],
)
def test_an_answer_that_makes_no_sense_is_a_sentence(tmp_path: Path, text: str, status: int, sentence: str) -> None:
    here = settings(tmp_path, nvidia_ctk=str(tool(tmp_path, text, status)))
    with pytest.raises(GpuError, match=sentence):
        part(here, "570.1")


def test_a_node_without_the_tool_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(GpuError, match="install NVIDIA's container toolkit, or name a file"):
        part(settings(tmp_path, nvidia_ctk="/nowhere/nvidia-ctk"), "570.1")
