import grpc.aio

from gpu_tenancy.agent.proto import pluginregistration_v1_pb2 as pb


class RegistrationStub:
    def __init__(self, channel: grpc.aio.Channel) -> None: ...
    GetInfo: grpc.aio.UnaryUnaryMultiCallable[pb.InfoRequest, pb.PluginInfo]
    NotifyRegistrationStatus: grpc.aio.UnaryUnaryMultiCallable[pb.RegistrationStatus, pb.RegistrationStatusResponse]


class RegistrationServicer:
    async def GetInfo(
        self, request: pb.InfoRequest, context: grpc.aio.ServicerContext[pb.InfoRequest, pb.PluginInfo]
    ) -> pb.PluginInfo: ...
    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.aio.ServicerContext[pb.RegistrationStatus, pb.RegistrationStatusResponse]
    ) -> pb.RegistrationStatusResponse: ...


def add_RegistrationServicer_to_server(
    servicer: RegistrationServicer, server: grpc.aio.Server
) -> None: ...
