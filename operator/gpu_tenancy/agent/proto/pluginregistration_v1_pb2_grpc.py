"""Client and server of the services of pluginregistration_v1.proto. Written by generate.py."""

from abc import ABC, abstractmethod

import grpc
import grpc.aio

from gpu_tenancy.agent.proto import pluginregistration_v1_pb2 as pb


class RegistrationStub:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.GetInfo: grpc.aio.UnaryUnaryMultiCallable[pb.InfoRequest, pb.PluginInfo] = channel.unary_unary(
            "/pluginregistration.Registration/GetInfo",
            request_serializer=pb.InfoRequest.SerializeToString,
            response_deserializer=pb.PluginInfo.FromString,
        )
        self.NotifyRegistrationStatus: grpc.aio.UnaryUnaryMultiCallable[pb.RegistrationStatus, pb.RegistrationStatusResponse] = channel.unary_unary(
            "/pluginregistration.Registration/NotifyRegistrationStatus",
            request_serializer=pb.RegistrationStatus.SerializeToString,
            response_deserializer=pb.RegistrationStatusResponse.FromString,
        )


class RegistrationServicer(ABC):
    @abstractmethod
    async def GetInfo(
        self, request: pb.InfoRequest, context: grpc.aio.ServicerContext[pb.InfoRequest, pb.PluginInfo]
    ) -> pb.PluginInfo: ...

    @abstractmethod
    async def NotifyRegistrationStatus(
        self, request: pb.RegistrationStatus, context: grpc.aio.ServicerContext[pb.RegistrationStatus, pb.RegistrationStatusResponse]
    ) -> pb.RegistrationStatusResponse: ...


def add_RegistrationServicer_to_server(servicer: RegistrationServicer, server: grpc.aio.Server) -> None:
    handlers = {
        "GetInfo": grpc.unary_unary_rpc_method_handler(
            servicer.GetInfo,
            request_deserializer=pb.InfoRequest.FromString,
            response_serializer=pb.PluginInfo.SerializeToString,
        ),
        "NotifyRegistrationStatus": grpc.unary_unary_rpc_method_handler(
            servicer.NotifyRegistrationStatus,
            request_deserializer=pb.RegistrationStatus.FromString,
            response_serializer=pb.RegistrationStatusResponse.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("pluginregistration.Registration", handlers),))
