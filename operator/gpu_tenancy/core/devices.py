"""Names that are derived, so that creating a thing twice is impossible. Pure."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import sha256
from typing import Final

from gpu_tenancy.mig.profiles import FULL


def device_name(index: int, profile: str, start: int, holder_uid: str, attempt: int) -> str:
    """Name of a device in its node's ResourceSlice: placement and a hash of its holder, as a DNS label.

    A new holder, or a new attempt of the same one, is a new name: an allocation of the former holder can then never be
    mistaken for, nor block, the new one.
    """
    tag = _tag(f"{holder_uid}/{attempt}")
    if profile == FULL:
        return f"gpu{index}-{tag}"
    return f"gpu{index}-{profile.replace('.', '')}-{start}-{tag}"


@lru_cache(maxsize=16384)
def start_of(device: str) -> int | None:
    """First memory slice of the device of that name, 0 for a whole GPU; None where it is not one of our names."""
    named = _NAME.fullmatch(device)
    return int(named["start"] or 0) if named else None


_NAME: Final = re.compile(r"gpu\d+(-\d+g\d+gb-(?P<start>[0-7]))?-[0-9a-f]{6}")
"""Names that `device_name` gives."""


def miner_name(node: str, device: str) -> str:
    """Name of the claim of the miner on a device; unique in the cluster, and short enough for its pod's."""
    tag = _tag(f"{node}/{device}")
    return f"miner-{node[:20].replace('.', '-').rstrip('-')}-{device[:24].rstrip('-')}-{tag}"


def miner_pod_name(claim: str, claim_uid: str) -> str:
    """Name of the pod that uses a miner's claim: a DNS label (a pod's name is its host name), and another than that of
    an earlier claim's pod on the device. Two pods of one name, one after the other, end kube-scheduler where its watch
    broke meanwhile (github.com/kubernetes/kubernetes/pull/141255)."""
    return f"{claim}-{_tag(claim_uid)[:4]}"


def job_name(lease: str, attempt: int) -> str:
    """Name of the Job of a placement attempt, at most 63 characters (a started Job's affinity is immutable)."""
    suffix = f"-{attempt}"
    if len(lease) + len(suffix) <= 57:
        return lease + suffix
    tag = _tag(lease)
    return f"{lease[: 50 - len(suffix)].rstrip('.-')}-{tag}{suffix}"


@lru_cache(maxsize=16384)
def _tag(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:6]
