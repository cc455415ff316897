"""Generates the Python of the protos beside this file: messages, gRPC stubs and their types.

Development only: it needs grpcio-tools, which the agent at run time does not. The result depends on the protos and on
the locked grpcio-tools alone, so a test compares it with what is committed.
"""

from __future__ import annotations

import tempfile
from importlib import resources
from pathlib import Path
from typing import Final

from google.protobuf.descriptor_pb2 import (
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[2]
"""Folder that the import path ``gpu_tenancy.agent.proto`` starts from."""
STEMS: Final = ("cri_v1", "dra_health_v1alpha1", "dra_v1", "pluginregistration_v1")


def generate() -> dict[str, str]:
    """Text of every generated file, by its name in this folder. Raises RuntimeError where a proto does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        _compile(out)
        package = out / HERE.relative_to(ROOT)
        files = {path.name: path.read_text() for path in sorted(package.iterdir())}
        described = FileDescriptorSet.FromString((out / "descriptors").read_bytes())
    return files | {f"{Path(file.name).stem}_pb2_grpc.pyi": _grpc_types(file) for file in described.file}


def write() -> None:
    """Write the generated files into this folder."""
    for name, text in generate().items():
        (HERE / name).write_text(text)


def _compile(out: Path) -> None:
    """Run protoc from the import root, so that the generated modules import each other by their full names."""
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    protos = [str(HERE / f"{stem}.proto") for stem in STEMS]
    well_known = str(resources.files("grpc_tools") / "_proto")
    described = f"--descriptor_set_out={out / 'descriptors'}"
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, described, *protos])
    if code:
        raise RuntimeError(f"protoc refused {', '.join(protos)} with exit code {code}; its message stands above")


def _grpc_types(file: FileDescriptorProto) -> str:
    """Types of the stubs and servicers, which grpcio-tools leaves untyped."""
    stem = Path(file.name).stem
    head = f"import grpc.aio\n\nfrom gpu_tenancy.agent.proto import {stem}_pb2 as pb\n"
    if any(method.server_streaming for service in file.service for method in service.method):
        head = f"from collections.abc import AsyncIterator\n\n{head}"
    return "\n\n".join([head, *(_service_types(service) for service in file.service)])


def _service_types(service: ServiceDescriptorProto) -> str:
    """The three public names that grpcio-tools makes of one service; what a method is asked is never a stream."""
    stub = "".join(_stub_method(method) for method in service.method)
    servicer = "".join(_servicer_method(method) for method in service.method)
    return (
        f"class {service.name}Stub:\n    def __init__(self, channel: grpc.aio.Channel) -> None: ...\n{stub}\n\n"
        f"class {service.name}Servicer:\n{servicer}\n\n"
        f"def add_{service.name}Servicer_to_server(\n"
        f"    servicer: {service.name}Servicer, server: grpc.aio.Server\n) -> None: ...\n"
    )


def _stub_method(method: MethodDescriptorProto) -> str:
    kind = "UnaryStreamMultiCallable" if method.server_streaming else "UnaryUnaryMultiCallable"
    asked, answer = _messages(method)
    return f"    {method.name}: grpc.aio.{kind}[pb.{asked}, pb.{answer}]\n"


def _servicer_method(method: MethodDescriptorProto) -> str:
    asked, answer = _messages(method)
    streams = method.server_streaming
    return (
        f"    {'def' if streams else 'async def'} {method.name}(\n"
        f"        self, request: pb.{asked}, context: grpc.aio.ServicerContext[pb.{asked}, pb.{answer}]\n"
        f"    ) -> {f'AsyncIterator[pb.{answer}]' if streams else f'pb.{answer}'}: ...\n"
    )


def _messages(method: MethodDescriptorProto) -> tuple[str, str]:
    """Names of what the method is asked and what it answers."""
    return method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2]
