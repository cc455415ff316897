"""HTTP endpoint of the operator: /metrics, /healthz (is the loop alive?), /readyz (has it seen everything?).

Answers with a sentence where the answer is no. Serves nothing else and changes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

Verdict = Callable[[], str]
"""Empty for yes, else why not."""


async def serve(host: str, port: int, registry: CollectorRegistry, healthy: Verdict, ready: Verdict) -> web.AppRunner:
    """Start serving; returns the runner, whose `cleanup` ends it."""
    app = web.Application()

    async def metrics(_: web.Request) -> web.Response:
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
