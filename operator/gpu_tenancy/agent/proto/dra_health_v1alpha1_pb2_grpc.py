"""Client and server of the services of dra_health_v1alpha1.proto. Written by generate.py."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from gpu_tenancy.agent.proto import dra_health_v1alpha1_pb2 as pb


class DRAResourceHealthStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.NodeWatchResources: grpc.aio.UnaryStreamMultiCallable[pb.NodeWatchResourcesRequest, pb.NodeWatchResourcesResponse] = channel.unary_stream(
            "/v1alpha1.DRAResourceHealth/NodeWatchResources",
            request_serializer=pb.NodeWatchResourcesRequest.SerializeToString,
            response_deserializer=pb.NodeWatchResourcesResponse.FromString,
        )


class DRAResourceHealthServicer(ABC):
    @abstractmethod
    def NodeWatchResources(
        self, request: pb.NodeWatchResourcesRequest, context: grpc.aio.ServicerContext[pb.NodeWatchResourcesRequest, pb.NodeWatchResourcesResponse]
    ) -> AsyncIterator[pb.NodeWatchResourcesResponse]: ...


def add_DRAResourceHealthServicer_to_server(servicer: DRAResourceHealthServicer, server: grpc.aio.Server) -> None:
    handlers = {
        "NodeWatchResources": grpc.unary_stream_rpc_method_handler(
            servicer.NodeWatchResources,
            request_deserializer=pb.NodeWatchResourcesRequest.FromString,
            response_serializer=pb.NodeWatchResourcesResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v1alpha1.DRAResourceHealth", handlers),))
