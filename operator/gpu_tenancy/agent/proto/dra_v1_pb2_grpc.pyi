import grpc.aio

from gpu_tenancy.agent.proto import dra_v1_pb2 as pb


class DRAPluginStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    NodePrepareResources: grpc.aio.UnaryUnaryMultiCallable[pb.NodePrepareResourcesRequest, pb.NodePrepareResourcesResponse]
    NodeUnprepareResources: grpc.aio.UnaryUnaryMultiCallable[pb.NodeUnprepareResourcesRequest, pb.NodeUnprepareResourcesResponse]


class DRAPluginServicer:
    async def NodePrepareResources(
        self, request: pb.NodePrepareResourcesRequest, context: grpc.aio.ServicerContext[pb.NodePrepareResourcesRequest, pb.NodePrepareResourcesResponse]
    ) -> pb.NodePrepareResourcesResponse: ...
    async def NodeUnprepareResources(
        self, request: pb.NodeUnprepareResourcesRequest, context: grpc.aio.ServicerContext[pb.NodeUnprepareResourcesRequest, pb.NodeUnprepareResourcesResponse]
    ) -> pb.NodeUnprepareResourcesResponse: ...


def add_DRAPluginServicer_to_server(
    servicer: DRAPluginServicer, server: grpc.aio.Server
) -> None: ...
