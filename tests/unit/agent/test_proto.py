"""kubelet's wire contract: the generated code is that of the protos, and the protos say what kubelet says."""

from __future__ import annotations

from gpu_tenancy.agent.proto import cri_v1_pb2 as cri
from gpu_tenancy.agent.proto import dra_health_v1alpha1_pb2 as health
from gpu_tenancy.agent.proto import dra_v1_pb2 as dra
from gpu_tenancy.agent.proto import pluginregistration_v1_pb2 as registration
from gpu_tenancy.agent.proto.generate import HERE, generate


def test_the_committed_code_is_what_the_protos_generate() -> None:
    committed = {path.name: path.read_text() for path in HERE.glob("*_pb2*.py*")}
    assert committed == generate()


def test_service_names_are_those_that_kubelet_calls() -> None:
    services = {
        service.full_name: sorted(service.methods_by_name)
        for module in (cri, dra, health, registration)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    assert services == {
        "runtime.v1.RuntimeService": ["ListPodSandbox", "Status"],
        "v1alpha1.DRAResourceHealth": ["NodeWatchResources"],
        "k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin": ["NodePrepareResources", "NodeUnprepareResources"],
        "pluginregistration.Registration": ["GetInfo", "NotifyRegistrationStatus"],
    }


def test_bytes_are_those_of_the_published_field_numbers() -> None:
    claim = dra.Claim(namespace="n", uid="u", name="c")
    assert claim.SerializeToString() == b"\x0a\x01n\x12\x01u\x1a\x01c"
    device = dra.Device(
        request_names=["r"], pool_name="p", device_name="d", cdi_device_ids=["i"], share_id="s"
    ).SerializeToString()
    assert device == b"\x0a\x01r\x12\x01p\x1a\x01d\x22\x01i\x2a\x01s"
    answer = dra.NodePrepareResourceResponse(devices=[dra.Device()], error="e").SerializeToString()
    assert answer == b"\x0a\x00\x12\x01e"
    assert dra.NodeUnprepareResourceResponse(error="e").SerializeToString() == b"\x0a\x01e"
    info = registration.PluginInfo(type="t", name="n", endpoint="e", supported_versions=["v"]).SerializeToString()
    assert info == b"\x0a\x01t\x12\x01n\x1a\x01e\x22\x01v"
    told = health.DeviceHealth(
        device=health.DeviceIdentifier(pool_name="p", device_name="d"),
        health=health.UNHEALTHY,
        last_updated_time=1,
        health_check_timeout_seconds=2,
        message="m",
    )
    assert told.SerializeToString() == b"\x0a\x06\x0a\x01p\x12\x01d\x10\x02\x18\x01\x20\x02\x2a\x01m"
    assert health.NodeWatchResourcesResponse(devices=[told]).SerializeToString()[:2] == b"\x0a\x11"
    status = registration.RegistrationStatus(plugin_registered=True, error="e").SerializeToString()
    assert status == b"\x08\x01\x12\x01e"
    pod = cri.PodSandboxMetadata(name="n", uid="u", namespace="s")
    pods = cri.ListPodSandboxResponse(items=[cri.PodSandbox(metadata=pod)]).SerializeToString()
    assert pods == b"\x0a\x0b\x12\x09\x0a\x01n\x12\x01u\x1a\x01s"
