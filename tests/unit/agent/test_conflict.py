"""Who else might hand out a node's GPUs, and what is said of it."""

from __future__ import annotations

import json

import pytest

from gpu_tenancy.agent.conflict import conflicts
from gpu_tenancy.agent.runtime import DefaultRuntime, parsed


def test_an_ordinary_node_has_one_owner() -> None:
    runc = DefaultRuntime("runc", "/usr/bin/runc")
    assert list(conflicts({}, {"cpu": "8", "nvidia.com/gpu": "0"}, {"gpu-tenancy.dev"}, runc)) == []
    assert list(conflicts({}, {}, set(), None)) == []


@pytest.mark.parametrize("resource", ["nvidia.com/gpu", "nvidia.com/mig-1g.10gb"])
def test_a_device_plugin_that_offers_gpus_is_named(resource: str) -> None:
    [sentence] = conflicts({}, {resource: "8"}, set(), None)
    assert sentence == f"NVIDIA's device plugin offers {resource} on this node; keep it off this node"


def test_a_mig_manager_is_told_of_only_where_it_is_at_work() -> None:
    labels = {"nvidia.com/mig.config": "all-1g.10gb", "nvidia.com/gpu.deploy.mig-manager": "true"}
    [sentence] = conflicts(labels, {}, set(), None)
    assert "label the node nvidia.com/gpu.deploy.mig-manager=false" in sentence
    assert not list(conflicts({**labels, "nvidia.com/gpu.deploy.mig-manager": "false"}, {}, set(), None))


@pytest.mark.parametrize("name", ["gpu.nvidia.com", "gpu.nvidia.com-0d1e4b5c"])
def test_nvidias_dra_driver_is_named_however_its_socket_is(name: str) -> None:
    [sentence] = conflicts({}, {}, {name, "gpu-tenancy.dev"}, None)
    assert "NVIDIA's DRA driver gpu.nvidia.com is registered" in sentence


@pytest.mark.parametrize("binary", ["/usr/bin/nvidia-container-runtime", "/opt/bin/nvidia-container-runtime.legacy"])
def test_nvidias_runtime_as_the_default_one_is_named_in_every_mode(binary: str) -> None:
    [sentence] = conflicts({}, {}, set(), DefaultRuntime("nvidia", binary))
    assert "any pod that sets NVIDIA_VISIBLE_DEVICES would see all GPUs" in sentence


def test_containerds_own_word_on_its_default_runtime_is_understood() -> None:
    runtimes = {"nvidia": {"options": {"BinaryName": "/usr/bin/nvidia-container-runtime"}}, "runc": {"options": {}}}
    config = {"containerd": {"defaultRuntimeName": "nvidia", "runtimes": runtimes}}
    assert parsed(json.dumps(config)) == DefaultRuntime("nvidia", "/usr/bin/nvidia-container-runtime")
    config["containerd"]["defaultRuntimeName"] = "runc"
    assert parsed(json.dumps(config)) == DefaultRuntime("runc", "")


@pytest.mark.parametrize("text", ["", "not json", "{}", '{"containerd": {}}', "[]", '{"containerd": null}'])
def test_what_is_not_understood_is_not_known(text: str) -> None:
    assert parsed(text) is None
