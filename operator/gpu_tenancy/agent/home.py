"""The Node that the agent lives on, and the GpuNode that it keeps beside it.

Reads the one, creates the other; writes neither a Node nor a spec.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from gpu_tenancy.agent.report import Owner
from gpu_tenancy.api.names import ANNOTATION_MIG_GPUS, LABEL_NODE
from gpu_tenancy.kube.client import KubeClient
from gpu_tenancy.kube.errors import AlreadyExists
from gpu_tenancy.kube.resources import GPU_NODES, NODES

_INDICES: Final = re.compile(r"\s*\d+\s*(,\s*\d+\s*)*")


@dataclass(frozen=True, slots=True)
class Home:
    """What the agent needs to know of its Node."""

    owner: Owner
    """Name and UID."""
    mig_gpus: frozenset[int]
    """Indices of the GPUs that the Node declares to be in MIG mode."""


async def read(client: KubeClient, node: str) -> Home:
    """The Node as it is now. Raises KubeError; ValueError for an annotation that makes no sense."""
    metadata = (await client.get(NODES, node))["metadata"]
    text = metadata.get("annotations", {}).get(ANNOTATION_MIG_GPUS, "")
    return Home(Owner(node, metadata["uid"]), mig_gpus(text))


def mig_gpus(text: str) -> frozenset[int]:
    """Indices in the annotation: "6,7". Raises ValueError with the remedy for anything else."""
    if not text.strip():
        return frozenset()
    if not _INDICES.fullmatch(text):
        raise ValueError(f'annotation {ANNOTATION_MIG_GPUS}="{text}" is not understood; write GPU indices, e.g. "6,7"')
    return frozenset(int(index) for index in text.split(","))


async def ensure_gpu_node(client: KubeClient, owner: Owner) -> None:
    """Create the GpuNode of the Node, with nothing specified, where there is none. Raises KubeError."""
    metadata = {"name": owner.name, "labels": {LABEL_NODE: owner.name}, "ownerReferences": [owner.reference()]}
    try:
        await client.create(GPU_NODES, {"metadata": metadata, "spec": {}})
    except AlreadyExists:
        return
