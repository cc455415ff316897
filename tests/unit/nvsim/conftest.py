"""A simulated node of its own for each test, seen through the unmodified nvidia-ml-py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def driver_of(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NVML is initialised on that node."""
    # nvidia-ml-py finds by its SONAME what is loaded already.
    ctypes.CDLL(str(library()))
    monkeypatch.setenv(STATE, str(node.path))
    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()
