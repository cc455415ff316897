"""Client and server of the services of dra_v1.proto. Written by generate.py."""

from abc import ABC, abstractmethod

import grpc
import grpc.aio

from gpu_tenancy.agent.proto import dra_v1_pb2 as pb


class DRAPluginStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.NodePrepareResources: grpc.aio.UnaryUnaryMultiCallable[pb.NodePrepareResourcesRequest, pb.NodePrepareResourcesResponse] = channel.unary_unary(
            "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources",
            request_serializer=pb.NodePrepareResourcesRequest.SerializeToString,
            response_deserializer=pb.NodePrepareResourcesResponse.FromString,
        )
        self.NodeUnprepareResources: grpc.aio.UnaryUnaryMultiCallable[pb.NodeUnprepareResourcesRequest, pb.NodeUnprepareResourcesResponse] = channel.unary_unary(
            "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodeUnprepareResources",
            request_serializer=pb.NodeUnprepareResourcesRequest.SerializeToString,
            response_deserializer=pb.NodeUnprepareResourcesResponse.FromString,
        )


class DRAPluginServicer(ABC):
    @abstractmethod
    async def NodePrepareResources(
        self, request: pb.NodePrepareResourcesRequest, context: grpc.aio.ServicerContext[pb.NodePrepareResourcesRequest, pb.NodePrepareResourcesResponse]
    ) -> pb.NodePrepareResourcesResponse: ...

    @abstractmethod
    async def NodeUnprepareResources(
        self, request: pb.NodeUnprepareResourcesRequest, context: grpc.aio.ServicerContext[pb.NodeUnprepareResourcesRequest, pb.NodeUnprepareResourcesResponse]
    ) -> pb.NodeUnprepareResourcesResponse: ...


def add_DRAPluginServicer_to_server(servicer: DRAPluginServicer, server: grpc.aio.Server) -> None:
    handlers = {
        "NodePrepareResources": grpc.unary_unary_rpc_method_handler(
            servicer.NodePrepareResources,
            request_deserializer=pb.NodePrepareResourcesRequest.FromString,
            response_serializer=pb.NodePrepareResourcesResponse.SerializeToString,
        ),
        "NodeUnprepareResources": grpc.unary_unary_rpc_method_handler(
            servicer.NodeUnprepareResources,
            request_deserializer=pb.NodeUnprepareResourcesRequest.FromString,
            response_serializer=pb.NodeUnprepareResourcesResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin", handlers),))
