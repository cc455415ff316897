"""``python -m gpu_tenancy.agent.proto``: regenerate the Python of the protos beside this file."""

from gpu_tenancy.agent.proto.generate import write

write()
