import grpc.aio

from gpu_tenancy.agent.proto import cri_v1_pb2 as pb


class RuntimeServiceStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    Status: grpc.aio.UnaryUnaryMultiCallable[pb.StatusRequest, pb.StatusResponse]
    ListPodSandbox: grpc.aio.UnaryUnaryMultiCallable[pb.ListPodSandboxRequest, pb.ListPodSandboxResponse]


class RuntimeServiceServicer:
    async def Status(
        self, request: pb.StatusRequest, context: grpc.aio.ServicerContext[pb.StatusRequest, pb.StatusResponse]
    ) -> pb.StatusResponse: ...
    async def ListPodSandbox(
        self, request: pb.ListPodSandboxRequest, context: grpc.aio.ServicerContext[pb.ListPodSandboxRequest, pb.ListPodSandboxResponse]
    ) -> pb.ListPodSandboxResponse: ...


def add_RuntimeServiceServicer_to_server(
    servicer: RuntimeServiceServicer, server: grpc.aio.Server
) -> None: ...
