"""Where each kind lives on the API server, and the paths that are refused before any request."""

from __future__ import annotations

import pytest

from gpu_tenancy.kube import resources
from gpu_tenancy.kube.resources import GPU_LEASES, GPU_NODES, JOBS, NODES, OWN_KINDS, PODS, RESOURCE_SLICES, Resource

ALL = [value for value in vars(resources).values() if isinstance(value, Resource)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (PODS.path(), "/api/v1/pods"),
        (PODS.path("a"), "/api/v1/namespaces/a/pods"),
        (PODS.path("a", "b"), "/api/v1/namespaces/a/pods/b"),
        (PODS.path("a", "b", "eviction"), "/api/v1/namespaces/a/pods/b/eviction"),
        (NODES.path(name="n", subresource="status"), "/api/v1/nodes/n/status"),
        (JOBS.path("a", "b"), "/apis/batch/v1/namespaces/a/jobs/b"),
        (RESOURCE_SLICES.path(), "/apis/resource.k8s.io/v1/resourceslices"),
        (GPU_LEASES.path("a", "b", "status"), "/apis/gpu-tenancy.dev/v1alpha1/namespaces/a/gpuleases/b/status"),
        (GPU_NODES.path(name="n"), "/apis/gpu-tenancy.dev/v1alpha1/gpunodes/n"),
        (NODES.path(name="../a?b#c"), "/api/v1/nodes/..%2Fa%3Fb%23c"),
    ],
)
def test_paths_are_where_the_api_server_serves_them(path: str, expected: str) -> None:
    assert path == expected


@pytest.mark.parametrize(
    ("res", "arguments", "sentence"),
    [
        (PODS, ("a", ""), "not empty"),
        (PODS, ("", "b"), "not empty"),
        (NODES, (None, ""), "not empty"),
        (PODS, (None, "b"), "say in which namespace"),
        (NODES, ("a", "b"), "cluster-scoped"),
        (PODS, ("a", None, "status"), "give its name"),
    ],
)
def test_a_path_that_would_mean_something_else_is_refused(
    res: Resource, arguments: tuple[str | None, ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        res.path(*arguments)


def test_api_versions_and_scopes() -> None:
    assert PODS.api_version == "v1"
    assert GPU_LEASES.api_version == "gpu-tenancy.dev/v1alpha1"
    assert {res.kind for res in OWN_KINDS if not res.namespaced} == {"GpuNode", "GpuTenant", "PriceBook"}


def test_no_two_resources_share_a_path_or_a_kind() -> None:
    assert len({res.path() for res in ALL}) == len(ALL)
    assert len({(res.group, res.kind) for res in ALL}) == len(ALL)
