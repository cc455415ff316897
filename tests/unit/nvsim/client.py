"""A process that uses CUDA on a simulated node through the unmodified cuda-bindings, call by call as a test tells it.

As a module it is what the test holds; as a program it is that process: it reads calls from its input, one line of JSON
each, and answers with the CUresult and what the call gave.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from tests.nvsim.node import Node

ROOT: Final = Path(__file__).parents[3]


class CudaError(AssertionError):
    """A call that should have succeeded did not."""


class Client:
    """The process. Its death is certain at the end of the `with` statement."""

    def __init__(self, node: Node, *, inside: Sequence[str] = (), program: str = "", **environment: str) -> None:
        """`inside`: a command that it runs under; `environment`: beside what a process of the node needs.

        `program`: Python that it runs instead of calls.
        """
        path = f"{ROOT}{os.pathsep}{ROOT / 'operator'}"
        clean = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        self._process = subprocess.Popen(
            [*inside, sys.executable, *(("-c", program) if program else ("-m", "tests.unit.nvsim.client"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**clean, **node.environment, "PYTHONPATH": path, **environment},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.communicate()

    @property
    def pid(self) -> int:
        """As this process sees it."""
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def send(self, name: str, *arguments: object) -> None:
        """Begin a call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps([name, *arguments])}\n")
        self._process.stdin.flush()

    def answer(self) -> list[Any]:
        """CUresult and values of the call that was begun."""
        found: list[Any] = json.loads(self.line() or "[null]")
        return found

    def line(self) -> str:
        """The next line of its output."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def code(self, name: str, *arguments: object) -> int:
        """The CUresult of a call."""
        self.send(name, *arguments)
        return int(self.answer()[0])

    def ok(self, name: str, *arguments: object) -> Any:  # noqa: ANN401  (what CUDA gives)
        """What a call gives that must succeed: nothing, a value, or several."""
        self.send(name, *arguments)
        code, *values = self.answer()
        if code != 0:
            raise CudaError(f"{name}{arguments}: CUresult {code}.")
        return values[0] if len(values) == 1 else tuple(values) or None

    def begin(self, device: int = 0) -> Self:
        """Initialise CUDA and make the device's context current."""
        self.ok("cuInit", 0)
        self.ok("cuCtxSetCurrent", self.ok("cuDevicePrimaryCtxRetain", device))
        return self

    def everything(self) -> tuple[int, int]:
        """Allocate all that is free: pointer and size."""
        free, _ = self.ok("cuMemGetInfo")
        return self.ok("cuMemAlloc", free), free

    def read(self, pointer: int, size: int = 4) -> bytes:
        """What stands there."""
        return bytes.fromhex(self.ok("cuMemcpyDtoH", pointer, size))


def _plain(value: Any) -> Any:  # noqa: ANN401
    """A value that CUDA gave, as JSON has it."""
    if isinstance(value, bytes):
        return value.rstrip(b"\0 ").decode()
    return value.bytes.hex() if hasattr(value, "bytes") else int(value)


def _call(driver: Any, name: str, arguments: list[Any]) -> list[Any]:  # noqa: ANN401  (cuda-bindings has no types)
    if name == "cuMemcpyDtoH":
        pointer, size = arguments
        buffer = bytearray(size)
        [code] = driver.cuMemcpyDtoH(buffer, pointer, size)
        return [int(code), buffer.hex()]
    if name == "cuMemcpyHtoD":
        pointer, content = arguments
        arguments = [pointer, bytes.fromhex(content), len(content) // 2]
    elif name == "cuCtxSetCurrent":
        arguments = [driver.CUcontext(arguments[0])]
    elif name == "cuDeviceGetAttribute":
        arguments = [driver.CUdevice_attribute(arguments[0]), arguments[1]]
    elif name in {"cuGetErrorName", "cuGetErrorString"}:
        arguments = [driver.CUresult(arguments[0])]
    code, *values = getattr(driver, name)(*arguments)
    return [int(code), *(None if value is None else _plain(value) for value in values)]


def _own_process(_driver: Any, arguments: list[Any]) -> list[Any]:  # noqa: ANN401
    """What NVML lists of a GPU to this process itself."""
    import pynvml  # noqa: PLC0415  (in the program only)

    pynvml.nvmlInit()
    found = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(arguments[0]))
    pynvml.nvmlShutdown()
    return [0, [one.pid for one in found], os.getpid()]


def _in_child(driver: Any, arguments: list[Any]) -> list[Any]:  # noqa: ANN401
    """What a call gives in a child made by fork."""
    name, *others = arguments
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(writing, json.dumps(_call(driver, name, others)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    answer: list[Any] = json.loads(os.read(reading, 4096))
    return answer


def _forever(driver: Any, _arguments: list[Any]) -> list[Any]:  # noqa: ANN401
    """Allocate, write and free, until somebody ends it."""
    while True:
        _, pointer = driver.cuMemAlloc(6 << 20)
        driver.cuMemsetD32(int(pointer) + 4, 0x11111111, 100)
        driver.cuMemsetD8(int(pointer) + 5, 0x22, 100)
        driver.cuMemFree(pointer)


def main() -> None:
    """Do the calls of the input."""
    from cuda.bindings import driver  # noqa: PLC0415  (in the program only)

    own = {"own process": _own_process, "in child": _in_child, "forever": _forever}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer = own[name](driver, arguments) if name in own else _call(driver, name, arguments)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
