"""The Node that the agent lives on, and the GpuNode that it keeps beside it.

Reads the one, and who else hands out its GPUs; creates the other. Writes neither a Node nor a spec.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from gpu_tenancy.agent.conflict import conflicts
from gpu_tenancy.agent.runtime import DefaultRuntime, default_runtime
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.api.names import ANNOTATION_CONVERTIBLE_GPUS, ANNOTATION_MIG_GPUS, LABEL_NODE
from gpu_tenancy.api.node import GpuMode
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import AlreadyExists
from gpu_tenancy.kube.resources import GPU_NODES, NODES

_INDICES: Final = re.compile(r"\s*\d+\s*(,\s*\d+\s*)*")


@dataclass(frozen=True, slots=True)
class Owner:
    """The Node that the agent's objects belong to."""

    name: str
    """Its name."""
    uid: str
    """Its UID."""

    def reference(self) -> dict[str, Any]:
        """As an owner reference: when the Node goes, so do they."""
        return {"apiVersion": "v1", "kind": "Node", "name": self.name, "uid": self.uid, "controller": True}


@dataclass(frozen=True, slots=True)
class Home:
    """What the agent needs to know of its Node."""

    owner: Owner
    """Name and UID."""
    mig_gpus: frozenset[int] = frozenset()
    """Indices of the GPUs that the Node declares to be in MIG mode."""
    declares: bool = False
    """The Node says in which modes its GPUs are to be; else whatever mode they are in is left alone."""
    mistake: str = ""
    """Why that declaration is not understood, as a sentence; empty where it is."""
    convertible_gpus: frozenset[int] = frozenset()
    """Indices of the GPUs that the Node lets the operator convert by demand."""
    remark: str = ""
    """Why none is though the Node says something about it, as a sentence; empty where all is well."""
    conflicts: tuple[str, ...] = ()
    """Who else hands out the GPUs of the node, a sentence for each."""
    unsure: str = ""
    """Why it cannot be told whether anybody does, as a sentence; empty where it can."""


class Reader:
    """Reads the Node of one agent, and who else is at work on it."""

    def __init__(self, client: KubeClient, node: str, settings: AgentSettings) -> None:
        self._client = client
        self._node = node
        self._registry = settings.registration_socket.parent
        self._runtime_socket = settings.runtime_socket
        self._runtime: DefaultRuntime | None = None

    async def read(self) -> Home:
        """The Node as it is now. Raises KubeError."""
        node = await self._client.get(NODES, self._node)
        found = conflicts(
            node["metadata"].get("labels") or {},
            node.get("status", {}).get("allocatable") or {},
            await asyncio.to_thread(self._plugins),
            await self._default_runtime(),
        )
        return replace(home_of(node["metadata"]), conflicts=tuple(found), unsure=self._unsure())

    async def _default_runtime(self) -> DefaultRuntime | None:
        """As the runtime says, or said last: one that is being restarted has not changed for that."""
        if self._runtime_socket is not None:
            self._runtime = await default_runtime(self._runtime_socket) or self._runtime
        return self._runtime

    def _unsure(self) -> str:
        if self._runtime_socket is None or self._runtime is not None:
            return ""
        return (
            f"the container runtime on {self._runtime_socket} does not say what its default runtime is; see to it that "
            f"it is not NVIDIA's, and set runtime_socket to the runtime's own socket, or to null"
        )

    def _plugins(self) -> Collection[str]:
        """Names of the DRA drivers that have a socket in kubelet's registry."""
        return {path.name.removesuffix("-reg.sock") for path in self._registry.glob("*-reg.sock")}


def home_of(metadata: Mapping[str, Any]) -> Home:
    """What the metadata of a Node say: its UID, and GPU indices in annotations such as "6,7"."""
    owner, annotations = Owner(metadata["name"], metadata["uid"]), metadata.get("annotations") or {}
    mig, mistake = _indices(annotations, ANNOTATION_MIG_GPUS)
    if mistake:
        return Home(owner, mistake=mistake)
    declares = ANNOTATION_MIG_GPUS in annotations
    convertible, remark = _indices(annotations, ANNOTATION_CONVERTIBLE_GPUS)
    if convertible and not declares:
        remark = (
            f"no GPU is convertible before annotation {ANNOTATION_MIG_GPUS} of the Node says what each goes back to"
        )
        convertible = frozenset()
    return Home(owner, mig, declares=declares, convertible_gpus=convertible, remark=remark)


def _indices(annotations: Mapping[str, str], name: str) -> tuple[frozenset[int], str]:
    """GPU indices in an annotation; none where there is none. Or why it is not understood, as a sentence."""
    text = annotations.get(name, "")
    if not text.strip():
        return frozenset(), ""
    if not _INDICES.fullmatch(text):
        mistake = f'annotation {name}="{text}" of the Node is not understood; write GPU indices, e.g. "6,7"'
        return frozenset(), mistake
    return frozenset(int(index) for index in text.split(",")), ""


def declared_modes(here: Home, indices: Iterable[int]) -> Mapping[int, GpuMode]:
    """Mode that the Node declares for each of these GPUs; none where it declares nothing, or nothing intelligible."""
    if here.mistake or not here.declares:
        return {}
    return {index: GpuMode.MIG if index in here.mig_gpus else GpuMode.WHOLE for index in indices}


async def ensure_gpu_node(client: KubeClient, owner: Owner) -> None:
    """Create the GpuNode of the Node, with nothing specified, where there is none. Raises KubeError."""
    metadata = {"name": owner.name, "labels": {LABEL_NODE: owner.name}, "ownerReferences": [owner.reference()]}
    try:
        await client.create(GPU_NODES, {"metadata": metadata, "spec": {}})
    except AlreadyExists:
        return
