"""Facts in few words, for tests: what is not said is unremarkable."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Final

from gpu_tenancy.api.lease import GpuLeaseSpec
from gpu_tenancy.api.node import Gpu, GpuMode
from gpu_tenancy.api.pool import MiningPoolSpec
from gpu_tenancy.api.pricebook import PriceBookSpec
from gpu_tenancy.core.amounts import Amount

MODEL: Final = "A100-SXM4-80GB"
START: Final = datetime(2026, 3, 1, 12, tzinfo=UTC)
"""When every test begins."""
ROOMY: Final = Amount(cpu_milli=128_000, memory=1024 * 2**30, pods=110)
"""A node on which CPU, memory and pod slots are never the reason."""


def gpus(
    node: str, count: int, mig: Collection[int] = (), model: str = MODEL, convertible: Collection[int] = ()
) -> list[Gpu]:
    """GPUs of a node; those in `mig` are in MIG mode, as declared, those in `convertible` may be in the other."""
    return [
        Gpu(
            index=index,
            uuid=f"GPU-{node}-{index}",
            model=model,
            memory_mib=81_920,
            mode=GpuMode.MIG if index in mig else GpuMode.WHOLE,
            declared=GpuMode.MIG if index in mig else GpuMode.WHOLE,
            convertible=index in convertible,
        )
        for index in range(count)
    ]


TERM: Final = ("duration", "notice", "preemption_notice", "start", "renew")
"""Fields of a lease's term."""


def lease_spec(profile: str = "full", count: int = 1, pods: int = 1, **more: object) -> GpuLeaseSpec:
    """A GpuLease; `model`, `duration`, `notice`, `preemption_notice`, `cpu` and `memory` go where they belong."""
    gpu_fields = {"profile": profile, "count": count, "model": more.pop("model", None)}
    term = {name: more.pop(name) for name in TERM if name in more}
    resources = {name: more.pop(name) for name in ("cpu", "memory") if name in more}
    return GpuLeaseSpec.model_validate(
        {"gpus": gpu_fields, "pods": pods, "term": term, **({"pod_resources": resources} if resources else {}), **more}
    )


def pool_spec(**more: object) -> MiningPoolSpec:
    """A MiningPool."""
    return MiningPoolSpec.model_validate({"image": "miner", **more})


def book_spec(rates: Mapping[str, str] | None = None, *, begins: datetime = START, model: str = MODEL) -> PriceBookSpec:
    """A PriceBook with rates by profile; by default whole GPUs at 3600 an hour, one a second."""
    prices = rates if rates is not None else {"full": "3600.00"}
    return PriceBookSpec.model_validate(
        {
            "currency": "USD",
            "effective_from": begins,
            "rates": [{"model": model, "profile": name, "per_hour": price} for name, price in prices.items()],
        }
    )
