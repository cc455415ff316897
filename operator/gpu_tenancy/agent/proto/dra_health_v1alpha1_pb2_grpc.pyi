from collections.abc import AsyncIterator

import grpc.aio

from gpu_tenancy.agent.proto import dra_health_v1alpha1_pb2 as pb


class DRAResourceHealthStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    NodeWatchResources: grpc.aio.UnaryStreamMultiCallable[pb.NodeWatchResourcesRequest, pb.NodeWatchResourcesResponse]


class DRAResourceHealthServicer:
    def NodeWatchResources(
        self, request: pb.NodeWatchResourcesRequest, context: grpc.aio.ServicerContext[pb.NodeWatchResourcesRequest, pb.NodeWatchResourcesResponse]
    ) -> AsyncIterator[pb.NodeWatchResourcesResponse]: ...


def add_DRAResourceHealthServicer_to_server(
    servicer: DRAResourceHealthServicer, server: grpc.aio.Server
) -> None: ...
