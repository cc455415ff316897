"""Generates the Python of the protos beside this file: messages by protoc, stubs and servicers by what follows.

grpcio-tools would make those as well, untyped and with much that nobody calls: three calls of grpcio are all there is
to a service.

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
    return files | {f"{Path(file.name).stem}_pb2_grpc.py": _services(file) for file in described.file}


def write() -> None:
    """Write the generated files into this folder."""
    for name, text in generate().items():
        (HERE / name).write_text(text)


def _compile(out: Path) -> None:
    """Run protoc from the import root, so that the generated modules import each other by their full names."""
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi")]
    protos = [str(HERE / f"{stem}.proto") for stem in STEMS]
    well_known = str(resources.files("grpc_tools") / "_proto")
    described = f"--descriptor_set_out={out / 'descriptors'}"
    code = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *outputs, described, *protos])
    if code:
        raise RuntimeError(f"protoc refused {', '.join(protos)} with exit code {code}; its message stands above")


def _services(file: FileDescriptorProto) -> str:
    """The module with the clients and servers of a proto's services."""
    stem = Path(file.name).stem
    streams = any(method.server_streaming for service in file.service for method in service.method)
    head = (
        f'"""Client and server of the services of {stem}.proto. Written by generate.py."""\n\n'
        f"from abc import ABC, abstractmethod\n"
        f"{'from collections.abc import AsyncIterator' + chr(10) if streams else ''}\n"
        f"import grpc\nimport grpc.aio\n\n"
        f"from gpu_tenancy.agent.proto import {stem}_pb2 as pb\n"
    )
    return "\n\n".join([head, *(_service(file.package, service) for service in file.service)])


def _service(package: str, service: ServiceDescriptorProto) -> str:
    """The three public names of one service; what a method is asked is never a stream."""
    name = f"{package}.{service.name}"
    calls = "".join(_stub_method(name, method) for method in service.method)
    methods = "\n".join(_servicer_method(method) for method in service.method)
    handlers = "".join(_handler(method) for method in service.method)
    return (
        f"class {service.name}Stub:\n    def __init__(self, channel: grpc.aio.Channel) -> None:\n{calls}\n\n"
        f"class {service.name}Servicer(ABC):\n{methods}\n\n"
        f"def add_{service.name}Servicer_to_server("
        f"servicer: {service.name}Servicer, server: grpc.aio.Server) -> None:\n"
        f"    handlers = {{\n{handlers}    }}\n"
        f'    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("{name}", handlers),))\n'
    )


def _stub_method(service: str, method: MethodDescriptorProto) -> str:
    kind, call = (
        ("UnaryStreamMultiCallable", "unary_stream")
        if method.server_streaming
        else ("UnaryUnaryMultiCallable", "unary_unary")
    )
    asked, answer = _messages(method)
    return (
        f"        self.{method.name}: grpc.aio.{kind}[pb.{asked}, pb.{answer}] = channel.{call}(\n"
        f'            "/{service}/{method.name}",\n'
        f"            request_serializer=pb.{asked}.SerializeToString,\n"
        f"            response_deserializer=pb.{answer}.FromString,\n"
        f"        )\n"
    )


def _servicer_method(method: MethodDescriptorProto) -> str:
    asked, answer = _messages(method)
    streams = method.server_streaming
    return (
        f"    @abstractmethod\n"
        f"    {'def' if streams else 'async def'} {method.name}(\n"
        f"        self, request: pb.{asked}, context: grpc.aio.ServicerContext[pb.{asked}, pb.{answer}]\n"
        f"    ) -> {f'AsyncIterator[pb.{answer}]' if streams else f'pb.{answer}'}: ...\n"
    )


def _handler(method: MethodDescriptorProto) -> str:
    asked, answer = _messages(method)
    call = "unary_stream" if method.server_streaming else "unary_unary"
    return (
        f'        "{method.name}": grpc.{call}_rpc_method_handler(\n'
        f"            servicer.{method.name},\n"
        f"            request_deserializer=pb.{asked}.FromString,\n"
        f"            response_serializer=pb.{answer}.SerializeToString,\n"
        f"        ),\n"
    )


def _messages(method: MethodDescriptorProto) -> tuple[str, str]:
    """Names of what the method is asked and what it answers."""
    return method.input_type.rpartition(".")[2], method.output_type.rpartition(".")[2]
