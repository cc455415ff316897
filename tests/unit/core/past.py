"""What closed segments come to, straight from the definition: what the operator's running sums are compared with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from math import fsum

from gpu_tenancy.api.usage import UsageRecordSpec
from gpu_tenancy.core.snapshot import PastUsage
from gpu_tenancy.core.tenancy import decayed, holding


def past_usage(segments: Iterable[UsageRecordSpec], at: datetime, half_life: timedelta) -> PastUsage:
    """What the closed ones among these segments come to; each is given once."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in segments:
        if one.billable_to is not None:
            slices = holding(one.profile, len(one.devices)).memory_slices
            found[one.lease_namespace].append(decayed(slices, one.billable_from, one.billable_to, at, half_life))
    return PastUsage(at, {namespace: fsum(each) for namespace, each in found.items()})
