"""ClaimHolder: the opaque parameters that tie a ResourceClaim to its holder.

The operator writes one into every claim and claim template of its making (claim specs are immutable); the agent
compares it with the holder of the device before it hands the device out. It is never an object of its own and has no
CustomResourceDefinition. Pure data.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gpu_tenancy.api.base import ApiModel
from gpu_tenancy.api.names import API_VERSION, ApiVersion


class ClaimHolder(ApiModel):
    """Opaque device configuration of a claim: whose device it asks for."""

    api_version: ApiVersion = API_VERSION
    """Always gpu-tenancy.dev/v1alpha1."""
    kind: Literal["ClaimHolder"] = "ClaimHolder"
    """Always ClaimHolder."""
    holder: str = Field(min_length=1, max_length=64)
    """UID of the GpuLease or MiningPool that the claim was made for; the agent refuses the claim on any other's
    device."""
