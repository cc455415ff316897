"""Events, errors, power, energy, clocks and modes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pynvml
import pytest

from tests.nvsim.node import NO_INSTANCE, Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement


@contextmanager
def registered(*indices: int, types: int = pynvml.nvmlEventTypeXidCriticalError) -> Iterator[Any]:
    """An event set for those GPUs."""
    events = pynvml.nvmlEventSetCreate()
    for index in indices:
        pynvml.nvmlDeviceRegisterEvents(calls.gpu(index), types, events)
    yield events
    pynvml.nvmlEventSetFree(events)


def told(events: Any, timeout_ms: int = 0) -> tuple[str, int, int, int]:  # noqa: ANN401
    """UUID, Xid and instances of the next event."""
    event = pynvml.nvmlEventSetWait(events, timeout_ms)
    uuid = pynvml.nvmlDeviceGetUUID(event.device)
    return uuid, event.eventData, event.gpuInstanceId, event.computeInstanceId


def test_an_xid_is_told_once_to_each_who_listened_before(node: Node) -> None:
    node.xid(0, 13)
    with registered(0, 1) as first, registered(1) as second:
        with pytest.raises(pynvml.NVMLError_Timeout):
            told(first)
        node.xid(0, 94, gi=2, ci=0)
        node.xid(1, 63)
        one, other = (pynvml.nvmlDeviceGetUUID(calls.gpu(index)) for index in (0, 1))
        assert told(first) == (one, 94, 2, 0)
        assert told(first) == told(second) == (other, 63, NO_INSTANCE, NO_INSTANCE)
        for events in (first, second):
            with pytest.raises(pynvml.NVMLError_Timeout):
                told(events)


def test_whoever_waits_is_woken_by_what_another_process_tells(node: Node) -> None:
    with registered(3) as events:
        later = threading.Timer(0.1, node.xid, (3, 48))
        later.start()
        assert told(events, 30_000)[1] == 48
        later.join()


def test_a_lost_gpu_tells_xid_79_and_then_ends_every_wait(node: Node) -> None:
    with registered(0, 1) as events, registered(1) as of_the_other:
        node.lose(0)
        assert pynvml.nvmlEventSetWait(events, 0).eventData == 79
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            pynvml.nvmlEventSetWait(events, 0)
        with pytest.raises(pynvml.NVMLError_Timeout):
            pynvml.nvmlEventSetWait(of_the_other, 0)


def test_a_second_registration_loses_nothing(node: Node) -> None:
    with registered(0) as events:
        node.xid(0, 94)
        pynvml.nvmlDeviceRegisterEvents(calls.gpu(0), pynvml.nvmlEventTypeClock, events)
        assert told(events)[1] == 94


def test_a_wait_suffers_a_fault_once(node: Node) -> None:
    with registered(0) as events, node.fault("nvmlEventSetWait_v2", delay_ms=1) as fault:
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(told, events, 5000)
            for _ in range(10):
                time.sleep(0.01)
                node.xid(1, 13)
            node.xid(0, 94)
            assert waiting.result()[1] == 94
        assert fault.seen == 1


def test_a_change_of_layout_by_somebody_else_is_an_event(node: Node) -> None:
    del node
    with registered(0, types=pynvml.nvmlEventMigConfigChange) as events:
        calls.in_mig_mode(0)
        assert pynvml.nvmlEventSetWait(events, 0).eventType == pynvml.nvmlEventMigConfigChange


def test_events_are_registered_for_on_gpus_only(node: Node) -> None:
    del node
    device = calls.in_mig_mode()
    instance = calls.create(device, 9, Placement(0, 4))
    mig = pynvml.nvmlComputeInstanceGetInfo(calls.full_width(instance, 3)).device
    assert pynvml.nvmlDeviceGetSupportedEventTypes(device) & pynvml.nvmlEventTypeXidCriticalError
    assert pynvml.nvmlDeviceGetSupportedEventTypes(mig) == 0
    events = pynvml.nvmlEventSetCreate()
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceRegisterEvents(mig, pynvml.nvmlEventTypeXidCriticalError, events)
    pynvml.nvmlEventSetFree(events)
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlEventSetWait(events, 0)


def test_ecc_errors_are_counted_since_the_driver_and_since_ever(node: Node) -> None:
    device = calls.gpu()
    node.set("ecc_volatile.uncorrected", 1, gpu=0)
    node.set("ecc_aggregate.uncorrected", 3, gpu=0)
    uncorrected, since_load, since_ever = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, 0, 1
    assert pynvml.nvmlDeviceGetTotalEccErrors(device, uncorrected, since_load) == 1
    assert pynvml.nvmlDeviceGetTotalEccErrors(device, uncorrected, since_ever) == 3
    assert pynvml.nvmlDeviceGetTotalEccErrors(device, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, since_ever) == 0
    node.reset(0)
    assert pynvml.nvmlDeviceGetTotalEccErrors(calls.gpu(), uncorrected, since_load) == 0
    assert pynvml.nvmlDeviceGetTotalEccErrors(calls.gpu(), uncorrected, since_ever) == 3


def test_a_pending_row_remap_is_done_by_a_reset_and_a_failed_one_stays(node: Node) -> None:
    node.set("remap_pending", 1, gpu=0)
    node.set("remap_failed", 1, gpu=0)
    assert pynvml.nvmlDeviceGetRemappedRows(calls.gpu()) == (0, 0, 1, 1)
    node.reset(0)
    assert pynvml.nvmlDeviceGetRemappedRows(calls.gpu()) == (0, 1, 0, 1)
    assert pynvml.nvmlDeviceGetRowRemapperHistogram(calls.gpu()).max == 639


def test_gpus_that_remap_rows_retire_no_pages(node: Node) -> None:
    del node
    questions: tuple[Callable[[], object], ...] = (
        lambda: pynvml.nvmlDeviceGetRetiredPages(calls.gpu(), 0),
        lambda: pynvml.nvmlDeviceGetRetiredPages_v2(calls.gpu(), 0),
        lambda: pynvml.nvmlDeviceGetRetiredPagesPendingStatus(calls.gpu()),
    )
    for ask in questions:
        with pytest.raises(pynvml.NVMLError_NotSupported):
            ask()


def test_energy_is_power_times_simulated_time(node: Node) -> None:
    node.stop_clock()
    device = calls.gpu()
    before = pynvml.nvmlDeviceGetTotalEnergyConsumption(device)
    node.set("power_mw", 300_000, gpu=0)
    node.advance(3600)
    assert pynvml.nvmlDeviceGetPowerUsage(device) == 300_000
    pynvml.nvmlDeviceSetPowerManagementLimit(device, 200_000)
    assert pynvml.nvmlDeviceGetPowerUsage(device) == 200_000
    assert pynvml.nvmlDeviceGetCurrentClocksEventReasons(device) == pynvml.nvmlClocksEventReasonSwPowerCap
    node.advance(1800)
    spent = pynvml.nvmlDeviceGetTotalEnergyConsumption(device) - before
    assert spent == (300 * 3600 + 200 * 1800) * 1000  # mJ: 0.4 kWh
    [field] = pynvml.nvmlDeviceGetFieldValues(device, [83])
    assert field.value.ullVal == before + spent
    node.reboot()
    assert pynvml.nvmlDeviceGetTotalEnergyConsumption(calls.gpu()) == 0


def test_a_power_limit_has_bounds_and_is_forgotten_by_a_reset(node: Node) -> None:
    device = calls.gpu()
    assert pynvml.nvmlDeviceGetPowerManagementLimitConstraints(device) == [100_000, 400_000]
    for outside in (99_999, 400_001):
        with pytest.raises(pynvml.NVMLError_InvalidArgument):
            pynvml.nvmlDeviceSetPowerManagementLimit(device, outside)
    pynvml.nvmlDeviceSetPowerManagementLimit(device, 250_000)
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(device) == 250_000
    assert pynvml.nvmlDeviceGetPowerManagementDefaultLimit(device) == 400_000
    node.reset(0)
    assert pynvml.nvmlDeviceGetEnforcedPowerLimit(calls.gpu()) == 400_000


def test_clocks_are_locked_and_let_go(node: Node) -> None:
    device = calls.gpu()
    node.set("power_mw", 300_000, gpu=0)
    assert pynvml.nvmlDeviceGetMaxClockInfo(device, pynvml.NVML_CLOCK_SM) == 1410
    assert pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM) == 1410
    with pytest.raises(pynvml.NVMLError_InvalidArgument):
        pynvml.nvmlDeviceSetGpuLockedClocks(device, 210, 1425)
    pynvml.nvmlDeviceSetGpuLockedClocks(device, 210, 900)
    assert pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM) == 900
    pynvml.nvmlDeviceResetGpuLockedClocks(device)
    assert pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_SM) == 1410
    assert pynvml.nvmlDeviceGetApplicationsClock(device, pynvml.NVML_CLOCK_SM) == 1095
    assert pynvml.nvmlDeviceGetClockInfo(device, pynvml.NVML_CLOCK_MEM) == 1215


def test_what_a_gpu_is(node: Node) -> None:
    device = calls.gpu(1)
    pci = pynvml.nvmlDeviceGetPciInfo(device)
    assert (pci.busId, pci.busIdLegacy) == ("00000000:0F:00.0", "0000:0F:00.0")
    assert pci.pciDeviceId == 0x20B210DE
    for handle in (
        pynvml.nvmlDeviceGetHandleByPciBusId(pci.busId),
        pynvml.nvmlDeviceGetHandleByUUID(pynvml.nvmlDeviceGetUUID(device)),
    ):
        assert pynvml.nvmlDeviceGetIndex(handle) == 1
    assert pynvml.nvmlDeviceGetMinorNumber(device) == 1
    assert pynvml.nvmlDeviceGetArchitecture(device) == pynvml.NVML_DEVICE_ARCH_AMPERE
    assert pynvml.nvmlDeviceGetCudaComputeCapability(device) == (8, 0)
    assert pynvml.nvmlSystemGetDriverVersion() == "570.148.08"
    assert len({pynvml.nvmlDeviceGetUUID(calls.gpu(index)) for index in range(8)}) == 8
    assert len({pynvml.nvmlDeviceGetSerial(calls.gpu(index)) for index in range(8)}) == 8
    assert pynvml.nvmlDeviceGetTemperature(device, 0) == 33
    assert pynvml.nvmlDeviceGetTemperatureThreshold(device, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN) == 89
    assert pynvml.nvmlDeviceGetEccMode(device) == [1, 1]
    assert pynvml.nvmlDeviceGetSramEccErrorStatus is not None
    whole, second = pynvml.nvmlDeviceGetMemoryInfo(device), pynvml.nvmlDeviceGetMemoryInfo(device, version=0x02000028)
    assert whole.total == second.total == 80 << 30
    assert whole.used == second.used + second.reserved
    node.add_process(1, 5, memory=1 << 30)
    assert pynvml.nvmlDeviceGetMemoryInfo(device).used - whole.used == 1 << 30


def test_application_clocks_are_set_and_go_back_to_their_default(node: Node) -> None:
    del node
    device = calls.gpu()
    default = pynvml.nvmlDeviceGetDefaultApplicationsClock(device, pynvml.NVML_CLOCK_SM)
    pynvml.nvmlDeviceSetApplicationsClocks(device, 1215, 1410)
    assert pynvml.nvmlDeviceGetApplicationsClock(device, pynvml.NVML_CLOCK_SM) == 1410 != default
    pynvml.nvmlDeviceResetApplicationsClocks(device)
    assert pynvml.nvmlDeviceGetApplicationsClock(device, pynvml.NVML_CLOCK_SM) == default == 1095


def test_a_pcie_link_that_has_come_down(node: Node) -> None:
    device = calls.gpu()

    def link() -> tuple[int, int, int]:
        return (
            pynvml.nvmlDeviceGetCurrPcieLinkGeneration(device),
            pynvml.nvmlDeviceGetCurrPcieLinkWidth(device),
            pynvml.nvmlDeviceGetPcieReplayCounter(device),
        )

    assert link() == (4, 16, 0)
    for field, value in (("pcie_generation", 3), ("pcie_width", 8), ("pcie_replays", 5)):
        node.set(field, value, gpu=0)
    assert link() == (3, 8, 5)
    assert (
        pynvml.nvmlDeviceGetMaxPcieLinkGeneration(device) == pynvml.nvmlDeviceGetGpuMaxPcieLinkGeneration(device) == 4
    )
    assert pynvml.nvmlDeviceGetMaxPcieLinkWidth(device) == 16
    assert pynvml.nvmlDeviceGetVbiosVersion(device).startswith("92.00.")


def test_fields_by_number(node: Node) -> None:
    node.set("recovery_action", 2, gpu=0)
    node.set("memory_celsius", 44, gpu=0)
    values = pynvml.nvmlDeviceGetFieldValues(calls.gpu(), [82, 184, 199, 230, 9999])
    assert [(one.nvmlReturn, one.value.uiVal) for one in values] == [(0, 44), (0, 0), (0, 0), (0, 2), (3, 0)]


def test_a_gpu_in_use_is_not_drained(node: Node) -> None:
    pci = pynvml.nvmlDeviceGetPciInfo(calls.gpu(0))
    node.add_process(0, 5)
    with pytest.raises(pynvml.NVMLError_InUse):
        pynvml.nvmlDeviceModifyDrainState(pci, 1)
    node.end_process(5)
    pynvml.nvmlDeviceModifyDrainState(pci, 1)
    assert node.get("draining", gpu=0) == 1
