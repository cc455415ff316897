"""`python -m tests.nvsim`: what a person can do to a node while others use it."""

from __future__ import annotations

import pynvml
import pytest
from click.testing import CliRunner, Result

from tests.nvsim.__main__ import main
from tests.nvsim.node import Node
from tests.unit.nvsim import calls
from tests.unit.nvsim.calls import Placement


def run(node: Node, *words: str) -> Result:
    return CliRunner().invoke(main, [str(node.path), *words])


def ran(node: Node, *words: str) -> str:
    """Output of a command that must succeed."""
    done = run(node, *words)
    assert done.exit_code == 0, done.output
    return done.output


def test_it_shows_gpus_mig_devices_and_processes(node: Node) -> None:
    calls.in_mig_mode(1)
    instance = calls.create(calls.gpu(1), 9, Placement(0, 4))
    mig = pynvml.nvmlComputeInstanceGetInfo(calls.full_width(instance, 3)).device
    gi = pynvml.nvmlDeviceGetGpuInstanceId(mig)
    ran(node, "process", "add", "1", "4711", "--gi", str(gi), "--ci", "0", "--memory-mib", "100", "--kind", "mps")
    ran(node, "lose", "2")
    ran(node, "busy", "3")
    shown = ran(node, "show")
    for text in (node.boot_id, pynvml.nvmlDeviceGetUUID(mig), f"3g.40gb, gi {gi}, ci 0", "4711", "mig_busy 1"):
        assert text in shown
    assert "lost, until a reboot" in shown
    assert pynvml.nvmlDeviceGetMPSComputeRunningProcesses(mig)[0].usedGpuMemory == 100 << 20
    ran(node, "process", "end", "4711")
    assert "4711" not in ran(node, "show")


def test_faults_are_added_listed_and_taken_away(node: Node) -> None:
    number = ran(node, "fault", "nvmlDeviceGetName", "--gpu", "0", "--result", "999", "--times", "1").strip()
    ran(node, "fault", "cu*", "--delay-ms", "1")
    with pytest.raises(pynvml.NVMLError_Unknown):
        pynvml.nvmlDeviceGetName(calls.gpu())
    listed = ran(node, "faults")
    assert "nvmlDeviceGetName" in listed
    assert "any" in listed
    ran(node, "clear", number)
    assert "nvmlDeviceGetName" not in ran(node, "faults")
    assert "there is no such" in run(node, "clear", number).output


def test_what_breaks_a_gpu(node: Node) -> None:
    events = pynvml.nvmlEventSetCreate()
    pynvml.nvmlDeviceRegisterEvents(calls.gpu(), pynvml.nvmlEventTypeXidCriticalError, events)
    ran(node, "xid", "0", "94", "--gi", "2", "--ci", "0")
    told = pynvml.nvmlEventSetWait(events, 0)
    assert (told.eventData, told.gpuInstanceId, told.computeInstanceId) == (94, 2, 0)
    pynvml.nvmlEventSetFree(events)
    ran(node, "ecc", "0", "--uncorrected", "2")
    ran(node, "ecc", "0", "--uncorrected", "1", "--corrected", "5")
    assert pynvml.nvmlDeviceGetTotalEccErrors(calls.gpu(), 1, 1) == 3
    assert pynvml.nvmlDeviceGetTotalEccErrors(calls.gpu(), 0, 0) == 5
    ran(node, "remap", "0", "--pending", "1", "--corrected", "4")
    assert pynvml.nvmlDeviceGetRemappedRows(calls.gpu()) == (4, 0, 1, 0)
    ran(node, "reset", "0")
    assert pynvml.nvmlDeviceGetRemappedRows(calls.gpu()) == (4, 1, 0, 0)
    ran(node, "set", "celsius", "91", "--gpu", "0")
    assert pynvml.nvmlDeviceGetTemperature(calls.gpu(), 0) == 91
    ran(node, "busy", "0")
    assert run(node, "reset", "0").exit_code == 1
    ran(node, "busy", "0", "--off")
    before = node.boot_id
    assert ran(node, "reboot").strip() == node.boot_id != before


def test_memory_is_planted_and_looked_at(node: Node) -> None:
    ran(node, "plant", "0", "0xdeadbeef", "--slice", "2")
    assert ran(node, "residue", "0").count("0xdeadbeef") == 1
    ran(node, "plant", "0", "7")
    uuid = pynvml.nvmlDeviceGetUUID(calls.gpu())
    assert ran(node, "residue", "0", "--device", uuid).count("0x00000007") == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("set", "colour", "1"), "colour is no field of the node; --gpu names a GPU. There are: copy_mb_s"),
        (("set", "colour", "1", "--gpu", "0"), "colour is no field of a GPU. There are: application_clock"),
        (("set", "gpu_count", "100"), "gpu_count is no field of the node"),
        (("lose", "8"), "there is no such GPU"),
        (("plant", "0", "red"), "Invalid value for 'PATTERN'"),
        (("process", "end", "1"), "there is no such GPU, process"),
    ],
)
def test_errors_are_sentences(node: Node, words: tuple[str, ...], sentence: str) -> None:
    done = run(node, *words)
    assert done.exit_code in {1, 2}
    assert "Traceback" not in done.output
    assert sentence in done.output


def test_what_is_no_node_is_said(node: Node) -> None:
    node.set("driver_loaded", 0)
    pynvml.nvmlShutdown()
    assert "Driver Not Loaded" in run(node, "show").output
    node.set("driver_loaded", 1)
    pynvml.nvmlInit()
    done = CliRunner().invoke(main, [__file__, "show"])
    assert "there is no node in that file" in done.output
