"""Client and server of the services of cri_v1.proto. Written by generate.py."""

from abc import ABC, abstractmethod

import grpc
import grpc.aio

from gpu_tenancy.agent.proto import cri_v1_pb2 as pb


class RuntimeServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.Status: grpc.aio.UnaryUnaryMultiCallable[pb.StatusRequest, pb.StatusResponse] = channel.unary_unary(
            "/runtime.v1.RuntimeService/Status",
            request_serializer=pb.StatusRequest.SerializeToString,
            response_deserializer=pb.StatusResponse.FromString,
        )
        self.ListPodSandbox: grpc.aio.UnaryUnaryMultiCallable[pb.ListPodSandboxRequest, pb.ListPodSandboxResponse] = channel.unary_unary(
            "/runtime.v1.RuntimeService/ListPodSandbox",
            request_serializer=pb.ListPodSandboxRequest.SerializeToString,
            response_deserializer=pb.ListPodSandboxResponse.FromString,
        )


class RuntimeServiceServicer(ABC):
    @abstractmethod
    async def Status(
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]
    ) -> pb.StatusResponse: ...

    @abstractmethod
    async def ListPodSandbox(
        self, request: pb.ListPodSandboxRequest, context: grpc.aio.ServicerContext[pb.ListPodSandboxRequest, pb.ListPodSandboxResponse]
    ) -> pb.ListPodSandboxResponse: ...


def add_RuntimeServiceServicer_to_server(servicer: RuntimeServiceServicer, server: grpc.aio.Server) -> None:
    handlers = {
        "Status": grpc.unary_unary_rpc_method_handler(
            servicer.Status,
            request_deserializer=pb.StatusRequest.FromString,
            response_serializer=pb.StatusResponse.SerializeToString,
        ),
        "ListPodSandbox": grpc.unary_unary_rpc_method_handler(
            servicer.ListPodSandbox,
            request_deserializer=pb.ListPodSandboxRequest.FromString,
            response_serializer=pb.ListPodSandboxResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("runtime.v1.RuntimeService", handlers),))
