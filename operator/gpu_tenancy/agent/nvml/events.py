"""Waits for what one GPU tells of, in a thread of its own.

An event set that a lost GPU is in fails for all of them and does not say for which, so each GPU has its own. Events of
the time before the set existed are not told, nor are those between two sets. Source: NVML API reference, event
handling.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Final

import pynvml

from gpu_tenancy.agent.gpus import GpuError, GpuEvent
from gpu_tenancy.agent.nvml.calls import gpu_handle

_log = logging.getLogger(__name__)

WAIT_MILLISECONDS: Final = 2000
"""How long one call waits: an idle GPU costs 30 calls a minute."""
PAUSE_SECONDS: Final = 10.0
"""After how long a GPU that could not be watched is tried again."""
LOST_PAUSE_SECONDS: Final = 60.0
"""The same for one that was lost; only a reboot brings it back."""
WANTED: Final = pynvml.nvmlEventTypeXidCriticalError


class Watch:
    """Watches one GPU until it is stopped; `tell` is called in its thread."""

    def __init__(self, gpu: str, tell: Callable[[GpuEvent], None]) -> None:
        self._gpu = gpu
        self._tell = tell
        self._stopped = Event()
        self._thread = Thread(target=self._run, name=f"nvml events {gpu}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end."""
        self._stopped.set()

    def join(self) -> None:
        """Wait until it has ended; one that hangs in the driver is left alone."""
        self._thread.join(WAIT_MILLISECONDS / 1000 + 0.5)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._listen()
            except (pynvml.NVMLError_GpuIsLost, GpuError):
                self._tell(GpuEvent(self._gpu, lost=True))
                self._stopped.wait(LOST_PAUSE_SECONDS)
            except pynvml.NVMLError as error:
                _log.warning("GPU %s cannot be watched for Xid events, trying again: %s", self._gpu, error)
                self._stopped.wait(PAUSE_SECONDS)

    def _listen(self) -> None:
        device = gpu_handle(self._gpu)
        supported = pynvml.nvmlDeviceGetSupportedEventTypes(device)
        events = pynvml.nvmlEventSetCreate()
        try:
            pynvml.nvmlDeviceRegisterEvents(device, WANTED & supported, events)
            while not self._stopped.is_set():
                with suppress(pynvml.NVMLError_Timeout):
                    self._tell(_event(self._gpu, pynvml.nvmlEventSetWait(events, WAIT_MILLISECONDS)))
        finally:
            with suppress(pynvml.NVMLError):  # Its GPU may be gone; the set goes with NVML.
                pynvml.nvmlEventSetFree(events)


def _event(gpu: str, data: Any) -> GpuEvent:  # noqa: ANN401
    gi, ci = int(data.gpuInstanceId), int(data.computeInstanceId)
    nobody = GpuEvent.UNKNOWN
    return GpuEvent(gpu, int(data.eventData), None if gi == nobody else gi, None if ci == nobody else ci)
