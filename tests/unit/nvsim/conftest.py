"""A simulated node of its own for each test, seen through the unmodified nvidia-ml-py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from tests.nvsim.library import library
from tests.nvsim.node import STATE, Node


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    """A node of 8 × A100-SXM4-80GB whose driver this process talks to."""
    one = Node.create(tmp_path / "node")
    with driver_of(one, monkeypatch):
        yield one


class driver_of:  # noqa: N801  (a context manager, named as one is read)
    """NVML is initialised on that node."""

    def __init__(self, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
        self._node = node
        self._monkeypatch = monkeypatch

    def __enter__(self) -> None:
        # nvidia-ml-py finds by its SONAME what is loaded already.
        ctypes.CDLL(str(library()))
        self._monkeypatch.setenv(STATE, str(self._node.path))
        pynvml.nvmlInit()

    def __exit__(self, *_: object) -> None:
        pynvml.nvmlShutdown()
