"""The agent's only writer on the API server for what concerns devices: the node's ResourceSlice and GpuNode.status.

One task writes one after the other, always the newest truth, so that several transitions share a write and none
overtakes another: a device leaves the slice before anything else is said about it, and joins it only after its
`readyAt` is stored. Everything written is derived from the situation; nothing is queued.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from gpu_tenancy.agent import report
from gpu_tenancy.agent import situation as known
from gpu_tenancy.agent.checkpoint import UnreadableCheckpoint
from gpu_tenancy.agent.clock import Clock
from gpu_tenancy.agent.home import Home, Owner, Reader
from gpu_tenancy.agent.memory import Memory
from gpu_tenancy.agent.settings import AgentSettings
from gpu_tenancy.agent.steps import slice_next
from gpu_tenancy.api.node import GpuNodeStatus, NodeConditionType, SlotState
from gpu_tenancy.kube.client import KubeClient, Object
from gpu_tenancy.kube.errors import KubeError, NotFound
from gpu_tenancy.kube.resources import GPU_NODES, NODES, RESOURCE_SLICES, Resource

_log = logging.getLogger(__name__)

FIELD_MANAGER: Final = "gpu-tenancy-agent"
"""Owner of what the agent says in GpuNode.status: conditions of others stay as they are."""
OWN_CONDITIONS: Final = (NodeConditionType.READY, NodeConditionType.CONFLICT)
"""Conditions of a GpuNode that the agent writes."""
_LONGEST_PAUSE: Final = 10.0


class Outbox:
    """Writes for one node. `wake` after every change of the situation; `run` never ends but by cancellation."""

    def __init__(
        self, client: KubeClient, memory: Memory, here: tuple[Reader, Home], clock: Clock, settings: AgentSettings
    ) -> None:
        """`here`: who reads the Node, and the Node as it is."""
        self._reader, self.home = here
        self._client = client
        self._memory = memory
        self._clock = clock
        self._settings = settings
        self._woken = asyncio.Event()
        self._uid = ""
        self._status: GpuNodeStatus | None = None
        self._slice: Object | None = None
        self._lingers_until: float | None = None

    def wake(self) -> None:
        """Something changed: look whether it is to be written."""
        self._woken.set()

    def check_status(self, uid: str) -> None:
        """GpuNode has this UID: if it was made anew, nothing that was stored stands there any more."""
        if uid == self._uid:
            return
        self._uid = uid
        self._status = None
        self._memory.update(known.unstored)
        self.wake()

    def subjects(self) -> tuple[tuple[Resource, Object], ...]:
        """What Events are about: the GpuNode and its Node, so that `kubectl describe` of either shows them."""
        owner = self.home.owner
        return (
            (GPU_NODES, {"metadata": {"name": owner.name, "uid": self._uid}}),
            (NODES, {"metadata": {"name": owner.name, "uid": owner.uid}}),
        )

    def slice_lost(self) -> None:
        """The ResourceSlice is gone, or may be: look, and publish the same again."""
        self._slice = None
        self.wake()

    async def resume(self, *, remembers: bool) -> None:
        """Take from the API server what stands there, before anything is done. Raises KubeError.

        `remembers`: there was a checkpoint. Without one, a node that has handed out devices in this boot is not
        touched: who had them, and may have them still, is not known. Raises UnreadableCheckpoint then.
        """
        node = await self._client.get(GPU_NODES, self.home.owner.name)
        self._uid = node["metadata"]["uid"]
        self._status = _parse(node.get("status"))
        self._slice = await self._read_slice()
        slots = self._status.slots if self._status else []
        ready_at = {slot.device: slot.ready_at for slot in slots if slot.ready_at and slot.state is SlotState.READY}
        if not remembers and ready_at and self._status and self._status.boot_id == self._memory.boot_id:
            raise UnreadableCheckpoint(
                f"GpuNode {self.home.owner.name} has {len(ready_at)} devices of this boot, and the checkpoint "
                f"{self._settings.checkpoint} that tells who had them is gone; its folder must outlast the agent. "
                f"Stop every pod that uses a GPU of the node, and reboot it"
            )
        self._memory.update(lambda now: known.resumed(now, _names(self._slice), ready_at, self._clock.now()))

    async def run(self) -> None:
        """Write what is to be written, for ever; what fails is tried again with the truth of that moment."""
        while True:
            await self._something()
            await self._clock.sleep(self._settings.coalesce_seconds)
            self._woken.clear()
            await AsyncRetrying(
                retry=retry_if_exception_type(KubeError),
                wait=wait_exponential_jitter(multiplier=0.05, max=_LONGEST_PAUSE, jitter=0.05),
                sleep=self._clock.sleep,
                before_sleep=self._failed,
            )(self._write)

    async def _something(self) -> None:
        """Wait until somebody wakes us, or a change of status has waited long enough."""
        if self._lingers_until is None:
            await self._woken.wait()
            return
        alarm = asyncio.ensure_future(self._clock.sleep(max(0.0, self._lingers_until - self._clock.monotonic())))
        woken = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait((alarm, woken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            alarm.cancel()
            woken.cancel()

    async def _write(self) -> None:
        await self._memory.saved()
        await self._write_slice()
        await self._write_status()

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._slice = None  # whether the write took place is not known: look first
        _log.warning("Node %s could not be reported, trying again: %s", self.home.owner.name, error)

    # -------------------------------------------------------------------------------------------------------- slice

    async def _write_slice(self) -> None:
        there = self._slice or await self._read_slice()
        held = slice_next(self._memory.situation, self._memory.steps)
        devices = report.slice_devices(self._memory.situation, held)
        names = [one.slot.device for one in held]
        if there is None or _is_stale(there, devices, self.home.owner):
            self._memory.update(lambda now: known.publishing(now, names))
            self._slice = None
            there = await self._put_slice(there, devices)
        self._slice = there
        self._memory.update(lambda now: known.published(now, names))

    async def _put_slice(self, there: Object | None, devices: list[dict[str, Any]]) -> Object:
        if there is None:
            # A slice vanishes with its Node: made for the former one it would be collected again at once.
            self.home = await self._reader.read()
        generation = 1 if there is None else int(there["spec"]["pool"]["generation"]) + 1
        body = report.resource_slice(self.home.owner, devices, generation)
        if there is None:
            return await self._client.create(RESOURCE_SLICES, body)
        body["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"]
        return await self._client.replace(RESOURCE_SLICES, body)

    async def _read_slice(self) -> Object | None:
        try:
            return await self._client.get(RESOURCE_SLICES, report.slice_name(self.home.owner.name))
        except NotFound:
            return None

    # ------------------------------------------------------------------------------------------------------- status

    async def _write_status(self) -> None:
        situation = self._memory.situation
        now = self._clock.now()
        fresh = report.status(situation, self._memory.boot_id, self.home, self._status, now)
        if fresh == self._status:
            self._lingers_until = None
        elif report.is_awaited(self._status, fresh) or self._is_late():
            self._lingers_until = None
            body = {"metadata": {"name": self.home.owner.name}, "status": fresh.to_wire()}
            await self._client.apply(GPU_NODES, body, field_manager=FIELD_MANAGER, subresource="status")
            self._status = fresh
            ready_at = {slot.device: slot.ready_at for slot in fresh.slots if slot.ready_at}
            self._memory.update(lambda here: known.stored(here, ready_at))

    def _is_late(self) -> bool:
        """Whether a change that nobody waits for has waited long enough; its waiting begins with the first question."""
        if self._lingers_until is None:
            self._lingers_until = self._clock.monotonic() + self._settings.linger_seconds
        return self._clock.monotonic() >= self._lingers_until


def _parse(status: object) -> GpuNodeStatus | None:
    """The agent's part of the status on the API server; None where there is none, or one of another version."""
    try:
        whole = GpuNodeStatus.model_validate(status)
    except ValueError:
        return None
    own = [condition for condition in whole.conditions if condition.type in OWN_CONDITIONS]
    return whole.model_copy(update={"conditions": own})


def _names(there: Object | None) -> list[str]:
    return [device["name"] for device in (there or {}).get("spec", {}).get("devices") or []]


def _is_stale(there: Object, devices: list[dict[str, Any]], owner: Owner) -> bool:
    owners = [reference["uid"] for reference in there["metadata"].get("ownerReferences", [])]
    return owners != [owner.uid] or (there["spec"].get("devices") or []) != devices
