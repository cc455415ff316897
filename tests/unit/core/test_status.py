"""What a status says fits into it, however much there was to say."""

from __future__ import annotations

from dataclasses import replace

from gpu_tenancy.api.lease import Reason
from gpu_tenancy.api.pricebook import PriceBookStatus
from gpu_tenancy.api.tenant import GpuTenantStatus
from gpu_tenancy.core import platform_status, status
from gpu_tenancy.core.actions import Outlook, PoolOutlook, TenantOutlook
from gpu_tenancy.core.pricing import pricing
from gpu_tenancy.core.snapshot import BookFacts, Failure, TenantFacts
from gpu_tenancy.core.tenancy import Holding
from tests.unit.core.builders import START
from tests.unit.core.simulation import Cluster

LONG = "So it went on. " * 400
BOUND = 1024


def test_the_words_of_a_job_that_failed_at_length_are_cut() -> None:
    cluster = Cluster()
    lease = cluster.lease(cluster.create("train"))
    new = status.lease_status(Outlook(lease, None, over=True, end_message=LONG), None, START)
    assert new.ended is not None
    assert len(new.ended.message) == BOUND
    assert max(len(one.message) for one in new.conditions) == BOUND


def test_the_words_of_a_refusal_at_length_are_cut() -> None:
    cluster = Cluster()
    failure = Failure(str(Reason.API_REJECTED), LONG, START)
    lease = cluster.lease(cluster.create("train"))
    assert (
        max(len(one.message) for one in status.lease_status(Outlook(lease, None), failure, START).conditions) == BOUND
    )
    pool = replace(cluster.pools[cluster.add_pool()], invalid=LONG)
    assert (
        max(len(one.message) for one in platform_status.pool_status(PoolOutlook(pool, 0, 0), None, START).conditions)
        == BOUND
    )


def test_a_tenant_that_is_wrong_in_many_places_says_so_in_bounds() -> None:
    facts = TenantFacts("acme", "uid", 1, START, None, GpuTenantStatus(), LONG)
    [condition] = platform_status.tenant_status(TenantOutlook(facts, Holding(), 0.0), START).conditions
    assert len(condition.message) == BOUND


def test_a_book_that_is_wrong_in_many_places_says_so_in_bounds() -> None:
    book = BookFacts("book", "uid", 1, START, None, PriceBookStatus(), LONG)
    conditions = platform_status.book_status(book, pricing([book], START), START).conditions
    assert max(len(one.message) for one in conditions) == BOUND
