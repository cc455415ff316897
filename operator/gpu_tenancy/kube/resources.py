"""The resources this project reads and writes, and where each lives on the API server.

Plain values: no I/O, and no decision about any object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from gpu_tenancy.api.names import GROUP, VERSION


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind as the API server serves it; `group` is empty for the core group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool

    @property
    def api_version(self) -> str:
        """`apiVersion` of an object of this kind: `v1` or `group/version`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of the collection, of one object, or of a subresource of it.

        A namespaced collection without a namespace is the one over all namespaces. Raises ValueError for a name
        without the namespace it needs, a namespace where there is none, and empty names: an empty name would turn
        the deletion of one object into that of the whole collection.
        """
        self._check(namespace, name, subresource)
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        if namespace is not None:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        if name is not None:
            parts.append(name)
        if subresource is not None:
            parts.append(subresource)
        return "/" + "/".join(quote(part, safe="") for part in parts)

    def _check(self, namespace: str | None, name: str | None, subresource: str | None) -> None:
        if namespace is not None and not self.namespaced:
            raise ValueError(f"{self.kind} is cluster-scoped: leave the namespace {namespace!r} out.")
        if namespace == "" or name == "":
            raise ValueError(f"{self.kind}: namespace {namespace!r} and name {name!r} may be absent, but not empty.")
        if name is not None and namespace is None and self.namespaced:
            raise ValueError(f"{self.kind} {name!r} is namespaced: say in which namespace it is.")
        if subresource is not None and name is None:
            raise ValueError(f"{self.kind}: the subresource {subresource!r} belongs to one object: give its name.")


PODS: Final = Resource("", "v1", "pods", "Pod", namespaced=True)
NODES: Final = Resource("", "v1", "nodes", "Node", namespaced=False)
SERVICES: Final = Resource("", "v1", "services", "Service", namespaced=True)
EVENTS: Final = Resource("", "v1", "events", "Event", namespaced=True)
SECRETS: Final = Resource("", "v1", "secrets", "Secret", namespaced=True)
NAMESPACES: Final = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
JOBS: Final = Resource("batch", "v1", "jobs", "Job", namespaced=True)
RESOURCE_CLAIMS: Final = Resource("resource.k8s.io", "v1", "resourceclaims", "ResourceClaim", namespaced=True)
RESOURCE_CLAIM_TEMPLATES: Final = Resource(
    "resource.k8s.io", "v1", "resourceclaimtemplates", "ResourceClaimTemplate", namespaced=True
)
RESOURCE_SLICES: Final = Resource("resource.k8s.io", "v1", "resourceslices", "ResourceSlice", namespaced=False)
DEVICE_CLASSES: Final = Resource("resource.k8s.io", "v1", "deviceclasses", "DeviceClass", namespaced=False)
COORDINATION_LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease", namespaced=True)

GPU_LEASES: Final = Resource(GROUP, VERSION, "gpuleases", "GpuLease", namespaced=True)
MINING_POOLS: Final = Resource(GROUP, VERSION, "miningpools", "MiningPool", namespaced=True)
GPU_NODES: Final = Resource(GROUP, VERSION, "gpunodes", "GpuNode", namespaced=False)
PRICE_BOOKS: Final = Resource(GROUP, VERSION, "pricebooks", "PriceBook", namespaced=False)
GPU_TENANTS: Final = Resource(GROUP, VERSION, "gputenants", "GpuTenant", namespaced=False)
USAGE_RECORDS: Final = Resource(GROUP, VERSION, "usagerecords", "UsageRecord", namespaced=True)

OWN_KINDS: Final = (GPU_LEASES, MINING_POOLS, GPU_NODES, PRICE_BOOKS, GPU_TENANTS, USAGE_RECORDS)
"""The kinds of the project's own group."""
