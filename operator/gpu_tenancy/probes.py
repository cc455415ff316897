"""HTTP endpoint of operator and agent: /metrics, /healthz (is the loop alive?), /readyz (has it seen everything?).

Answers with a sentence where the answer is no. Serves nothing else and changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

Verdict = Callable[[], str]
"""Empty for yes, else why not."""


async def _nothing() -> None:
    """Metrics that are kept up to date anyway."""


async def serve(
    host: str,
    port: int,
    registry: CollectorRegistry,
    healthy: Verdict,
    ready: Verdict,
    refresh: Callable[[], Awaitable[None]] = _nothing,
) -> web.AppRunner:
    """Start serving; returns the runner, whose `cleanup` ends it. `refresh` is awaited before metrics are told."""
    app = web.Application()

    async def metrics(_: web.Request) -> web.Response:
        await refresh()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app.router.add_get("/metrics", metrics)
    app.router.add_get("/healthz", _answer(healthy))
    app.router.add_get("/readyz", _answer(ready))
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner


def _answer(verdict: Verdict) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_: web.Request) -> web.Response:
        why_not = verdict()
        return web.Response(text=f"{why_not or 'ok'}\n", status=503 if why_not else 200)

    return answer
