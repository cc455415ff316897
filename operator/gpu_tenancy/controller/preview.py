"""What the next cycle would do, with these manifests on this cluster: looked at, never done.

The cluster is listed once, or read from a file that was saved from one; the manifests are laid over it, and then the
operator's own gather and planner look at it. Only what the API server alone can say is not asked: the CEL rules of the
kinds, and whether a lease's template makes a valid pod.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import yaml
from pydantic import ValidationError

from gpu_tenancy.api.base import ApiModel, format_micro_time, format_time
from gpu_tenancy.api.lease import GpuLease
from gpu_tenancy.api.names import API_VERSION, LABEL_AGENT
from gpu_tenancy.api.pool import MiningPool
from gpu_tenancy.api.pricebook import PriceBook
from gpu_tenancy.api.tenant import GpuTenant
from gpu_tenancy.controller import digests
from gpu_tenancy.controller.cycle import gather_of
from gpu_tenancy.controller.settings import Settings
from gpu_tenancy.controller.views import Pulse, Starting, Views
from gpu_tenancy.core.actions import Plan
from gpu_tenancy.core.planner import plan
from gpu_tenancy.core.snapshot import Snapshot
from gpu_tenancy.kube import resources
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.picture import Picture, Recorder

KINDS: Final[Mapping[str, tuple[type[ApiModel], resources.Resource]]] = {
    "GpuLease": (GpuLease, resources.GPU_LEASES),
    "MiningPool": (MiningPool, resources.MINING_POOLS),
    "GpuTenant": (GpuTenant, resources.GPU_TENANTS),
    "PriceBook": (PriceBook, resources.PRICE_BOOKS),
}
"""Kinds of which manifests are understood."""
TAKEN_AT: Final = "takenAt"
LISTING_SECONDS: Final = 60.0
"""How long listing a cluster may take."""


class BadInputError(ValueError):
    """A file cannot be used; the sentence names file, document and field."""


class Taken(NamedTuple):
    """A cluster as it was."""

    objects: Sequence[Object]
    at: datetime


class Preview(NamedTuple):
    """What the next cycle would do."""

    snapshot: Snapshot
    plan: Plan
    at: datetime
    named: frozenset[str]
    """UIDs of the objects that the manifests are about."""


# --- the cluster ------------------------------------------------------------------------------------------------------


async def take(kubeconfig: str | None, settings: Settings) -> Taken:
    """List what the operator looks at. Raises an error of `kube.errors` where the API server does not let it."""
    async with KubeClient.connect(kubeconfig, user_agent="gpu-tenancy-plan") as client:
        recorder = Recorder(client)
        at = datetime.now(UTC)
        await _seen(recorder, settings, at)
    return Taken([_lean(one) for one in recorder.objects()], at)


def save(taken: Taken, path: Path) -> None:
    """Write a cluster into a file."""
    content = {"apiVersion": "v1", "kind": "List", TAKEN_AT: format_micro_time(taken.at), "items": taken.objects}
    path.write_text(json.dumps(content, indent=1) + "\n")


def load(path: Path) -> Taken:
    """A cluster from a file: one that was saved, or a List as `kubectl get -o json` and `-o yaml` print it."""
    try:
        text = path.read_text()
        content = json.loads(text) if text.lstrip().startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise BadInputError(f"{path} is neither JSON nor YAML: {error}") from error
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise BadInputError(f"{path} is no snapshot: it has no list `items`; make one with gpu-tenancy plan --save")
    for number, one in enumerate(items):
        if not (isinstance(one, dict) and {"apiVersion", "kind", "metadata"} <= one.keys()):
            raise BadInputError(f"{path}, items[{number}] is no Kubernetes object: it needs apiVersion, kind, metadata")
        if not (isinstance(one["metadata"], dict) and {"name", "uid", "resourceVersion"} <= one["metadata"].keys()):
            raise BadInputError(
                f"{path}, items[{number}].metadata needs name, uid and resourceVersion, as kubectl prints"
            )
    return Taken(items, _taken_at(content, items, path))


def _taken_at(content: Mapping[str, Any], items: Iterable[Object], path: Path) -> datetime:
    """When it was saved; of a list that kubectl printed, when an agent was last heard."""
    beats = [
        one["spec"]["renewTime"]
        for one in items
        if LABEL_AGENT in (one["metadata"].get("labels") or {}) and "renewTime" in (one.get("spec") or {})
    ]
    text = content.get(TAKEN_AT) or max(beats, default=None)
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC) if text else datetime.now(UTC)
    except ValueError as error:
        raise BadInputError(f'{path}, {TAKEN_AT}: "{text}" is no time') from error


def _lean(body: Object) -> Object:
    """What a file should not have: what nobody asks for, and of pods everything but what they ask for."""
    if body["kind"] == resources.PODS.kind:
        pod = msgspec.convert(body, digests.Pod)
        return {"apiVersion": "v1", "kind": "Pod", **msgspec.to_builtins(pod)}
    metadata = {name: value for name, value in body["metadata"].items() if name != "managedFields"}
    return {**body, "metadata": metadata}


async def _seen(source: Picture | Recorder, settings: Settings, now: datetime) -> Views:
    """Everything, seen once."""
    views = Views(source, settings.system_namespace, lambda: None)
    views.pulse, views.starting = Pulse(lambda: now), Starting(lambda: now)
    await views.store.resync(source, everything=True)
    keeping = asyncio.create_task(views.run())
    try:
        await asyncio.wait_for(views.synced(), LISTING_SECONDS)
    except TimeoutError as error:
        raise BadInputError(f"the cluster could not be listed: {views.trouble() or 'it took too long'}") from error
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    return views


# --- the manifests ----------------------------------------------------------------------------------------------------


def manifests(paths: Iterable[Path]) -> Iterator[Object]:
    """Every document of the files. Raises BadInputError with a sentence that names file, document and field."""
    for path in paths:
        try:
            documents = list(yaml.safe_load_all(path.read_text()))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path} is not YAML: {error}") from error
        for number, body in enumerate(documents, 1):
            if body is not None:
                yield _checked(body, f"{path}, document {number}")


def _checked(body: object, where: str) -> Object:
    if not isinstance(body, dict) or body.get("apiVersion") != API_VERSION or body.get("kind") not in KINDS:
        kind = f"a {body.get('kind')} of {body.get('apiVersion')}" if isinstance(body, dict) else "no object"
        raise BadInputError(f"{where} is {kind}; plan understands {', '.join(KINDS)} of {API_VERSION}")
    model, resource = KINDS[body["kind"]]
    metadata = body.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise BadInputError(f"{where}: metadata.name is missing")
    try:
        model.model_validate({"spec": body.get("spec")})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BadInputError(f"{where} ({body['kind']} {metadata['name']}), {field}: {first['msg']}") from error
    if resource.namespaced:
        body["metadata"] = {"namespace": "default", **metadata}
    return body


def _name(body: Object) -> tuple[str, str, str]:
    return body["kind"], body["metadata"].get("namespace", ""), body["metadata"]["name"]


def laid_over(objects: Iterable[Object], new: Iterable[Object], now: datetime) -> tuple[list[Object], frozenset[str]]:
    """The objects as they are once the new ones are applied, and the UIDs of those."""
    found = {_name(one): one for one in objects if one["apiVersion"] == API_VERSION}
    others = [one for one in objects if one["apiVersion"] != API_VERSION]
    named = set()
    for number, body in enumerate(new, 1):
        former = found.get(_name(body))
        found[_name(body)] = one = _changed(former, body) if former else _created(body, number, now)
        named.add(one["metadata"]["uid"])
    return [*others, *found.values()], frozenset(named)


def _changed(former: Object, body: Object) -> Object:
    if former.get("spec") == body["spec"]:
        return former
    generation = former["metadata"].get("generation", 1) + 1
    return {**former, "metadata": {**former["metadata"], "generation": generation}, "spec": body["spec"]}


def _created(body: Object, number: int, now: datetime) -> Object:
    """As the API server would make it. Those of one file are of one age: the order is then that of their names."""
    made = {"uid": f"new-{number}", "generation": 1, "resourceVersion": "1", "creationTimestamp": format_time(now)}
    return {**body, "metadata": {**body["metadata"], **made}}


# --- the plan ---------------------------------------------------------------------------------------------------------


async def preview(taken: Taken, new: Iterable[Object], settings: Settings) -> Preview:
    """What the next cycle would do once the manifests are applied. A template that was not checked yet is taken for
    accepted."""
    objects, named = laid_over(taken.objects, new, taken.at)
    views = await _seen(Picture(objects), settings, taken.at)
    accepted = {body["metadata"]["uid"]: "" for body in views.store.all(resources.GPU_LEASES)}
    snapshot = gather_of(views, settings).snapshot(taken.at, accepted, {})
    return Preview(snapshot, plan(snapshot, taken.at), taken.at, named)
