"""Names that are derived, so that creating a thing twice is impossible. Pure."""

from __future__ import annotations

from hashlib import sha256

from gpu_tenancy.mig.profiles import FULL


def device_name(index: int, profile: str, start: int, holder_uid: str, attempt: int) -> str:
    """Name of a device in its node's ResourceSlice: placement and a hash of its holder, as a DNS label.

    A new holder, or a new attempt of the same one, is a new name: an allocation of the former holder can then never be
    mistaken for, nor block, the new one.
    """
    tag = sha256(f"{holder_uid}/{attempt}".encode()).hexdigest()[:6]
    if profile == FULL:
        return f"gpu{index}-{tag}"
    return f"gpu{index}-{profile.replace('.', '')}-{start}-{tag}"


def miner_name(node: str, device: str) -> str:
    """Name of the pod and the claim of the miner on a device; unique in the cluster, at most 63 characters."""
    tag = sha256(f"{node}/{device}".encode()).hexdigest()[:6]
    return f"miner-{node[:20].rstrip('.-')}-{device[:24].rstrip('-')}-{tag}"


def job_name(lease: str, attempt: int) -> str:
    """Name of the Job of a placement attempt, at most 63 characters (a started Job's affinity is immutable)."""
    suffix = f"-{attempt}"
    if len(lease) + len(suffix) <= 57:
        return lease + suffix
    tag = sha256(lease.encode()).hexdigest()[:6]
    return f"{lease[: 50 - len(suffix)].rstrip('.-')}-{tag}{suffix}"
