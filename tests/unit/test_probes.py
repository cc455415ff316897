"""The operator's endpoint says what the loop says of itself: this is all that Kubernetes restarts or spares it by."""

from __future__ import annotations

import asyncio
from typing import Final

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from gpu_tenancy.probes import Verdict, serve

YES: Final = ""
NO: Final = "no cycle has begun or ended for 61 s"


def answers(path: str, healthy: Verdict, ready: Verdict, times: int = 1) -> list[tuple[int, str]]:
    """Status and text of what the endpoint, on a free port of the loopback, answers one time after the other."""
    registry = CollectorRegistry()
    Counter("gpu_tenancy_cycle_failures", "Cycles that ended in an error.", registry=registry).inc(3)

    async def ask() -> list[tuple[int, str]]:
        runner = await serve("127.0.0.1", 0, registry, healthy, ready)
        try:
            async with aiohttp.ClientSession() as session:
                return [await _get(session, runner.addresses[0][1], path) for _ in range(times)]
        finally:
            await runner.cleanup()

    return asyncio.run(ask())


async def _get(session: aiohttp.ClientSession, port: int, path: str) -> tuple[int, str]:
    async with session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


@pytest.mark.parametrize(
    ("path", "healthy", "ready", "answer"),
    [
        ("/healthz", YES, NO, (200, "ok\n")),
        ("/healthz", NO, YES, (503, f"{NO}\n")),
        ("/readyz", NO, YES, (200, "ok\n")),
        ("/readyz", YES, NO, (503, f"{NO}\n")),
    ],
)
def test_each_probe_answers_with_its_own_verdict_and_with_the_reason_where_it_is_no(
    path: str, healthy: str, ready: str, answer: tuple[int, str]
) -> None:
    assert answers(path, lambda: healthy, lambda: ready) == [answer]


def test_the_verdict_is_that_of_the_moment() -> None:
    """One that was kept would let a loop that died look alive for ever."""
    verdicts = [YES, NO, YES]
    assert [status for status, _ in answers("/healthz", verdicts.pop, lambda: YES, times=3)] == [200, 503, 200]


def test_metrics_are_told_whatever_the_verdicts_are() -> None:
    [(status, text)] = answers("/metrics", lambda: NO, lambda: NO)
    assert status == 200
    assert "gpu_tenancy_cycle_failures_total 3.0" in text.splitlines()
